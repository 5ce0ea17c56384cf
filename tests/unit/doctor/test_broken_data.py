"""Deliberately broken data sets, each with the finding that must name it; and clean ones, in which nothing is found."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from patients import write_rows
from tiny import write_tiny
from tokens import pieces

from lamina.adapter import LoRA
from lamina.data.examples import DataSettings
from lamina.doctor.checkup import check
from lamina.doctor.finding import Finding
from lamina.job import Job
from lamina.model.weights import ModelSettings
from lamina.training.loop import Training

Rows = list[Any]
# Wide enough that an adapter of rank 8 holds what 500 rows say.
SIZE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": len(pieces()), "max_position_embeddings": 2048}
# Llama-2's template, but that it drops a system prompt.
DROPS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
REWRITES = DROPS.replace(
    "message['content'] + ' [/INST]'",
    "message['content'] + (' (old)' if loop.index0 < loop.length - 2 else '') + ' [/INST]'",
)
TWO_STARTS = DROPS.replace("{{ bos_token + '[INST] '", "{{ '\\n' + bos_token + '[INST] '")
NO_END = DROPS.replace(" + ' ' + eos_token", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("base"), **SIZE)
    pieces(DROPS).save_pretrained(folder)
    return folder


def clean(number: int = 480) -> Rows:
    """Questions and answers without a fault."""
    return [{"question": f"what is {n} and two?", "answer": f"it is {n + 2}, and it was good"} for n in range(number)]


def job_of(base: Path, data: str, training: Training | None = None, lora: LoRA | None = None, **changes: Any) -> Job:
    return Job(
        model=ModelSettings(model=str(base), device="cpu", dtype="fp32"),
        data=DataSettings(data=data, **changes),
        adapter=lora or LoRA(rank=8),
        train=training or Training(),
    )


def found(base: Path, data: str, **changes: Any) -> dict[str, Finding]:
    """The findings by their rules."""
    return {finding.rule: finding for finding in check(job_of(base, data, **changes)).diagnosis.findings}


class Broken(NamedTuple):
    """What breaks 480 clean rows, the finding that must name it, its rows, and settings that it takes."""

    how: Callable[[Rows], Rows]
    rule: str
    grade: str
    rows: tuple[int, ...] = ()
    changes: Mapping[str, Any] = MappingProxyType({})


def put(at: int, row: Any) -> Callable[[Rows], Rows]:
    """Puts a row in the place of another, counted from 1."""
    return lambda rows: [*rows[: at - 1], row, *rows[at:]]


def chat(*contents: str, system: str = "") -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def texts(form: str) -> Callable[[Rows], Rows]:
    return lambda rows: [{"text": form.format(q=row["question"], a=row["answer"])} for row in rows]


BROKEN = {
    "json that ends in its middle": Broken(put(5, '{"question": "what'), "broken-rows", "error", (5,)),
    "a row without an answer": Broken(put(7, {"question": "what?", "answer": " "}), "broken-rows", "error", (7,)),
    "columns of no form": Broken(put(7, {"frage": "what?", "antwort": "four"}), "broken-rows", "error", (7,)),
    "a role that does not exist": Broken(
        put(9, {"messages": [{"role": "narrator", "content": "a"}]}), "broken-rows", "error", (9,)
    ),
    "half of a surrogate pair": Broken(put(3, '{"question": "what", "answer": "a \\ud800 b"}'), "broken-rows", "error", (3,)),
    "a system prompt that the template drops": Broken(
        put(4, chat("what?", "four", system="be brief")), "template-refuses-rows", "error", (4,)
    ),
    "a template that rewrites turns": Broken(
        put(4, chat("what?", "four", "and then?", "five")), "template-refuses-rows", "error", (4,), {"template": REWRITES}
    ),
    "no rows at all": Broken(lambda rows: [], "data", "error"),
    "only blank texts": Broken(lambda rows: [{"text": " "}] * 50, "data", "error"),
    "answers without an end token": Broken(lambda rows: rows, "end-token", "error", tuple(range(1, 481)), {"template": NO_END}),
    "answers cut by the length": Broken(
        put(8, {"question": "what?", "answer": "good " * 90}), "truncation", "warning", (8,), {"max_length": 64}
    ),
    "a prompt that fills the length": Broken(
        put(8, {"question": "good " * 90, "answer": "four"}), "nothing-to-learn", "warning", (8,), {"max_length": 64}
    ),
    "an answer with weight 0": Broken(
        put(6, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}),
        "nothing-to-learn", "warning", (6,),
    ),
    "a blank answer among others": Broken(put(2, chat("a", " ", "b", "it is four, and good")), "empty-answers", "warning", (2,)),
    "an answer of one token": Broken(put(2, {"question": "what is good?", "answer": "the"}), "one-token-answers", "note", (2,)),
    "a book in one cell": Broken(put(11, {"question": "what?", "answer": "good mat " * 900}), "wildly-long-rows", "warning", (11,)),
    "rows that stand there twice": Broken(lambda rows: rows + rows[:40], "repeated-rows", "warning"),
    "a prompt with several answers": Broken(
        lambda rows: [{"question": "what is good?", "answer": f"it is {n}, and a mat"} for n in range(480)],
        "prompt-in-both-splits", "note",
    ),
    "a special token inside a message": Broken(
        put(12, {"question": "what is </s>?", "answer": "it is the end"}), "specials-inside", "warning", (12,)
    ),
    "another script": Broken(
        lambda rows: [{"question": f"{n} なんですか", "answer": f"それは {n} です"} for n in range(480)], "byte-tokens", "warning"
    ),
    "dialogues as plain text": Broken(texts("### Human: {q}### Assistant: {a}"), "dialogue-as-text", "warning"),
    "already written in another form": Broken(
        texts("<s>[INST] {q} [/INST] {a} </s>"), "other-template", "warning", (),
        {"own": DROPS.replace("[INST]", "USER").replace("[/INST]", "ASSISTANT")},
    ),
    "two start tokens from the template": Broken(lambda rows: rows, "double-start", "error", (), {"template": TWO_STARTS}),
    "made for learning preferences": Broken(
        lambda rows: [row | {"chosen": "a", "rejected": "b"} for row in rows], "preference-data", "warning"
    ),
    "a tokenizer of too few ids": Broken(lambda rows: rows, "tokenizer", "error", (), {"vocabulary": 200}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, base: Path, tmp_path: Path) -> None:
    case = BROKEN[name]
    changes = dict(case.changes)
    if template := changes.pop("template", None):
        (tmp_path / "own.jinja").write_text(template, encoding="utf-8")
        changes["template"] = str(tmp_path / "own.jinja")
    if own := changes.pop("own", None):
        base = write_tiny(tmp_path / "base", **SIZE)
        pieces(own).save_pretrained(base)
    if vocabulary := changes.pop("vocabulary", None):
        base = write_tiny(tmp_path / "base", **SIZE | {"vocab_size": vocabulary})
        pieces().save_pretrained(base)
    told = found(base, write_rows(tmp_path / "rows.jsonl", case.how(clean())), **changes)
    assert case.rule in told, sorted(told)
    assert told[case.rule].grade == case.grade
    if case.rows:
        assert told[case.rule].rows == case.rows
    assert all(part for finding in told.values() for part in (finding.found, finding.why, finding.mend))


def test_broken_rows_do_not_hide_the_others(base: Path, tmp_path: Path) -> None:
    """Rows that a run would be refused for are left out, and the rest is examined; each kind of problem is told by itself."""
    rows = clean()
    rows[3], rows[4], rows[5] = "{", "{", {"frage": 1}
    rows[9] = {"question": "what?", "answer": "good mat " * 900}
    told = check(job_of(base, write_rows(tmp_path / "rows.jsonl", rows))).diagnosis.findings
    assert [(f.rule, f.rows) for f in told if f.grade == "error"] == [("broken-rows", (4, 5)), ("broken-rows", (6,))]
    assert "wildly-long-rows" in {finding.rule for finding in told}


def test_broken_rows_do_not_hide_that_the_data_cannot_be_used(base: Path, tmp_path: Path) -> None:
    broken, held = write_rows(tmp_path / "rows.jsonl", [*clean(60), "{"]), tmp_path / "held.jsonl"
    told = found(base, broken, eval_data=str(held))
    assert told["broken-rows"].rows == (61,)
    assert told["data"].found == f"{held}: no such file"
    held.touch()
    assert told["broken-rows"] == found(base, broken, eval_data=str(held))["broken-rows"]
    assert found(base, broken, eval_data=str(held))["data"].found.startswith(f"{held}: the file is empty")
    blank = found(base, write_rows(tmp_path / "blank.jsonl", [*[{"text": " "}] * 50, "{"]))
    assert ": nothing to train on: none of 50 rows" in blank["data"].found and blank["broken-rows"].rows == (51,)


def test_where_all_rows_are_broken_there_is_nothing_else_to_say(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"frage": "what?"}] * 50)
    assert list(found(base, rows)) == ["broken-rows"]
    told = found(base, write_rows(tmp_path / "good.jsonl", clean(60)), eval_data=rows)
    assert "broken-rows" in told and "data" not in told


def test_broken_rows_are_told_by_the_files_that_hold_them(base: Path, tmp_path: Path) -> None:
    good = write_rows(tmp_path / "good.jsonl", clean())
    held = write_rows(tmp_path / "held.jsonl", [*clean(500)[480:], "{"])
    told = found(base, good, eval_data=held)["broken-rows"]
    assert told.found.startswith(f"1 of the rows of {held}: broken JSON") and told.rows == (21,)
    (tmp_path / "many").mkdir()
    many = [write_rows(tmp_path / "many" / f"{n}.jsonl", [{"text": f"it was good {n}"}, "{"]) for n in range(4)]
    told = found(base, str(tmp_path / "many"))["broken-rows"]
    assert told.found.startswith(f"4 of the rows of {', '.join(many[:3])} and 1 more: broken JSON")


def test_rows_of_the_wrong_kind_are_not_read_to_their_end(base: Path, tmp_path: Path) -> None:
    told = found(base, write_rows(tmp_path / "rows.jsonl", [{"frage": "what?"}] * 5000))
    assert list(told) == ["broken-rows"]
    assert len(told["broken-rows"].rows) == 1000


def test_copies_are_told_by_their_rows(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", clean() + clean(40))
    assert found(base, rows, eval_fraction=0.0)["repeated-rows"].rows == tuple(range(481, 521))


def test_copies_are_told_by_their_rows_where_rows_are_cut_into_pieces(base: Path, tmp_path: Path) -> None:
    long = {"text": "cat sat on a mat " * 400}
    other = {"text": "cat sat on a mat " * 400 + "and was good"}  # of pieces that, but for the last, stand in the first
    rows = [long, *[{"text": "it was good"}] * 3, other, long]
    told = found(base, write_rows(tmp_path / "rows.jsonl", rows), long="split", max_length=64, eval_fraction=0.0)
    assert told["repeated-rows"].found.startswith("3 of 6 rows repeat an earlier one (50.0%)")
    assert told["repeated-rows"].rows == (3, 4, 6)


def test_the_share_that_holds_out_enough_is_named(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", clean(1600) + clean(400))  # copies of a row are held out together
    told = found(base, data, eval_fraction=0.002)["few-held-out"]
    assert told.mend == "--eval-fraction 0.0125, or --eval-data FILE"
    assert "few-held-out" not in found(base, data, eval_fraction=0.0125)
    held = write_rows(tmp_path / "held.jsonl", clean(1610)[1600:])
    own = found(base, data, eval_data=held, eval_fraction=0.5)["few-held-out"]
    assert (own.found, own.mend) == ("held out: 10 rows", "--eval-data FILE, with more rows")


def test_pieces_of_held_out_rows_are_not_rows(base: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"{n} and {m} is good" for m in range(120))} for n in range(50)]
    told = found(base, write_rows(tmp_path / "rows.jsonl", rows), long="split", max_length=64)
    assert told["few-held-out"].found == "held out: 2 rows of 50"


def test_own_held_out_rows_that_also_stand_in_training(base: Path, tmp_path: Path) -> None:
    data, held = (
        write_rows(tmp_path / "a.jsonl", clean()),
        write_rows(tmp_path / "b.jsonl", clean(30) + clean(500)[480:]),
    )
    told = found(base, data, eval_data=held)
    assert told["in-both-splits"].found == "30 held-out rows left out, for the same text stands in training"


WORDS = st.sampled_from("the cat sat on a mat and saw that it was good Hello world what is two four brief".split())
SENTENCES = st.lists(WORDS, min_size=4, max_size=12).map(" ".join)


@settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # every example reads 480 rows: shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    pairs=st.lists(st.tuples(SENTENCES, SENTENCES), min_size=4, max_size=8),
    form=st.sampled_from(["pair", "messages", "text"]),
)
@pytest.mark.slow
def test_nothing_is_found_in_clean_data(pairs: list[tuple[str, str]], form: str, base: Path, tmp_path: Path) -> None:
    """Whatever the sentences say: each row tells its number, so that none repeats another."""
    numbered = [(f"{n} {q}?", f"{n} {a}.") for n, (q, a) in enumerate(pairs * (480 // len(pairs) + 1))]
    made = {
        "pair": lambda q, a: {"question": q, "answer": a},
        "messages": lambda q, a: chat(q, a, f"and {q}", f"so {a}"),
        "text": lambda q, a: {"text": f"{q} {a}"},
    }[form]
    assert found(base, write_rows(tmp_path / "rows.jsonl", [made(q, a) for q, a in numbered])) == {}
