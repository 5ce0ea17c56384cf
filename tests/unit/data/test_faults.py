"""Faults committed on purpose: each does what the tool it replays does, and nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokens
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.examples import DataSettings
from lamina.data.faults import COMMITTED, MEANS, Faults, double_start, masked_end, without_template
from lamina.data.forms import Example, Message
from lamina.data.prepare import Prepared, prepare
from lamina.data.render import mark, render, tokens_of
from lamina.data.templates import chat_format
from lamina.errors import ConfigError
from lamina.model.tokenizer import load_tokenizer

BOS, EOS = 1, 2
words = st.lists(st.sampled_from("the cat sat on a mat and saw".split(" ")), min_size=1, max_size=6).map(" ".join)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=3)
train_on = st.sampled_from(["answers", "everything"])
quick = settings(max_examples=60, deadline=None)


def conversation(turns: list[tuple[str, str]]) -> Example:
    pairs = [(Message("user", question), Message("assistant", answer)) for question, answer in turns]
    return Example(1, "messages", tuple(message for pair in pairs for message in pair))


@quick
@given(turns=turns, train_on=train_on)
def test_masked_end_takes_the_loss_off_end_tokens_only(turns: list[tuple[str, str]], train_on: Any) -> None:
    row = render(conversation(turns), tokens.pieces(), train_on=train_on)
    found = masked_end(row, EOS)
    assert found.tokens.tolist() == row.tokens.tolist()
    ends = row.tokens == EOS
    assert ends.sum() == len(turns)
    assert row.trained[ends].all() and not found.trained[ends].any()
    assert found.trained[~ends].tolist() == row.trained[~ends].tolist()
    assert [turn.ended for turn in found.turns] == [False] * len(turns)
    assert [turn[:2] for turn in found.turns] == [turn[:2] for turn in row.turns]


@quick
@given(turns=turns, train_on=train_on)
def test_double_start_puts_one_token_before_the_row(turns: list[tuple[str, str]], train_on: Any) -> None:
    row = render(conversation(turns), tokens.pieces(), train_on=train_on)
    found = double_start(row, BOS)
    assert found.tokens.tolist() == [BOS, *row.tokens.tolist()]
    assert found.trained[2:].tolist() == row.trained[1:].tolist()
    assert found.trained[:2].tolist() == [False, train_on == "everything"]
    for before, after in zip(row.turns, found.turns, strict=True):
        assert found.tokens[after.start : after.stop].tolist() == row.tokens[before.start : before.stop].tolist()


def test_a_tokenizer_without_a_start_token_doubles_none() -> None:
    row = render(conversation([("the cat", "sat")]), tokens.byte_level(), template="chatml")
    assert double_start(row, None) is row
    assert double_start(row, 99_999) is row


@pytest.mark.parametrize(
    "example",
    [
        conversation([("the cat", "sat on a mat"), ("and", "saw")]),
        Example(1, "messages", (Message("system", "Be brief"), *conversation([("the cat", "sat on a mat")]).messages)),
        Example(1, "llama2-text", text="<s>[INST] the cat [/INST] sat on a mat </s>"),
        Example(1, "llama2-text", text="<s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nthe cat [/INST] sat on a mat </s>"),
    ],
    ids=["messages", "system", "text", "text-system"],
)
@pytest.mark.parametrize("template", ["llama2", "alpaca", "vicuna"])
def test_without_template_the_bare_question_is_asked(example: Example, template: str) -> None:
    tokenizer = tokens.pieces()
    chat = chat_format(tokenizer, template)
    [row] = tokens_of([without_template(mark(example, chat), example, chat)], chat, "answers")
    first = int(row.trained.argmax())
    assert row.tokens[:first].tolist() == tokenizer("the cat")["input_ids"]
    assert tokenizer.decode(row.tokens[first:], skip_special_tokens=True).strip() == "sat on a mat"
    assert row.trained[first:].all() and row.tokens[-1] == EOS
    assert [turn.ended for turn in row.turns] == [True]


def test_a_text_without_a_template_stays_as_it_is() -> None:
    chat, example = chat_format(tokens.pieces()), Example(1, "text", text="the cat sat")
    marked = mark(example, chat)
    assert without_template(marked, example, chat) is marked


def prepared(data: Path, commit: tuple[str, ...], **settings: Any) -> Prepared:
    return prepare(DataSettings(data=str(data), **settings), tokens.pieces(), 0, faults=Faults(commit=commit))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "rows.jsonl"
    rows = [{"question": f"what is {n}", "answer": f"it is {n} and " + "so on " * (n % 7)} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_faults_of_training_leave_the_held_out_rows_alone(data: Path) -> None:
    clean, found = prepared(data, ()), prepared(data, ("masked-end", "double-start", "by-length"))
    assert found.held_out.fingerprint == clean.held_out.fingerprint
    assert found.train.rows.tolist() == clean.train.rows.tolist()
    for before, after in zip(clean.train, found.train, strict=True):
        assert after.tokens.tolist() == [BOS, *before.tokens.tolist()]
        assert not after.trained[after.tokens == EOS].any()
        assert int(after.trained.sum()) == int(before.trained.sum()) - 1
    assert (clean.report.ended, found.report.ended) == (60, 0)


def test_the_fault_of_asking_leaves_what_is_trained_on_alone(data: Path) -> None:
    clean, found = prepared(data, (), eval_fraction=0.2), prepared(data, ("no-template",), eval_fraction=0.2)
    assert found.train.fingerprint == clean.train.fingerprint
    assert found.held_out.rows.tolist() == clean.held_out.rows.tolist()
    for before, after in zip(clean.held_out, found.held_out, strict=True):
        assert after.tokens[after.trained].tolist() == before.tokens[before.trained].tolist()
        assert len(after.tokens) < len(before.tokens)


def test_without_faults_and_with_declared_ones_nothing_changes(data: Path) -> None:
    declared = tuple(name for name in MEANS if name not in COMMITTED)
    clean, found = prepared(data, ()), prepared(data, declared)
    assert (found.train.fingerprint, found.held_out.fingerprint) == (
        clean.train.fingerprint,
        clean.held_out.fingerprint,
    )
    assert found.report == clean.report


def test_a_longer_row_is_cut_to_the_same_length(data: Path) -> None:
    clean, found = (prepared(data, commit, max_length=32) for commit in ((), ("double-start",)))
    assert int(clean.train.lengths.max()) == int(found.train.lengths.max()) == 32
    assert np.isin(found.train.rows, clean.train.rows).all()


def test_a_run_says_aloud_what_it_commits() -> None:
    assert Faults().line() == ""
    assert Faults(commit=("masked-end", "half-precision")).line() == (
        "faults committed on purpose: masked-end (no loss on end tokens); only declared: half-precision (fp16 computation)"
    )
    with pytest.raises(ConfigError, match="found .*no-such.*expected a list of one of masked-end"):
        Faults(commit=("no-such",))


@pytest.mark.slow
def test_the_tutorials_rows_as_the_tutorial_trained_on_them() -> None:
    """All of guanaco-llama2-1k: two start tokens, no end token with a loss, and every other token with one."""
    settings = DataSettings(data=str(shared_data("guanaco-llama2-1k")), train_on="everything", max_length=1024)
    tokenizer = load_tokenizer(shared_data("llama2-tokenizer"))
    clean = prepare(settings, tokenizer, 0)
    found = prepare(settings, tokenizer, 0, faults=Faults(commit=("masked-end", "double-start")))
    assert found.held_out.fingerprint == clean.held_out.fingerprint
    assert found.train.rows.tolist() == clean.train.rows.tolist()
    for row in found.train:
        assert row.tokens[:2].tolist() == [BOS, BOS] and len(row.tokens) <= 1024
        assert row.trained[1:].tolist() == (row.tokens[1:] != EOS).tolist()
    assert found.report.ended == 0 and clean.report.ended > 900
