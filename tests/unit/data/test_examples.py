import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import shared_data
from hub import Hub

from lamina.data.examples import left_out, read_examples
from lamina.errors import DataError

ROWS = [{"question": f"q{index}", "answer": f"a{index}"} for index in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def answers(path: Path | str, split: str = "train") -> list[str]:
    return [found.messages[-1].content if found.messages else found.text for found in read_examples(path, split=split)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.replace("\n", "\r\n")),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.jsonl", "\n\n" + json.dumps(ROWS, indent=2)),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.json", json.dumps(ROWS).encode("utf-16")),
        ("a.jsonl", LINES.rstrip("\n")),
        ("a.csv", "question,answer\nq0,a0\nq1,a1\nq2,a2\n"),
        ("a.csv", "question;answer\r\nq0;a0\r\nq1;a1\r\n\r\nq2;a2\r\n"),
        ("a.csv", "\ufeffquestion , answer\nq0,a0\nq1,a1\nq2,a2"),
        ("a.tsv", "question\tanswer\nq0\ta0\nq1\ta1\nq2\ta2\n"),
        ("a.txt", "a0\n\na1\n \n\r\na2"),
        ("a.txt", "a0\r\na1\na2\n"),
        ("a.txt", "\n \na0\na1\na2\n\n"),
    ],
)
def test_every_kind_of_file(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert answers(write(tmp_path / name, content)) == ["a0", "a1", "a2"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": ["a0", "a1", "a2"]}), tmp_path / "a.parquet")
    found = list(read_examples(tmp_path / "a.parquet"))
    assert [(item.row, item.text, item.ignored) for item in found] == [(n + 1, f"a{n}", ("n",)) for n in range(3)]


def test_rows_are_numbered_by_line_in_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n" + LINES.replace("\n", "\n\n"))
    assert [found.row for found in read_examples(path)] == [2, 4, 6]


def test_quoted_csv_cells_keep_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'question,answer\n"q, ""x""","line\nline"\n')
    assert answers(path) == ["line\nline"]


def test_a_csv_cell_may_be_long(tmp_path: Path) -> None:
    text = "word " * 100_000
    assert answers(write(tmp_path / "a.csv", f"text,n\n{text},1\n")) == [text]


def test_line_separators_inside_json_end_no_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b\u0085c"}\n')
    assert answers(path) == ["a\u2028b\u0085c"]


def test_paragraphs_keep_their_lines(tmp_path: Path) -> None:
    found = list(read_examples(write(tmp_path / "a.txt", "\none\ntwo\n\n\nthree\n")))
    assert [(item.row, item.text) for item in found] == [(1, "one\ntwo"), (2, "three")]


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES + "broken")
    found = read_examples(path)
    assert next(found).messages[-1].content == "a0"


def test_folder(tmp_path: Path) -> None:
    write(tmp_path / "data" / "b.jsonl", LINES)
    write(tmp_path / "data" / "more" / "c.jsonl", LINES)
    for name in ("README.md", "notes.txt", "dataset_info.json", ".cache/x.jsonl"):
        write(tmp_path / "data" / name, "not data")
    found = list(read_examples(tmp_path / "data"))
    assert [item.row for item in found] == [1, 2, 3, 4, 5, 6]


def test_folder_of_splits(tmp_path: Path) -> None:
    for split in ("train", "test", "val"):
        write(tmp_path / f"{split}-00000-of-00001.jsonl", json.dumps({"text": split}))
    assert answers(tmp_path) == ["train"]
    assert answers(tmp_path, "validation") == ["val"]
    with pytest.raises(DataError, match="no files of the split 'other', found test, train, validation"):
        answers(tmp_path, "other")


def test_files_of_a_folder_that_are_not_read_are_known(tmp_path: Path) -> None:
    for name in ("train_a.jsonl", "test.jsonl", "gsm8k.jsonl", "train.txt"):
        write(tmp_path / name, LINES)
    assert left_out(str(tmp_path), "train") == (str(tmp_path / "gsm8k.jsonl"), str(tmp_path / "train.txt"))
    assert left_out(str(tmp_path), "test") == (str(tmp_path / "gsm8k.jsonl"),)
    assert left_out(str(tmp_path / "gsm8k.jsonl"), "train") == left_out("owner/set", "train") == ()


def test_folder_of_texts(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a0")
    assert answers(tmp_path) == ["a0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a.jsonl: the file is empty, expected at least one row"),
        ("a.json", "[]", r"a.json: the file is empty"),
        ("a.csv", "question,answer\n", r"a.csv: the file is empty"),
        ("a.txt", "\n \n", r"a.txt: the file is empty"),
        ("a.doc", "x", r"a.doc: the suffix '.doc' is not known, expected one of .jsonl"),
        ("a.jsonl", LINES + '{"text": \n', r"a.jsonl:4: broken JSON \(Expecting value at column \d+\)$"),
        ("a.jsonl", '{"text": "a\n' + LINES, r"a.jsonl:1: broken JSON \(Unterminated string starting at column 10\)"),
        ("a.jsonl", "{broken\n" + LINES, r"a.jsonl:1: broken JSON \(Expecting property name"),
        ("a.jsonl", LINES + "[" * 100_000 + "\n", r"a.jsonl:4: JSON that cannot be read"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', r"a.json:2: broken JSON \(Expecting ':' delimiter at column 9\)"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', r"a.json:2: broken JSON \(Expecting ',' or '\]' at column 1\)"),
        (
            "a.json",
            '[{"text": "a"},',
            r"a.json: broken JSON \(the list is not closed by '\]'\); is the file complete\?",
        ),
        (
            "a.json",
            '[{"text": "a"}]\n[{"text": "b"}]\n',
            r"a.json:2: broken JSON \(more stands after the list's '\]'\); expected one list, or a row on each line$",
        ),
        ("a.json", '[{"text": "a"}', r"a.json:1: broken JSON \(Expecting ',' or '\]'"),
        ("a.json", "[" * 100_000, r"a.json:1: JSON that cannot be read"),
        ("a.jsonl", LINES + "[1]\n", r"a.jsonl:4: the row is a list, expected an object"),
        ("a.jsonl", LINES.encode() + b'{"text": "\xff"}', r"a.jsonl:4: not UTF-8 text \(byte 0xff at column 11\)"),
        ("a.jsonl", LINES.encode("utf-16")[:-1], r"a.jsonl:\d: not UTF-16 text"),
        ("a.csv", "question,answer\nq,a,b\n", r"a.csv:2: 3 fields, expected 2: question, answer"),
        ("a.csv", 'question,answer\nq,"a\n', r"a.csv:2: broken CSV \(unexpected end of data\)"),
        ("a.csv", "question,answer\nq,\n", r"a.csv:2: a row without an answer: column 'answer' is empty"),
        ("a.csv", "no,head\nq,a\n", r"a.csv:2: no known form in the columns 'no', 'head'; known forms: messages; "),
        ("a.parquet", "not parquet", r"a.parquet: not a Parquet file that can be read \(Parquet magic bytes"),
        ("a.jsonl", '{"text": NaN}\n', r"a.jsonl:1: column 'text' has no value"),
        ("a.jsonl", '{"text": "\\ud83e"}\n', r"a.jsonl:1: text: character 1 is half of a surrogate pair"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        answers(write(tmp_path / name, content))
    assert "\n" not in str(raised.value)


def test_all_bad_rows_are_told_together(tmp_path: Path) -> None:
    bad = ['{"a": 1}', "{", '{"text": null}', *(json.dumps({"messages": number}) for number in range(20))]
    path = write(tmp_path / "a.jsonl", LINES + "\n".join(bad) + '\n{"a": 2}\n')
    with pytest.raises(DataError) as raised:
        answers(path)
    said = str(raised.value)
    assert said.startswith(f"{path}:4: no known form in the columns 'a' (also 27); {path}:5: broken JSON")
    assert "a.jsonl:6: column 'text' has no value;" in said
    assert "and 13 more" in said
    assert said.count("known forms:") == 1


def test_reading_stops_when_nothing_fits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n' * 5000)
    with pytest.raises(
        DataError, match=r"a.jsonl:1: no known form .*\(also 2, .* and 990 more\); .*; reading stopped here"
    ):
        answers(path)


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "train.jsonl", LINES)
    with pytest.raises(DataError, match=r"data/trian.jsonl: no such file; did you mean data/train.jsonl\?"):
        answers("data/trian.jsonl")
    write(tmp_path / "data" / "w_noans.jsonl", LINES)  # the suffix alone is no likeness
    with pytest.raises(DataError, match=r"snli-contradictions.jsonl: no such file; expected a file, a folder or a hub"):
        answers("data/snli-contradictions.jsonl")
    with pytest.raises(DataError, match=r"data/x: no such file; expected a file, a folder or a hub dataset"):
        answers("data/x")
    with pytest.raises(DataError, match=r"other/a.csv: no such file; its folder other is not there either"):
        answers("other/a.csv")
    with pytest.raises(DataError, match="data: nothing is named, expected a file, a folder or a hub dataset"):
        answers("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no data in this folder, expected files of .jsonl"):
        answers("empty")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="no data in this folder"):
        answers(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="b.jsonl: no such file"):
        answers(tmp_path / "b.jsonl")


def test_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", LINES)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a.jsonl: cannot be read \(Permission denied\)"):
        answers(path)


READ = """
from lamina.data.examples import read_examples
from lamina.errors import DataError
for name, split, revision in {cases!r}:
    try:
        answers = [found.messages[-1].content for found in read_examples(name, split=split, revision=revision)]
        print(name, *answers)
    except DataError as error:
        print(error)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as server:
        write(tmp_path / "set" / "train.jsonl", LINES)
        server.publish("owner/set", tmp_path / "set", kind="datasets", tag="v1")
        write(tmp_path / "set" / "train.jsonl", '{"text": null}\n')
        server.publish("owner/bad", tmp_path / "set", kind="datasets")
        yield server


@pytest.mark.slow
def test_hub(hub: Hub, tmp_path: Path) -> None:
    cases = {
        ("owner/set", "train", "v1"): "owner/set a0 a1 a2",
        ("owner/bad", "train", None): "owner/bad (train): row 1: column 'text' has no value",
        ("owner/set", "test", None): "owner/set: cannot be read from the hub (Bad split: test.",
        (
            "owner/none",
            "train",
            None,
        ): "owner/none: no such dataset on the hub and no such file here; a private or gated",
        ("owner/set", "train", "v9"): "owner/set: no revision 'v9' of this dataset on the hub",
        ("owner/set:x", "train", None): "owner/set: cannot be read from the hub (BuilderConfig 'x'",
    }
    done = hub.run(READ.format(cases=list(cases)), tmp_path / "home")
    said = done.stdout.splitlines()
    assert len(said) == len(cases), (done.stdout, done.stderr[-2000:])
    for line, expected in zip(said, cases.values(), strict=True):
        assert line.startswith(expected)


def test_hub_out_of_reach(hub: Hub, tmp_path: Path) -> None:
    done = hub.run(READ.format(cases=[("owner/set", "train", None)]), tmp_path / "home", online=False)
    expected = "owner/set: the hub cannot be reached (.*); name a local file as data, or run again online"
    assert re.fullmatch(expected, done.stdout.strip()), (done.stdout, done.stderr[-2000:])


@pytest.mark.slow
def test_hub_that_does_not_answer_is_told_at_once(hub: Hub, tmp_path: Path) -> None:
    """Without the half minute of retries that ``datasets`` makes, each with a warning."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the discard port: nobody answers
    done = hub.run(READ.format(cases=[("owner/set", "train", None)]), tmp_path / "home", **nowhere)
    assert done.stdout.startswith("owner/set: the hub cannot be reached ("), (done.stdout, done.stderr[-2000:])
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("folder", "file", "rows", "form"),
    [
        ("guanaco-llama2-1k", "", 1000, "llama2-text"),
        ("llama-factory-demo", "alpaca_en_demo.json", 999, "alpaca"),
        ("llama-factory-demo", "v1_sft_demo.jsonl", 500, "messages"),
        ("mt-bench", "dummy_conversation.json", 500, "sharegpt"),
        ("gsm8k", "", 7473, "question/answer"),
        ("gsm8k", "test.jsonl", 1319, "question/answer"),
        ("oasst1-qlora-eval", "oa_questions.jsonl", 953, "input/output"),
        ("llama-factory-demo", "c4_demo.jsonl", 300, "text"),
        ("llama-factory-demo", "wiki_demo.txt", 30, "text"),
        ("mmlu-zero-shot-val", "zero_shot_mmlu_val.json", 1531, "input/output"),
    ],
)
def test_real_data(folder: str, file: str, rows: int, form: str) -> None:
    found = list(read_examples(shared_data(folder) / file))
    assert (len(found), {item.form for item in found}) == (rows, {form})
