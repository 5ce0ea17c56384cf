"""The heaviest micro-batches, against packing every step of the run."""

import numpy as np
import pytest
from models import examples

from lamina.data.pack import bins_of, kept_of, pack
from lamina.data.render import Rendered
from lamina.errors import ConfigError
from lamina.training.heaviest import EPOCHS, heaviest, rows_by_step, tokens_of
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
    looked = rows_by_step(lengths, training, 3, order)
    assert [[row for row in rows if row >= 0] for rows in looked.tolist()] == steps
    assert tokens_of(looked, lengths, training) == sum(int(lengths[rows].sum()) for rows in steps)

    found = heaviest(data, lengths, looked, budget)
    first = max((batches[0] for batches in every), key=lambda batch: (len(batch.tokens), batch.supervised))
    assert (len(found.first.tokens), found.first.supervised) == (len(first.tokens), first.supervised)
    assert found.first.lengths == tuple(sorted(found.first.lengths, reverse=True))
    assert (found.later is None) == all(len(batches) == 1 for batches in every)
    if found.later is not None:
        assert len(found.later.tokens) == max(len(batch.tokens) for batches in every for batch in batches[1:])


def test_rows_that_are_all_alike_are_not_all_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = examples(1, shortest=9, longest=9)[0]
    data = [Rendered(row.tokens, np.arange(9) > 2, number) for number in range(4000)]
    packed = []
    monkeypatch.setattr("lamina.training.heaviest.bins_of", lambda *given: packed.append(1) or bins_of(*given))
    lengths = lengths_of(data)
    found = heaviest(data, lengths, rows_by_step(lengths, Training(batch_size=4), 0), 10_000)
    assert len(found.first.tokens) == 4 * 8
    assert len(packed) == 1


ENDLESS = [
    {"steps": 1_000_000_000},
    {"epochs": 1e6},
    {"batch_size": 1_000_000},
    {"batch_size": 1_000_000, "steps": 1_000_000_000},
    {"batch_size": 1_000_000, "epochs": 1e6},
    {"batch_size": 3, "steps": 1_000_000_000},
]


@pytest.mark.parametrize("limits", ENDLESS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_long_run_over_few_rows_is_looked_at_in_a_moment(limits: dict, count: int) -> None:
    """By what is done, not by the clock: a few thousand epochs, and few examples packed."""
    data, training = examples(count, longest=40), Training(**limits)
    lengths, asked = lengths_of(data), []

    def order(seed: int, epoch: int, rows: int) -> np.ndarray:
        asked.append(epoch)
        return shuffled(seed, epoch, rows)

    looked = rows_by_step(lengths, training, 0, order)
    assert len(asked) <= EPOCHS and looked.size <= max(1_000_000, EPOCHS * count)
    found = heaviest(data, lengths, looked, 4096)
    every = training.total_steps(count) * training.batch_size if training.steps else round(count * training.epochs)
    tokens = tokens_of(looked, lengths, training)
    if count == 1 and not every % training.batch_size:
        assert tokens == every * int(lengths[0])
    assert tokens == pytest.approx(every * lengths.mean(), rel=0.01 if every > count else 0)
    inputs = sum(min(every, training.batch_size) // count * kept_of(example) for example in data)
    assert len(found.first.tokens) <= 4096
    if inputs <= 4096:
        assert len(found.first.tokens) >= inputs
    else:
        assert len(found.first.tokens) > 4096 - 40


def test_a_batch_that_is_larger_than_the_run_is_as_large_as_the_run() -> None:
    data = examples(5)
    assert rows_by_step(lengths_of(data), Training(batch_size=1_000_000), 0).shape == (1, 5)


@pytest.mark.parametrize("limits", [{"steps": 10**10}, {"epochs": 1e12}, {"epochs": 1e300}, {"batch_size": 10**9}])
def test_what_no_run_reaches_is_refused(limits: dict) -> None:
    with pytest.raises(ConfigError, match=r"expected an? (integer|number) .* and ≤ 1,000,000"):
        Training(**limits)
