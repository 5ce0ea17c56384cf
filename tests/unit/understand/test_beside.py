"""A tuned model beside its base, row by row: against the definitions, and against the evaluation that keeps no rows."""

import json
import math

import numpy as np
import pytest
import torch
from models import examples, logits, tiny
from torch import nn

from lamina.adapter import LoRA, adapter_scale, attach
from lamina.data.render import Rendered
from lamina.evaluation import Answer, Evaluating, evaluate
from lamina.understand.beside import MEASURES, Outcome, Row, changes, outcome

NOTHING = Evaluating(eval_samples=0)


def tuned():
    model = tiny()
    for module in attach(model, LoRA(rank=2)).values():
        nn.init.normal_(module.b, std=0.05)
    return model


def answer(row: int, stopped: bool, tokens: int = 3) -> Answer:
    return Answer(row, "a", "b", "b" if stopped else "c", stopped, tokens)


def test_loss_and_distance_are_the_definitions() -> None:
    model, rows = tuned(), examples(5)
    found = outcome(model, rows, None, set(), NOTHING, 40)
    assert [row.row for row in found.rows] == [row.row for row in rows]
    for row, measured in zip(rows, found.rows, strict=True):
        places = np.flatnonzero(row.trained) - 1
        with torch.no_grad():
            q = logits(model, torch.from_numpy(row.tokens.astype(np.int64))).double().log_softmax(1)[places]
            with adapter_scale(model, 0.0):
                p = logits(model, torch.from_numpy(row.tokens.astype(np.int64))).double().log_softmax(1)[places]
        targets = torch.from_numpy(row.tokens[row.trained].astype(np.int64))
        assert measured.tokens == len(targets)
        # fp32 logits of about 1 with 96 entries: an error of some 2^-24 a term, in sums of at most 24 tokens.
        assert measured.loss == pytest.approx(float(-q.gather(1, targets[:, None]).sum()), abs=1e-4)
        assert measured.kl == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-4)
    assert found.measures["loss"] == pytest.approx(
        evaluate(model, rows, 40).loss, rel=1e-12
    )  # sums in float64, in another order
    assert found.measures["kl"] is not None and found.measures["kl"] > 0


def test_a_model_without_an_adapter_is_its_own_base() -> None:
    found = outcome(tiny(), examples(3), None, set(), NOTHING, 40)
    assert found.measures["kl"] == 0
    assert [found.measures[name] for name in ("stop_rate", "exact_match", "mean_tokens")] == [None] * 3


def test_a_change_is_the_difference_of_what_is_shown_with_the_cards_interval() -> None:
    before = Outcome(tuple(Row(n, 4.0, 0.0, 2) for n in range(8)), tuple(answer(n, True) for n in range(8)))
    after = Outcome(
        tuple(Row(n, 4.0 + n % 2, 1.0, 2) for n in range(8)), tuple(answer(n, n < 2, 3 + n) for n in range(8))
    )
    found = changes(before, after)
    assert tuple(found) == MEASURES
    for name, of in found.items():
        assert of.difference == pytest.approx(after.measures[name] - before.measures[name])  # type: ignore[operator]
    # Differences a token are 0 and 0.5 in turn: mean 0.25, deviation 0.25, over 8 rows; a bootstrap's ends are multiples of 1/16.
    half = 1.96 * 0.25 / math.sqrt(8)
    assert found["loss"].difference_interval == pytest.approx((0.25 - half, 0.25 + half), abs=1 / 16)
    assert found["kl"].difference_interval == (0.5, 0.5)
    assert found["stop_rate"].difference == -0.75 and found["mean_tokens"].difference == 3.5
    same = changes(before, before)["stop_rate"]  # all agree on eight rows, which leaves others possible
    assert same.difference == 0 and same.difference_interval is not None
    assert same.difference_interval[0] < 0 <= same.difference_interval[1]
    assert tuple(changes(before, Outcome(after.rows, ()))) == ("loss", "kl")


def test_pieces_of_a_row_count_as_one_row() -> None:
    cut = Outcome((Row(1, 3.0, 0.0, 2), Row(1, 3.0, 0.0, 4), Row(2, 1.0, 0.0, 1)), ())
    assert {row: sums.tolist() for row, sums in cut.losses().items()} == {1: [6.0, 0.0, 6.0], 2: [1.0, 0.0, 1.0]}
    assert cut.measures["loss"] == 1.0
    shorter = Outcome((Row(1, 4.0, 0.0, 2), Row(2, 1.0, 0.0, 1), Row(3, 9.0, 0.0, 1)), ())  # asked otherwise, and more
    assert changes(cut, shorter)["loss"].difference == pytest.approx(5 / 3 - 1)


def test_an_outcome_survives_the_way_through_its_file() -> None:
    found = Outcome((Row(1, 3.0, 0.5, 2),), (answer(1, True),))
    written = found.as_json()
    assert Outcome.of_json(json.loads(json.dumps(written))) == found
    assert (written["loss"], written["stop_rate"], written["exact_match"]) == (1.5, 1.0, 1.0)


def test_rows_keep_their_order_whatever_the_batches() -> None:
    rows = [Rendered(row.tokens, row.trained, 9 - place) for place, row in enumerate(examples(6))]
    found = [outcome(tuned(), rows, None, set(), NOTHING, budget).rows for budget in (1, 1000)]
    assert [[row.row for row in one] for one in found] == [[9, 8, 7, 6, 5, 4]] * 2
    assert [row.loss for row in found[0]] == pytest.approx([row.loss for row in found[1]], abs=1e-4)
