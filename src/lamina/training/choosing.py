"""What the plan may choose: how a step is cut and how much is computed twice. Neither changes the result of a step.

In the order of what they cost: the largest micro-batch without recomputation; then as few recomputed layers as fit, at a
micro-batch that still keeps GEMMs busy; then smaller micro-batches. With dropout the cut decides which numbers are drawn, so
there it is the last resort.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lamina.training.plan import Plan

BUSY = 4096
"""Tokens of a micro-batch from which on larger ones gain next to nothing on a dense base."""

LARGEST = {"cpu": BUSY, "cuda": 16_384}
"""Tokens of a micro-batch at most: on a GPU, larger ones share one dequantisation of the base among more tokens."""


@dataclass(frozen=True)
class Choice:
    """Tokens of a micro-batch, and how many layers are computed twice."""

    tokens: int
    checkpointed: int


def candidates(device: str, longest: int, layers: int, dropout: bool) -> Iterator[Choice]:
    """All choices, the best first.

    Args:
        longest: tokens of the longest example; a smaller micro-batch does not make it shorter.
    """
    top = max(LARGEST[device], longest)
    floor = max(BUSY, longest)
    if dropout:
        top = floor
    size = top
    while size > floor:
        yield Choice(size, 0)
        size = max(floor, size // 2)
    for checkpointed in range(layers + 1):
        yield Choice(floor, checkpointed)
    size = floor // 2
    while size >= longest:
        yield Choice(size, layers)
        size //= 2
    if floor > longest:
        yield Choice(longest, layers)


def choose(choices: Iterator[Choice], planned: Callable[[Choice], Plan], available: int) -> tuple[Choice, Plan, bool]:
    """The first choice whose plan fits, else the one that needs least.

    Returns:
        The choice, its plan, and whether it fits.
    """
    least: tuple[Choice, Plan] | None = None
    for choice in choices:
        found = planned(choice)
        if found.total <= available:
            return choice, found, True
        if least is None or found.total < least[1].total:
            least = choice, found
    assert least is not None, "there is a choice"
    return *least, False
