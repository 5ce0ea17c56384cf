"""The sentences of the outcome: what a run learnt, forgot and changed, in words that its numbers bear."""

import math
from pathlib import Path
from typing import Any

import pytest
from kept_run import card, dump, explanation, plain, write_kept

from lamina.report.chapters.outcome import answering, forgetting, learning, updating
from lamina.report.chapters.words import fine_percent, lasting
from lamina.report.forms import Card, Explanation
from lamina.report.kept import Kept, read_kept
from lamina.reporting import report


def kept(tmp_path: Path) -> Kept:
    return read_kept(write_kept(tmp_path / "run"))


@pytest.mark.parametrize(
    ("before", "after", "change", "said"),
    [
        (3.0, 0.6, [-2.4, -2.6, -2.2], "It learnt: on 900 held-out answer tokens the loss fell from 3.000 to 0.600"),
        (3.0, 2.98, [-0.02, -0.03, -0.01], "It learnt very little: "),
        (3.0, 2.98, [-0.02, -0.05, 0.01], "that cannot be told from no change, so nothing measurable was learnt"),
        (3.0, 3.5, [0.5, 0.4, 0.6], "It became worse: on 900 held-out answer tokens the loss rose from 3.000 to 3.500"),
        (3.0, 3.0, None, "nothing measurable was learnt"),
        (3.0, 2.0, None, "It learnt: on 900 held-out answer tokens the loss fell from 3.000 to 2.000"),
        (3.0, math.nan, None, "nothing measurable was learnt"),
    ],
)
def test_whether_it_learnt(before: float, after: float, change: Any, said: str, tmp_path: Path) -> None:
    made = card("a", 60)
    made["base"]["held_out"]["loss"], made["adapter"]["held_out"]["loss"] = before, after
    made["difference"] = {} if change is None else {"held_out.loss": change}
    assert said in plain(learning(Card(**made), kept(tmp_path)))


@pytest.mark.usefixtures("undrawn")
def test_a_change_that_is_sure_and_shows_nowhere(tmp_path: Path) -> None:
    """A rate of 1e-9 moves the loss by 1e-7 on every row alike: sure, and nothing that was learnt."""
    made = card("a", 2)
    made["base"]["held_out"]["loss"], made["adapter"]["held_out"]["loss"] = 3.0, 2.9999997
    made["difference"] = {"held_out.loss": [-3e-7, -4e-7, -2e-7]}
    made["kl"] = {"neutral": {"mean": 4.6e-9, "interval": None, "tokens": 255}}
    assert learning(Card(**made), kept(tmp_path)) == (
        "Next to nothing was learnt: on 900 held-out answer tokens the loss stayed at 3.000 nats per token (a change of −3.0e−07)."
    )
    assert "by less than 0.0001 nats per token (KL)" in forgetting(Card(**made))
    dump(tmp_path / "run" / "card.json", made)
    text = plain(report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "+0.000 [+0.000, +0.000]" in text and "−0.000" not in text


def test_a_lower_loss_with_worse_guesses_is_not_called_learning(tmp_path: Path) -> None:
    """A rate far too high flattens all predictions: the loss of what the base found very unlikely falls, and nothing is guessed."""
    made = card("a", 60)
    made["adapter"]["held_out"] |= {"loss": 2.5, "accuracy": 0.1}
    made["difference"] = {"held_out.loss": [-0.5, -0.6, -0.4], "held_out.accuracy": [-0.4, -0.5, -0.3]}
    said = plain(learning(Card(**made), kept(tmp_path)))
    assert said.startswith("The loss fell, but the predictions became worse: ")
    assert said.endswith("the right one is the first guess at 10 % of them instead of 50 %.")


def test_whether_it_stops() -> None:
    made = card("a", 60)
    assert "75 % end by themselves (base 75 %): many do not, so the end token was not learnt" in plain(
        answering(Card(**made))
    )
    made["adapter"]["answers"] |= {"stop_rate": 1.0, "mean_tokens": 8.4, "exact_match": None}
    assert plain(answering(Card(**made))) == (
        "Of its 12 answers to held-out prompts 100 % end by themselves (base 75 %); they are 8 tokens long on average (base 12)."
    )


@pytest.mark.parametrize(
    ("perplexity", "change", "said"),
    [
        (10.2, None, "Little was forgotten: the perplexity of neutral text went from 10 to 10.2 (+2.0 %)"),
        (11.0, None, "Something was forgotten: "),
        (13.0, [0.2, 0.1, 0.3], "Much was forgotten: "),
        (13.0, [0.2, -0.1, 0.3], "Nothing measurable was forgotten: "),
        (9.0, [-0.1, -0.2, -0.05], "Nothing was forgotten that the neutral text would show: "),
        (math.nan, [math.nan] * 3, "Much was forgotten: the perplexity of neutral text went from 10 to nan, for "),
    ],
)
def test_what_was_forgotten(perplexity: float, change: Any, said: str) -> None:
    made = card("a", 60)
    made["base"]["neutral"]["perplexity"], made["adapter"]["neutral"]["perplexity"] = 10.0, perplexity
    made["difference"] = {} if change is None else {"neutral.loss": change}
    assert plain(forgetting(Card(**made))).startswith(said)


def test_neutral_text_that_says_little() -> None:
    made = card("a", 60)
    made |= {"kl": {"neutral": {"mean": 0.4, "interval": None, "tokens": 255}}, "difference": {}}
    made["base"]["neutral"]["perplexity"], made["adapter"]["neutral"]["perplexity"] = 10.0, 9.0
    assert plain(forgetting(Card(**made))).endswith(
        "(−10.0 %), but on it the two models differ by 0.4 nats per token (KL)."
    )
    made["base"]["neutral"]["perplexity"] = 4.6e6
    assert forgetting(Card(**made)).startswith(
        "What was forgotten is not known: the base itself cannot read the neutral text; "
    )
    made["base"]["neutral"]["perplexity"], made["adapter"]["neutral"]["perplexity"] = 2.7, 946.0
    assert "(+34,937 %)" in plain(forgetting(Card(**made)))
    made["base"]["neutral"]["perplexity"], made["adapter"]["neutral"]["perplexity"] = math.nan, 10.0
    assert forgetting(Card(**made)).startswith("What was forgotten is not known: ")


def test_what_the_update_is() -> None:
    found = explanation(3, 8)
    found["ranks"]["enough"] = 2
    assert "rank 2 would have done, losing at most 1 % of the improvement" in plain(updating(Explanation(**found)))
    assert "improvement on the 7 rows that it was measured on" in plain(
        updating(Explanation(**found | {"ranks": found["ranks"] | {"rows": 7, "held_out_rows": 160}}))
    )
    close = found["ranks"] | {"enough": None, "adapter_loss": found["ranks"]["base_loss"] - 1e-6}
    assert "no rank can be said to do" in updating(Explanation(**found | {"ranks": close}))
    found["ranks"] |= {"enough": None, "adapter_loss": 4.0}
    assert "would have done" not in updating(Explanation(**found))
    assert updating(Explanation(**found | {"changes_nothing": True})).startswith("The adapter changes nothing")


def test_where_the_update_is() -> None:
    """Two of seven matrices with a seventh each are not most of it."""
    found = explanation(3, 8)
    said = plain(updating(Explanation(**found)))
    assert ". The largest parts of it, by squared norm, are in q_proj (14 %) and k_proj (14 %), and" in said
    found["shares"]["module"] = {"v_proj": 0.4, "q_proj": 0.6}
    said = plain(updating(Explanation(**found)))
    assert ". All of it, by squared norm, is in q_proj (60 %) and v_proj (40 %), and" in said


@pytest.mark.parametrize(
    ("value", "said"), [(0.34, "34 %"), (0.0013, "0.13 %"), (1.3e-8, "less than 0.001 %"), (0.0, "0 %")]
)
def test_small_shares(value: float, said: str) -> None:
    assert plain(fine_percent(value)) == said


def test_a_short_time_has_its_tenths() -> None:
    assert [plain(lasting(seconds)) for seconds in (0.49, 9.96, 78.0)] == ["0.5 s", "10 s", "1 min 18 s"]
