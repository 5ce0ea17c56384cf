"""The heaviest micro-batches that a run will meet, found before its first step: which rows a step takes is known beforehand.

What a step can weigh at most follows from the lengths of its rows alone, for all steps at once; only steps that could be
heavier than the heaviest found so far are packed in earnest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from lamina.data.pack import Batch, pack
from lamina.training.loop import Examples, Training
from lamina.training.order import Order, shuffled

PLACES = 10_000_000
"""Examples that are looked at, those of the first steps; beyond, a run meets the same rows in other company."""

STEPS = 500
"""Steps that are packed at most: reached only where what follows the last target differs between rows that are equally long."""


@dataclass(frozen=True)
class Heaviest:
    """The heaviest micro-batch of a run, and the heaviest of those that follow another one in their step."""

    first: Batch
    later: Batch | None


def rows_by_step(
    lengths: NDArray[np.int64], training: Training, seed: int, order: Order = shuffled
) -> NDArray[np.int64]:
    """The rows of each step, [steps, batch size]; -1 where a last step is short."""
    count, size = len(lengths), training.batch_size
    total = training.total_steps(count) * size
    last = total if training.steps else min(total, max(1, round(count * training.epochs)))
    places = min(last, PLACES // size * size or size)
    epochs = [order(seed, epoch, count) for epoch in range(-(-places // count))]
    rows = np.concatenate(epochs)[:places]
    return np.concatenate([rows, np.full(-len(rows) % size, -1)]).reshape(-1, size)


def tokens_of(lengths: NDArray[np.int64], training: Training, seed: int, order: Order = shuffled) -> int:
    """Tokens of all steps."""
    rows = rows_by_step(lengths, training, seed, order)
    counted = int(np.where(rows >= 0, lengths[rows], 0).sum())
    return counted * training.total_steps(len(lengths)) // len(rows)


def heaviest(
    examples: Examples,
    lengths: NDArray[np.int64],
    training: Training,
    seed: int,
    budget: int,
    order: Order = shuffled,
) -> Heaviest:
    """Finds the heaviest micro-batches of a run with so many tokens in a micro-batch.

    Args:
        lengths: tokens of every example.
        training: how many examples make up a step, and how many steps there are.
        order: of the examples in an epoch.
    """
    rows = rows_by_step(lengths, training, seed, order)
    sizes = np.where(rows >= 0, lengths[rows] - 1, 0)  # the last token predicts nothing
    most = np.maximum(sizes.max(1), np.minimum(sizes.sum(1), budget))  # of the step's heaviest micro-batch
    first: Batch | None = None
    later: Batch | None = None
    for step in islice(_falling(most), STEPS):
        if first is not None and len(first.tokens) >= most[step]:
            break
        batches = pack([examples[int(row)] for row in rows[step] if row >= 0], budget)
        first = _heavier(first, batches[0])
        later = _heavier(later, batches[1]) if len(batches) > 1 else later
    assert first is not None, "a run has a step"
    return Heaviest(first, later)


def _falling(values: NDArray[np.int64]) -> Iterator[int]:
    return (int(place) for place in np.argsort(-values, kind="stable"))


def _heavier(one: Batch | None, other: Batch) -> Batch:
    """The one with more inputs, and with more targets where they are equal."""
    if one is None or (len(other.tokens), other.supervised) > (len(one.tokens), one.supervised):
        return other
    return one
