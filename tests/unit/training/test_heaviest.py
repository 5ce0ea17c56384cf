"""The heaviest micro-batches, against packing every step of the run."""

import numpy as np
import pytest
from models import examples

from lamina.data.pack import pack
from lamina.data.render import Rendered
from lamina.training.heaviest import heaviest, rows_by_step, tokens_of
from lamina.training.loop import Training
from lamina.training.order import by_length, rows_of_step, shuffled


def lengths_of(data: list[Rendered]) -> np.ndarray:
    return np.array([len(example.tokens) for example in data])


@pytest.mark.parametrize("limits", [{"epochs": 1.0}, {"epochs": 2.5}, {"steps": 7}, {"steps": 40}, {"epochs": 0.1}])
@pytest.mark.parametrize("budget", [1, 20, 40, 10_000])
@pytest.mark.parametrize("grouped", [False, True])
def test_it_is_the_heaviest_of_all_steps(limits: dict, budget: int, grouped: bool) -> None:
    data, training = examples(37, longest=40), Training(batch_size=4, **limits)
    lengths = lengths_of(data)
    order = by_length(lengths, 4) if grouped else shuffled
    last = None if training.steps else max(1, round(len(data) * training.epochs))
    steps = [rows_of_step(n, len(data), 4, 3, last, order) for n in range(training.total_steps(len(data)))]
    every = [pack([data[row] for row in rows], budget) for rows in steps]
    assert [[row for row in rows if row >= 0] for rows in rows_by_step(lengths, training, 3, order).tolist()] == steps
    assert tokens_of(lengths, training, 3, order) == sum(int(lengths[rows].sum()) for rows in steps)

    found = heaviest(data, lengths, training, 3, budget, order)
    assert len(found.first.tokens) == max(len(batches[0].tokens) for batches in every)
    assert (found.later is None) == all(len(batches) == 1 for batches in every)
    if found.later is not None:
        assert len(found.later.tokens) <= len(found.first.tokens)


def test_rows_that_are_all_alike_are_not_all_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = examples(1, shortest=9, longest=9)[0]
    data = [Rendered(row.tokens, np.arange(9) > 2, number) for number in range(4000)]
    packed = []
    monkeypatch.setattr("lamina.training.heaviest.pack", lambda *given: packed.append(1) or pack(*given))
    found = heaviest(data, lengths_of(data), Training(batch_size=4), 0, 10_000)
    assert len(found.first.tokens) == 4 * 8
    assert len(packed) == 1
