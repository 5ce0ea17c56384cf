"""What a replay says of its variants: sentences made from numbers, and nothing that chance could have made."""

import json

import pytest

from lamina.evaluation import Answer
from lamina.report.page import Points
from lamina.report.replay import UNFINISHED, Entry, as_json, lines, page, rows, sentence
from lamina.understand.beside import Outcome, Row

COUNT = 40


def entry(
    name: str, loss: float = 1.0, stopped: float = 1.0, exact: float = 0.9, says: str = "own", **facts: float
) -> Entry:
    """A variant on 40 rows of 4 tokens; the losses alternate around their mean."""
    made = tuple(Row(n, 4 * loss * (1.1 if n % 2 else 0.9), 0.5, 4) for n in range(COUNT))
    answers = tuple(
        Answer(n, f"ask {n}", "right", "right" if n < exact * COUNT else f"{says} {n}", n < stopped * COUNT, 5)
        for n in range(COUNT)
    )
    return Entry(name, "what it is", Outcome(made, answers), {"survived": 1.0, "relative": 0.1, **facts})


MENDED = entry("mended", supervised_tokens=1000.0, waves=0.02)
SEED = entry("other-seed", loss=1.05, exact=0.8)


def said(one: Entry, *others: Entry) -> str:
    return sentence(one, [MENDED, SEED, *others, one])


def test_what_goes_beyond_chance_is_told() -> None:
    assert said(entry("masked-end", loss=1.5, stopped=0.1, exact=0.0)) == (
        "answers that end by themselves fall from 100.0% to 10.0%; answers that are the data's word for word fall from 90.0% to 0.0%; "
        "the held-out loss rises from 1.0000 to 1.5000"
    )


def test_what_another_seed_does_too_is_not() -> None:
    assert (
        said(entry("double-start", loss=1.04, exact=0.85))
        == "no effect on the answers beyond chance, on 40 held-out rows"
    )
    assert said(SEED).startswith(
        "answers that are the data's word for word fall from 90.0% to 80.0%"
    )  # it is the measure of chance


def test_what_the_run_shows_is_told() -> None:
    low = said(entry("low-rate", survived=0.31, relative=1e-3))
    assert low.endswith("its update is 1.0e-03 of the weights, and 31% of it is left in bf16")
    assert "moves in waves, the order of the lengths (neighbouring steps correlate by 0.55, by 0.02" in said(
        entry("x", waves=0.55)
    )
    assert "trained on 900 tokens with a loss instead of 1,000" in said(entry("x", supervised_tokens=900.0))
    assert said(entry("x", supervised_tokens=1010.0, waves=0.1)).startswith("no effect")


def test_answers_that_are_still_the_bases_are_counted() -> None:
    base = entry("base", exact=0.0, says="story")
    assert "75% of its answers are the untouched base's, word for word" in said(
        entry("x", exact=0.25, says="story"), base
    )
    assert "untouched" not in said(entry("x", exact=0.0), base)


def test_what_was_not_measured_is_told_with_its_reason_and_a_merge_with_its_numbers() -> None:
    told = Entry("half-precision", "fp16 computation", reason="not committed: because")
    facts = {"kl": 0.02, "kl_seen": 1e-6, "tokens": 253, "loss_merged": 1.1, "loss_trained": 1.0}
    merged = Entry("other-merge-base", "merged elsewhere", facts=facts)
    assert said(told) == "not committed: because"
    assert "2.0e-02 nats a token" in said(merged) and "is 1.1000, before the merge 1.0000" in said(merged)
    assert rows([told])[0] == ("half-precision", *["-"] * 6)


def test_a_replay_that_has_just_begun_is_told_too() -> None:
    base = entry("base")
    assert lines([base]) == ["base (what it is): the held-out loss is 1.0000"]
    assert [one["name"] for one in as_json([base])] == ["base"]


def test_entries_survive_the_way_through_their_file() -> None:
    written = json.loads(json.dumps(as_json([MENDED, SEED, Entry("told", "x", reason="because")])))
    assert [Entry.of_json(one) for one in written] == [MENDED, SEED, Entry("told", "x", reason="because")]
    loss = written[1]["difference"]["loss"]
    assert loss[0] > 0 and loss[1] <= loss[0] <= loss[2]


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_did_not_finish_is_no_fault_that_was_not_committed() -> None:
    ended = Entry("masked-end", "no loss on end tokens", reason=f"{UNFINISHED}step 3: the loss is not finite")
    told = Entry("half-precision", "fp16 computation", reason="not committed: because")
    made = page("A", [], [MENDED, SEED, ended, told], "job")
    points = {s.title: block.items for s in made.sections for block in s.blocks if isinstance(block, Points)}
    assert points == {
        "What did not finish, and why": [("warning", "masked-end: no loss on end tokens", [ended.reason])],
        "What was not committed, and why": [("note", "half-precision: fp16 computation", [told.reason])],
    }
    leads = {s.title: s.lead for s in made.sections}
    assert leads["The numbers"].startswith("Every trained row has a folder of its own")


def test_the_page_shows_text_of_models_as_text() -> None:
    bad = entry("masked-end", exact=0.0, stopped=0.0, says="<script>alert(1)</script> {{7*7}}")
    html = page("A", [("base", "<b>")], [MENDED, SEED, bad, Entry("told", "x", reason="because")], "job").html()
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt; {{7*7}} 0 …" in html
    assert html.count("<svg") == 2 and "because" in html
    plain = Entry("mended", "x", Outcome(MENDED.outcome.rows if MENDED.outcome else (), ()), {})
    assert page("A", [], [plain], "job").html().count("<svg") == 1  # nothing was asked
