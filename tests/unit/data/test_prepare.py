import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokens
from conftest import shared_data

from lamina.data.examples import DataSettings
from lamina.data.pack import pack
from lamina.data.prepare import Prepared, prepare
from lamina.data.report import DataReport
from lamina.errors import ConfigError, DataError, ModelError


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(number: int) -> list[dict[str, Any]]:
    return [{"question": f"what is {index}", "answer": f"it is {index} and {index}"} for index in range(number)]


def run(data: str, seed: int = 0, tokenizer: Any = None, **settings: Any) -> Prepared:
    return prepare(DataSettings(data=data, **settings), tokenizer or tokens.pieces(), seed)


def contents(store: Any) -> list[tuple[int, ...]]:
    return [tuple(example.tokens.tolist()) for example in store]


def test_split(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", questions(100))
    found = run(data)
    assert (len(found.train), len(found.held_out)) == (95, 5)
    assert sorted([example.row for example in found.train] + [example.row for example in found.held_out]) == list(
        range(1, 101)
    )
    assert (found.report.train_rows, found.report.held_out_rows) == (95, 5)
    assert run(data, eval_fraction=0.25).report.held_out_rows == 25
    assert run(data, eval_fraction=0.0).report.held_out_rows == 0


def test_the_split_is_a_function_of_seed_and_content(tmp_path: Path) -> None:
    rows = questions(60)
    data, turned = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])
    held = set(contents(run(data).held_out))
    assert set(contents(run(turned).held_out)) == held
    assert set(contents(run(data, seed=1).held_out)) != held
    assert run(data).train.fingerprint == run(data).train.fingerprint != run(data, seed=1).train.fingerprint


def test_copies_stand_on_one_side(tmp_path: Path) -> None:
    found = run(write(tmp_path / "a.jsonl", questions(20) * 3), eval_fraction=0.2)
    assert not set(contents(found.train)) & set(contents(found.held_out))
    assert (len(found.train), len(found.held_out), found.report.duplicates) == (48, 12, 40)
    assert "repeated: 40 rows, kept on the same side of the split" in found.report.lines()


@pytest.mark.parametrize(("number", "held"), [(1, 0), (2, 1), (3, 1), (19, 1), (40, 2)])
def test_small_sets_hold_one_row_out(tmp_path: Path, number: int, held: int) -> None:
    found = run(write(tmp_path / "a.jsonl", questions(number)))
    assert (len(found.train), len(found.held_out)) == (number - held, held)


def test_most_of_a_small_set_is_never_all_of_it(tmp_path: Path) -> None:
    assert len(run(write(tmp_path / "a.jsonl", questions(2)), eval_fraction=0.99).train) == 1


def test_held_out_data_of_its_own(tmp_path: Path) -> None:
    data, held = write(tmp_path / "a.jsonl", questions(10)), write(tmp_path / "b.jsonl", questions(13))
    found = run(data, eval_data=held)
    assert (len(found.train), len(found.held_out), found.report.held_out_copies) == (10, 3, 10)
    assert found.report.lines()[-1] == (
        f"split: 10 examples to train on, 3 examples held out from {held}; 10 rows left out that also stand in training"
    )
    with pytest.raises(
        DataError, match="a.jsonl: nothing to measure by: all 10 usable rows also stand in the training data"
    ):
        run(data, eval_data=data)


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", questions(10))
    write(tmp_path / "test.jsonl", questions(12)[10:])
    found = run(str(tmp_path), eval_data=str(tmp_path))
    assert (len(found.train), len(found.held_out)) == (10, 2)


def test_files_of_a_folder_that_are_not_read_are_told(tmp_path: Path) -> None:
    write(tmp_path / "train_a.jsonl", questions(10))
    write(tmp_path / "test.jsonl", questions(12)[10:])
    others = [write(tmp_path / f"part{n}.jsonl", questions(1)) for n in range(7)]
    told = f"files not read: {', '.join(others[:5])} and 2 more (no split in the name, or .txt beside data)"
    assert told in run(str(tmp_path), eval_data=str(tmp_path)).report.lines()
    assert not any("not read" in line for line in run(others[0]).report.lines())


@pytest.mark.parametrize("long", ["truncate", "split"])
def test_rows_that_are_equal_after_the_cut(tmp_path: Path, long: str) -> None:
    """Texts that differ beyond ``max_length`` only: what is trained on must not be measured by."""
    rows = [{"text": "the cat sat on a mat and saw that it was good " * 3 + f"{index}"} for index in range(20)]
    found = run(write(tmp_path / "a.jsonl", rows), max_length=16, long=long, eval_fraction=0.5)
    assert not set(contents(found.train)) & set(contents(found.held_out))
    if long == "split":
        assert found.report.held_out_copies > 0


@pytest.mark.parametrize("long", ["drop", "truncate", "split"])
def test_long_rows(tmp_path: Path, long: str) -> None:
    rows = [*questions(5), {"question": "what", "answer": "good " * 200}]
    found = run(write(tmp_path / "a.jsonl", rows), long=long, max_length=64, eval_fraction=0.0)
    report = found.report
    assert max(found.train.lengths) <= 64 and (report.rows, report.long_rows) == (6, 1)
    kept = sum(int(example.trained.sum()) for example in found.train)
    assert report.targets == kept + report.lost_targets
    assert (report.answers, report.ended) == {"drop": (5, 5), "truncate": (6, 5), "split": (6, 6)}[long]
    said = {"drop": "1 row left out", "truncate": "1 row cut at the end", "split": "1 row cut into pieces"}[long]
    assert any(
        line.startswith(f"longer than 64 tokens: {said}; lost {report.lost_tokens:,} ") for line in report.lines()
    )
    assert report.nothing_to_learn == ()


def test_rows_with_nothing_to_learn(tmp_path: Path) -> None:
    rows = [
        {"text": "the cat"},
        {"text": ""},
        {"question": "good " * 200, "answer": "lost"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]},
    ]
    found = run(write(tmp_path / "a.jsonl", rows), max_length=64)
    assert [example.row for example in found.train] == [1]
    assert found.report.nothing_to_learn == (2, 3, 4)
    pack(list(found.train), 64)


def test_nothing_is_left(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"text": " "}, {"text": ""}])
    with pytest.raises(
        DataError, match="a.jsonl: nothing to train on: none of 2 rows holds a token to learn within 2,048"
    ):
        run(data)


def test_every_refused_row_is_told(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}
    data = write(tmp_path / "a.jsonl", [*questions(2), bad, *questions(1), bad])
    expected = (
        r"a.jsonl: row 3: the template llama2 refuses these messages \(assistant, user\): "
        r"Conversation roles must alternate user/assistant/user/assistant/... \(also row 5\)$"
    )
    with pytest.raises(DataError, match=expected):
        run(data)


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_reading_ahead_changes_nothing(tmp_path: Path, ahead: int) -> None:
    data = write(tmp_path / "a.jsonl", [*questions(9), {"text": ""}])
    plain, other = run(data), run(data, read_ahead=ahead)
    assert other.report == plain.report
    assert (other.train.fingerprint, other.held_out.fingerprint) == (
        plain.train.fingerprint,
        plain.held_out.fingerprint,
    )


def test_progress(tmp_path: Path) -> None:
    seen: list[int] = []
    settings = DataSettings(data=write(tmp_path / "a.jsonl", questions(7)), read_ahead=3)
    prepare(settings, tokens.pieces(), 0, seen.append)
    assert seen == [3, 6, 7]


def test_no_row_is_longer_than_the_models_context(tmp_path: Path) -> None:
    rows = [*questions(5), {"question": "what", "answer": "good " * 200}]
    settings = DataSettings(data=write(tmp_path / "a.jsonl", rows), eval_fraction=0.0)
    found = prepare(settings, tokens.pieces(), 0, max_position=64)
    assert max(found.train.lengths) == found.report.max_length == 64
    assert any(
        line.startswith("longer than 64 tokens, the model's context: 1 row cut") for line in found.report.lines()
    )
    for context in (None, 4096):
        found = prepare(settings, tokens.pieces(), 0, max_position=context)
        assert found.report.max_length == 2048
        assert "longer than 2,048 tokens: no row" in found.report.lines()
    with pytest.raises(
        ConfigError, match=r"^max_length: found 65, expected at most 64, the model's context \(max_posit"
    ):
        prepare(replace(settings, max_length=65), tokens.pieces(), 0, max_position=64)
    assert prepare(replace(settings, max_length=64), tokens.pieces(), 0, max_position=64).report.max_length == 64


def test_ids_that_the_model_does_not_know(tmp_path: Path) -> None:
    tokenizer = tokens.pieces()
    data = write(tmp_path / "a.jsonl", [{"text": "!"}, {"text": "the cat sat"}])
    known = int(max(tokenizer("!</s>")["input_ids"])) + 1
    first = next(number for number in tokenizer("the cat sat")["input_ids"] if number >= known)
    token = tokenizer.convert_ids_to_tokens(first)
    told = f"a.jsonl: row 2: the tokenizer gives {token!r} the id {first}, but the model knows {known} ids, from 0; use"
    settings = DataSettings(data=data, eval_fraction=0.0)
    with pytest.raises(ModelError, match=re.escape(told)):
        prepare(settings, tokenizer, 0, vocabulary=known)
    assert len(prepare(settings, tokenizer, 0, vocabulary=len(tokenizer)).train) == 2


def test_report_in_sentences(tmp_path: Path) -> None:
    rows = [
        {"text": "<s>[INST] a [/INST] b </s>", "id": 1},
        {"text": "<s>[INST] a [/INST]  </s><s>[INST] a [/INST] c", "id": 2},
        {"question": "the </s> cat", "answer": "sat", "id": 3},
    ]
    found = run(write(tmp_path / "a.jsonl", rows), eval_fraction=0.0)
    assert found.report.lines() == [
        f"data: {tmp_path / 'a.jsonl'}, format llama2-text (already rendered; 2 rows), question/answer (1 row)",
        "chat template: llama2",
        "beginning of text: kept once (2 rows held it already)",
        f"tokens: {found.report.tokens}, of which {found.report.targets} count (answers and their end tokens); "
        f"a row has {found.report.lengths[0]} (median), {found.report.lengths[1]} (95th percentile), "
        f"{found.report.lengths[2]} (longest)",
        "end token trained in 2 of 3 answers",
        "longer than 2,048 tokens: no row",
        "columns not used: id",
        "split: 3 examples to train on, 0 rows held out".replace("0 rows", "0 examples"),
    ]


def test_report_of_text_and_of_much() -> None:
    report = DataReport(
        "x",
        "llama2",
        "drop",
        8,
        "answers",
        rows=30,
        forms={"text": 30},
        answers=1,
    )
    said = "\n".join(report.lines())
    assert "end token trained in 0 of 1 texts\n" in said and "count (everything)" in said
    assert "chat template" not in said
    assert report.learnt == 0
    assert replace(report, tokens=100, targets=60, lost_tokens=20, lost_targets=20).learnt == 0.5


@pytest.mark.slow
def test_guanaco() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data("llama2-tokenizer"))
    begun = time.perf_counter()
    found = run(str(shared_data("guanaco-llama2-1k")), tokenizer=tokenizer)
    seconds = time.perf_counter() - begun
    assert seconds < 15  # about half a second on two cores; the bound is against something quadratic
    report = found.report
    assert report.forms == {"llama2-text": 1000} and report.bos_held == 1000
    assert (report.tokens, report.targets, report.lengths) == (461_907, 397_159, (374, 1154, 7832))
    assert (report.answers, report.ended, report.blank_answers) == (1377, 1371, 1)  # 2 lost, 6 cut
    assert (report.long_rows, report.lost_tokens, report.lost_targets) == (7, 13_142, 10_009)
    assert report.nothing_to_learn == (570,) and report.duplicates == 0
    assert (len(found.train), len(found.held_out)) == (949, 50)
    assert sum(int(example.trained.sum()) for example in [*found.train, *found.held_out]) == 397_159 - 10_009
