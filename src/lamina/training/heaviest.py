"""The heaviest micro-batches that a run will meet, found before its first step: which rows a step takes is known beforehand.

What a step's micro-batches can weigh at most follows from the lengths of its rows alone, for all steps at once; only steps that could
be heavier than the heaviest found so far are packed in earnest. Heavy is what has many inputs, and of as many the more targets.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from lamina.data.pack import Batch, bins_of, kept_of, pack
from lamina.training.loop import Examples, Training
from lamina.training.order import Order, shuffled

PLACES = 10_000_000
"""Examples that are looked at, those of the first steps; beyond, a run meets the same rows in other company."""

EPOCHS = 10_000
"""Epochs that are looked at: of fewer than a thousand rows, so many hold fewer places. A single step that takes more passes than
that goes through these again."""

STEPS = 500
"""Steps that are packed at most, for either: reached only where what follows the last target differs between rows that are equally
long, or where a step is more than a micro-batch."""

EXAMPLES = 64_000
"""Examples that are packed at most: fewer steps of more than 128 examples, and of a step that alone takes more, its first ones."""


@dataclass(frozen=True)
class Heaviest:
    """The heaviest micro-batch of a run, and the heaviest of those that follow another one in their step."""

    first: Batch
    later: Batch | None


def rows_by_step(
    lengths: NDArray[np.int64], training: Training, seed: int, order: Order = shuffled
) -> NDArray[np.int64]:
    """The rows of each step, [steps, examples of a step]; -1 where a last step is short."""
    count, total = len(lengths), training.total_steps(len(lengths)) * training.batch_size
    last = total if training.steps else min(total, max(1, round(count * training.epochs)))
    size = min(training.batch_size, last)  # the only step may be short
    looked = min(PLACES, EPOCHS * count)
    places = min(last, max(size, looked // size * size))
    epochs = [order(seed, epoch, count) for epoch in range(min(-(-places // count), EPOCHS))]
    rows = np.resize(np.concatenate(epochs), places)
    return np.concatenate([rows, np.full(-len(rows) % size, -1)]).reshape(-1, size)


def tokens_of(rows: NDArray[np.int64], lengths: NDArray[np.int64], training: Training) -> int:
    """Tokens of all steps, of which these rows are the first."""
    counted = int(np.where(rows >= 0, lengths[rows], 0).sum())
    return counted * training.total_steps(len(lengths)) // len(rows)


def heaviest(examples: Examples, lengths: NDArray[np.int64], rows: NDArray[np.int64], budget: int) -> Heaviest:
    """Finds the heaviest micro-batches of a run with so many tokens in a micro-batch.

    Args:
        lengths: tokens of every example.
        rows: of each step, as ``rows_by_step`` has them.
    """
    sizes = np.where(rows >= 0, lengths[rows] - 1, 0)  # the last token predicts nothing
    longest, whole = sizes.max(1), sizes.sum(1)
    # At most in a step's heaviest micro-batch, and in the next, if it has one.
    most = np.maximum(longest, np.minimum(whole, budget))
    second = np.where(whole > budget, np.minimum(whole - longest, most), -1)
    known: dict[int, tuple[int, int]] = {}  # inputs and targets of the rows that were met
    cut: dict[int, list[list[int]]] = {}  # the micro-batches of the steps that were
    found = []
    for place, limits in enumerate((most, second)):
        best = _Found()
        for step in islice(_falling(limits), max(1, min(STEPS, EXAMPLES // rows.shape[1]))):
            if best.inputs >= limits[step]:
                break
            taken = [int(row) for row in rows[step, :EXAMPLES] if row >= 0]
            for row in set(taken) - set(known):
                known[row] = kept_of(example := examples[row]), int(np.count_nonzero(example.trained[1:]))
            bins = cut.get(step) or bins_of([known[row][0] for row in taken], budget)
            cut[step] = bins
            if len(bins) > place:
                best = max(best, _found(taken, bins[place], known), key=_Found.weight)
        found.append(_packed(examples, best, budget) if best.rows else None)
    first, later = found
    assert first is not None, "every run has a step"
    return Heaviest(first, later)


@dataclass(frozen=True)
class _Found:
    """A micro-batch: how heavy it is, and its rows."""

    inputs: int = -1
    targets: int = 0
    rows: tuple[int, ...] = ()

    def weight(self) -> tuple[int, int]:
        """By its inputs, and by its targets where they are equal."""
        return self.inputs, self.targets


def _found(taken: list[int], members: list[int], known: Mapping[int, tuple[int, int]]) -> _Found:
    rows = tuple(taken[place] for place in members)
    return _Found(sum(known[row][0] for row in rows), sum(known[row][1] for row in rows), rows)


def _packed(examples: Examples, found: _Found, budget: int) -> Batch:
    (batch,) = pack([examples[row] for row in found.rows], budget)
    return batch


def _falling(values: NDArray[np.int64]) -> Iterator[int]:
    return (int(place) for place in np.argsort(-values, kind="stable"))
