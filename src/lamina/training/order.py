"""Which examples make up which optimiser step: a function of (seed, step) alone, so a resumed run is the same run."""

import math
from functools import lru_cache

import numpy as np


def steps_of(examples: int, batch_size: int, epochs: float) -> int:
    """The optimiser steps of so many epochs, the last of them short where the examples do not divide."""
    return max(1, math.ceil(round(examples * epochs) / batch_size))


def rows_of_step(step: int, examples: int, batch_size: int, seed: int, last: int | None = None) -> list[int]:
    """The indices of the examples of step ``step`` (from 0): the next ``batch_size`` of one shuffled epoch after another.

    Args:
        last: how many examples the whole run takes; a last, short step ends there.
    """
    stop = (step + 1) * batch_size if last is None else min((step + 1) * batch_size, last)
    places = range(step * batch_size, stop)
    return [int(shuffled(seed, place // examples, examples)[place % examples]) for place in places]


@lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, examples: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """The order of the examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(examples)
