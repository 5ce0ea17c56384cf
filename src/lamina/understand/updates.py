"""The updates of an adapter in numbers, each in its place in the model, and the losses of lower ranks."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lamina.understand.alignment import Relation

ENOUGH = 0.01
"""Share of the improvement over the base that a lower rank may lose and still have done."""


def powers(rank: int) -> list[int]:
    """1, 2, 4, … below a rank."""
    return [1 << n for n in range(rank.bit_length()) if 1 << n < rank]


@dataclass(frozen=True)
class Update:
    """The update of one matrix.

    Attributes:
        layer: the path up to the number of the layer; empty for what is in none.
        module: what it is in its layer.
        rank: as trained; ``numerical_rank`` is how many singular values are not zero.
        scale: s in s·B·A.
        norm: ‖ΔW‖ (Frobenius).
        singular_values: of s·B·A, falling.
        relation: the update beside its base; None where no base was given.
    """

    name: str
    layer: str
    module: str
    shape: tuple[int, int]
    rank: int
    numerical_rank: int
    scale: float
    norm: float
    effective_rank: float
    stable_rank: float
    singular_values: tuple[float, ...]
    relation: Relation | None = None

    def energy(self, rank: int) -> float:
        """Squared norm of the best approximation of this rank."""
        return sum(value * value for value in self.singular_values[:rank])


@dataclass(frozen=True)
class Ranks:
    """Held-out losses of the base, of the adapter, and of the adapter truncated to lower ranks by SVD (rank, loss).

    Attributes:
        rows: on how many rows they were measured, of how many that were ``held_out``.
    """

    base: float
    adapter: float
    truncated: tuple[tuple[int, float], ...]
    rows: int = 0
    held_out: int = 0

    @property
    def enough(self) -> int | None:
        """The smallest rank that loses at most ``ENOUGH`` of the improvement over the base; None where there is none."""
        gain = self.base - self.adapter
        limit = self.adapter + ENOUGH * gain
        return next((rank for rank, loss in self.truncated if loss <= limit), None) if gain > 0 else None


def places(paths: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Layer and module of each path: the part up to the first number, and the rest without further numbers.

    The module is named by its last word where that tells the modules of a layer apart.
    """
    found = {}
    for path in paths:
        parts = path.split(".")
        number = next((n for n, part in enumerate(parts) if part.isdecimal()), -1)
        rest = ".".join(part for part in parts[number + 1 :] if not part.isdecimal())
        found[path] = (".".join(parts[: number + 1]), rest)
    modules = {module for _, module in found.values()}
    leaves = [module.rpartition(".")[2] for module in modules]
    if len(set(leaves)) == len(leaves):
        found = {path: (layer, module.rpartition(".")[2]) for path, (layer, module) in found.items()}
    return found


def grouped(key: str, updates: Iterable[Update]) -> dict[str, list[Update]]:
    """The updates by ``layer`` or ``module``, in their order."""
    groups: dict[str, list[Update]] = {}
    for update in updates:
        groups.setdefault(getattr(update, key), []).append(update)
    return groups


def squares(updates: Iterable[Update]) -> float:
    """‖ΔW‖² of them all."""
    return sum(update.norm**2 for update in updates)


def cell_of(updates: Sequence[Update]) -> dict[str, float | None]:
    """A cell of the map; experts share one, so norms are added in squares and effective ranks averaged."""
    size = sum(update.relation.size**2 for update in updates if update.relation) ** 0.5
    norm = squares(updates) ** 0.5
    return {
        "norm": norm,
        "relative": norm / size if size else None,
        "effective_rank": statistics.mean(update.effective_rank for update in updates),
    }
