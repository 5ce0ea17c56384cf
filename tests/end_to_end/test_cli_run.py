"""The commands of one run, from training to the merged model, on a tiny model with random weights."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import write_tiny
from tokens import pieces

from lamina import cli
from lamina.commands.generate import read_prompts

ROWS = [("the cat", "sat on a mat"), ("Hello", "world!"), ("two and two?", "Four."), ("was it", "good; saw that")]
SMALL = ["--steps", "3", "--batch-size", "4", "--rank", "2", "--device", "cpu", "--eval-fraction", "0.25"]

pytestmark = pytest.mark.usefixtures("no_page", "untimed")

JOBS = "import sys; from lamina import cli; sys.exit(cli.main(['jobs']))"


def conversation(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})


def adapter_of(run: Path) -> dict[str, list[float]]:
    """The adapter's numbers: the file's header may name its entries in another order."""
    return {
        name: tensor.flatten().tolist() for name, tensor in load_file(run / "adapter/adapter_model.safetensors").items()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = pieces()
    write_tiny(folder / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "base")
    rows = [conversation(f"{question} {n}", answer) for n in range(4) for question, answer in ROWS]
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A finished run, made by the command."""
    arguments = ["--model", str(place / "base"), "--data", str(place / "train.jsonl"), "--dtype", "fp32", *SMALL]
    assert cli.main(["train", *arguments, "--eval-max-new-tokens", "8", "--out", str(place / "run")]) == 0
    return place / "run"


@pytest.fixture(autouse=True)
def nothing_stays_open(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "Traceback" not in capsys.readouterr().err


def out_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_train_says_what_it_does_and_ends_with_the_comparison(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    text = out_of(capsys, "train", "--model", "base", "--data", "train.jsonl", "--dtype", "fp32", *SMALL)
    assert "\x1b" not in text
    assert "step 0/3  held-out loss" in text
    assert "step 3/3  loss" in text
    assert "held-out perplexity" in text
    assert text.endswith("The run is in runs/run-1. Go on with: lamina chat runs/run-1\n")
    assert (place / "runs" / "run-1" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_job_file_of_a_run_replays_it(
    trained: Path, place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    told = json.loads(out_of(capsys, "train", str(trained / "job.toml"), "--out", str(again), "--json"))
    assert told["folder"] == str(again)
    assert told["card"] == json.loads(out_of(capsys, "eval", str(trained), "--json"))
    assert adapter_of(again) == adapter_of(trained)


def test_a_finished_run_resumes_to_the_same_end(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = adapter_of(trained)
    text = out_of(capsys, "train", "--resume", str(trained), "--save-every", "7")
    assert "after step 3 of 3" in text
    assert adapter_of(trained) == before


def test_eval_shows_the_base_beside_the_adapter(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = out_of(capsys, "eval", str(trained), "--eval-samples", "1", "--device", "cpu")
    assert "base" in text.splitlines()[0]
    assert "held-out loss" in text
    card = json.loads(out_of(capsys, "eval", str(trained), "--best", "--json", "--eval-samples", "2"))
    assert len(card["adapter"]["answers"]["rows"]) == 2


@pytest.mark.parametrize("opened", ["run", "base"])
def test_generate_answers_a_file(
    opened: str, place: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("the cat\n\nHello\n", encoding="utf-8")
    turns = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
    rows.write_text('{"prompt": "the cat"}\n' + json.dumps({"messages": turns}), encoding="utf-8")
    common = ["generate", str(place / opened), "--max-new-tokens", "6", "--prompts"]
    shown = out_of(capsys, *common, str(text))
    assert [line for line in shown.splitlines() if line.startswith("> ")] == ["> the cat", "> Hello"]
    answers = [json.loads(line) for line in out_of(capsys, *common, str(rows), "--json").splitlines()]
    assert [answer["prompt"] for answer in answers] == ["the cat", "Hello"]
    assert all(answer["tokens"] <= 6 for answer in answers)
    drawn = [*common, str(rows), "--json", "--temperature", "2", "--seed"]
    assert out_of(capsys, *drawn, "1") == out_of(capsys, *drawn, "1") != out_of(capsys, *drawn, "2")


def test_a_prompt_ends_with_its_line_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one\u2028line\x85still"}\r\n{"prompt": "two"}\n', encoding="utf-8")
    assert [turns[0].content for turns in read_prompts(file)] == ["one\u2028line\x85still", "two"]
    text = tmp_path / "prompts.txt"
    text.write_text("one\x0cpage\ntwo", encoding="utf-8")
    assert [turns[0].content for turns in read_prompts(text)] == ["one\x0cpage", "two"]


@pytest.mark.slow
def test_training_goes_on_when_the_reader_goes_away(place: Path) -> None:
    """As in ``lamina train … | head -1``."""
    out = place / "unheard"
    arguments = ["train", "--model", str(place / "base"), "--data", str(place / "train.jsonl"), "--dtype", "fp32"]
    command = [sys.executable, "-m", "lamina", *arguments, *SMALL, "--eval-max-new-tokens", "4", "--out", str(out)]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            command, stdout=pipe, stderr=subprocess.PIPE, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (out / "card.json").is_file()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.txt", "", "a.txt: found no prompts, expected at least one"),
        ("a.csv", "x", "a.csv: found the ending '.csv', expected .txt or .jsonl"),
        ("a.jsonl", '{"prompt"', "a.jsonl:1: found broken JSON (Expecting ':' delimiter), expected an object"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"question": "x"}\n\n[1]',
            'a.jsonl:2: found neither {"prompt": "…"} nor {"messages": […]}; ',
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "boss", "content": "x"}]}',
            "a.jsonl:1: found the message {'role': 'boss', 'co",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            "a.jsonl:1: found assistant as the last role, expected user: it is its message that is answered",
        ),
    ],
)
def test_a_broken_file_of_prompts_is_refused(
    name: str, text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert cli.main(["generate", "anything", "--prompts", str(tmp_path / name)]) == 2
    assert f"lamina: {tmp_path}/{told}" in capsys.readouterr().err


def test_a_file_of_prompts_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "anything", "--prompts", str(tmp_path / "no.txt")]) == 2
    assert "no.txt: cannot be read (No such file or directory), expected a file of prompts" in capsys.readouterr().err
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert cli.main(["generate", "anything", "--prompts", str(tmp_path / "a.txt")]) == 2
    assert "a.txt: is not UTF-8 text, expected a file of prompts" in capsys.readouterr().err


def test_chat_answers_lines_from_a_pipe(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "Hello\n/base\nHello\n/base\n/reset\nHello\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    lines = out_of(capsys, "chat", str(trained), "--max-new-tokens", "4", "--system", "Be brief").splitlines()
    assert lines.count("[the adapter is off: this is the base]") == 1
    assert lines.count("[the adapter is on]") == 1
    answers = [line for line in lines if not line.startswith("[")]
    assert len(answers) == 3
    assert answers[0] == answers[2]  # the same question, after the conversation was forgotten


def test_merge_writes_a_plain_model_and_says_what_it_proved(
    trained: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = out_of(capsys, "merge", str(trained), "--out", str(place / "merged"))
    assert "same most likely token" in text
    prompts = place / "prompts.txt"
    prompts.write_text("the cat\nHello\n", encoding="utf-8")
    common = ["--prompts", str(prompts), "--json", "--max-new-tokens", "8"]
    assert out_of(capsys, "generate", str(place / "merged"), *common) == out_of(
        capsys, "generate", str(trained), *common
    )
    record = json.loads(out_of(capsys, "merge", str(trained), "--out", str(place / "best"), "--best", "--json"))
    assert record["folder"] == str(place / "best")
    assert cli.main(["merge", str(trained), "--out", str(place / "merged")]) == 2  # not empty


@pytest.mark.parametrize("command", [["eval"], ["merge", "--out", "merged"]])
def test_what_needs_a_run_refuses_a_plain_model(
    command: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command[0], str(place / "base"), *command[1:]]) == 2
    assert "found no job.toml, expected the folder of a run" in capsys.readouterr().err


def test_what_a_flag_contradicts_is_told_in_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("Hello", encoding="utf-8")
    assert cli.main(["generate", str(trained), "--prompts", str(tmp_path / "p.txt"), "--top-p", "0.5"]) == 2
    assert "temperature 0 draws nothing" in capsys.readouterr().err


def test_output_into_a_full_disk_is_told_in_one_line(trained: Path, place: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", JOBS], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "lamina: writing: No space left on device; free some space\n")


def test_the_run_folder_is_not_touched_by_what_reads_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.stat().st_mtime_ns for path in sorted(trained.rglob("*")) if path.is_file()}
    out_of(capsys, "eval", str(trained), "--json")
    assert {path: path.stat().st_mtime_ns for path in sorted(trained.rglob("*")) if path.is_file()} == files
