"""Examples → batches: examples one after another on one axis, without padding.

``lengths`` tells attention where examples end, so none sees another. Targets are shifted here and nowhere else: input
``i`` predicts token ``i + 1``. Inputs after an example's last target would be computed for nothing and are left out.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lamina.data.render import Rendered
from lamina.errors import DataError
from lamina.ops.loss import IGNORED


@dataclass(frozen=True)
class Batch:
    """Several examples on one axis of N inputs.

    Args:
        tokens: the inputs, int64 [N].
        targets: the token that each input predicts, or -100, int64 [N].
        position: place in its own example, from 0, int64 [N].
        lengths: inputs of each example; their sum is N.
        rows: the row each example came from.
        real_tokens: tokens of the examples before inputs without use were left out.
        real_lengths: the same for each example.
    """

    tokens: Tensor
    targets: Tensor
    position: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    real_tokens: int
    real_lengths: tuple[int, ...] = ()

    @property
    def supervised(self) -> int:
        """Targets that count in the loss."""
        return int((self.targets != IGNORED).sum())


def pack(examples: Sequence[Rendered], budget: int) -> list[Batch]:
    """Packs examples into batches of at most ``budget`` inputs, the heaviest batch first.

    Best fit, in decreasing length: each example goes where the least room is left over, into a new batch where it fits
    nowhere. One that is longer than the budget has a batch of its own. Equal input gives equal batches.

    Raises:
        DataError: an example without any token to learn.
    """
    kept = [kept_of(example) for example in examples]
    return [
        _batch([examples[index] for index in members], [kept[index] for index in members])
        for members in bins_of(kept, budget)
    ]


def bins_of(kept: Sequence[int], budget: int) -> list[list[int]]:
    """Which examples, of so many inputs each, ``pack`` brings together; the heaviest batch first."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(kept)), key=lambda index: (-kept[index], index)):
        place = bisect.bisect_left(room, (kept[index], -1))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = budget, len(bins)
            bins.append([])
        bins[number].append(index)
        bisect.insort(room, (left - kept[index], number))
    bins.sort(key=lambda members: (-sum(kept[index] for index in members), members[0]))
    return bins


def kept_of(example: Rendered) -> int:
    """Inputs of an example up to the one that predicts its last target: as many as that target's index.

    Raises:
        DataError: an example without any token to learn.
    """
    trained = np.flatnonzero(example.trained)
    if not len(trained) or not trained[-1]:
        raise DataError(f"row {example.row}: nothing to learn, expected at least one trained token after the first")
    return int(trained[-1])


def _batch(examples: list[Rendered], kept: list[int]) -> Batch:
    tokens = [example.tokens[:length] for example, length in zip(examples, kept, strict=True)]
    targets = [
        np.where(example.trained[1 : length + 1], example.tokens[1 : length + 1], IGNORED)
        for example, length in zip(examples, kept, strict=True)
    ]
    return Batch(
        tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        position=torch.cat([torch.arange(length) for length in kept]),
        lengths=tuple(kept),
        rows=tuple(example.row for example in examples),
        real_tokens=sum(len(example.tokens) for example in examples),
        real_lengths=tuple(len(example.tokens) for example in examples),
    )
