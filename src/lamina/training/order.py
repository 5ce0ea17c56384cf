"""Which examples make up which optimiser step: a function of (seed, step) alone, so a resumed run is the same run."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Order = Callable[[int, int, int], NDArray[np.int64]]
"""The order of the examples in an epoch, a permutation: a function of (seed, epoch, number of examples)."""


def steps_of(examples: int, batch_size: int, epochs: float) -> int:
    """The optimiser steps of so many epochs, the last of them short where the examples do not divide."""
    return max(1, math.ceil(round(examples * epochs) / batch_size))


@lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, examples: int) -> NDArray[np.int64]:
    """The examples in random order."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def rows_of_step(
    step: int, examples: int, batch_size: int, seed: int, last: int | None = None, order: Order = shuffled
) -> list[int]:
    """The indices of the examples of step ``step`` (from 0): the next ``batch_size`` of one ordered epoch after another.

    Args:
        last: how many examples the whole run takes; a last, short step ends there.
        order: of the examples in an epoch.
    """
    stop = (step + 1) * batch_size if last is None else min((step + 1) * batch_size, last)
    places = range(step * batch_size, stop)
    return [int(order(seed, place // examples, examples)[place % examples]) for place in places]


def by_length(lengths: NDArray[np.int64], batch_size: int) -> Order:
    """The order of ``group_by_length``, a deliberate fault: batches of similar length, so that the loss of a step tells its length."""

    @lru_cache(maxsize=2)
    def ordered(seed: int, epoch: int, examples: int) -> NDArray[np.int64]:
        return grouped(shuffled(seed, epoch, examples), lengths, batch_size)

    return ordered


def grouped(mixed: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    """Brings shuffled examples of similar length together, as ``LengthGroupedSampler`` of transformers does.

    They are cut into blocks of some batches: at least four blocks where there are so many batches, and at most 50 batches a block. Each
    block is sorted, the longest example first, and the longest of all changes places with the first.
    """
    size = batch_size * max(1, min(len(mixed) // (4 * batch_size), 50))
    blocks = [mixed[start : start + size] for start in range(0, len(mixed), size)]
    blocks = [block[np.argsort(-lengths[block], kind="stable")] for block in blocks]
    longest = int(np.argmax([lengths[block[0]] for block in blocks]))
    blocks[0][0], blocks[longest][0] = blocks[longest][0], blocks[0][0]
    return np.concatenate(blocks)
