"""What an adapter is, in numbers and in words: how large, of what rank, where it sits, and which rank would have done."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lamina.understand.alignment import EPSILON
from lamina.understand.updates import ENOUGH, Ranks, Update, cell_of, grouped, powers, squares

KEPT = 0.99
"""Share of the squared norm at which a rank is named, where there is no held-out loss to judge by."""

EXTREMES = 5
"""Matrices that are listed as most and as least changed."""

Table = tuple[str, list[str], list[list[str]]]
"""A heading, the names of the columns, and the rows."""


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found out.

    Attributes:
        base: the folder of the base that it was compared with; None where none was given.
        ranks: where a run was explained; None otherwise, and ``not_measured`` says why.
    """

    adapter: str
    base: str | None
    updates: tuple[Update, ...]
    ranks: Ranks | None = None
    not_measured: str = ""

    @property
    def rank(self) -> int:
        """The largest rank of a matrix, as trained."""
        return max(update.rank for update in self.updates)

    @property
    def nothing(self) -> bool:
        """Whether the adapter changes nothing: every B·A is zero."""
        return not any(update.norm for update in self.updates)

    def energy(self, rank: int) -> float:
        """Share of the squared norm of the whole update that is left when every matrix is truncated to this rank."""
        total = squares(self.updates)
        return sum(update.energy(rank) for update in self.updates) / total if total else 1.0

    def shares(self, key: str) -> dict[str, float]:
        """Shares of the squared norm by ``module`` or ``layer``."""
        total = squares(self.updates)
        return {name: squares(some) / total if total else 0.0 for name, some in grouped(key, self.updates).items()}

    def lines(self) -> list[str]:
        """The findings in sentences."""
        scales = sorted({update.scale for update in self.updates})
        ranks = sorted({update.rank for update in self.updates})
        said = [
            f"{self.adapter}: rank {_range(ranks)}, scale {_range(scales)}, in {len(self.updates)} matrices"
            + (f", beside {self.base}" if self.base else "")
        ]
        if self.nothing:
            return [
                *said,
                "this adapter changes nothing: B·A is zero in every matrix, as before the first step of training",
            ]
        effective = [update.effective_rank for update in self.updates if update.norm]
        said.append(
            f"effective rank {statistics.mean(effective):.1f} on average ({min(effective):.1f} to {max(effective):.1f}): "
            "the update is spread as over so many equal directions"
        )
        if len(effective) < len(self.updates):
            said.append(f"{len(self.updates) - len(effective)} of the matrices are not changed at all")
        said.append(
            f"where the update sits (shares of ‖ΔW‖²): {_largest(self.shares('module'))}; "
            f"{_largest(_short(self.shares('layer')))}"
        )
        return said + self._relations() + self._rank_lines()

    def tables(self) -> list[Table]:
        """The map of the model, its extremes, and the losses of lower ranks."""
        if self.nothing:
            return []
        return [self._map(), self._extremes(), *([self._losses()] if self.ranks else [])]

    def as_json(self) -> dict[str, Any]:
        """The findings for machines."""
        ranks = [*powers(self.rank), self.rank]
        cells = [
            {"layer": layer, "module": module, **cell_of(some)}
            for layer, row in grouped("layer", self.updates).items()
            for module, some in grouped("module", row).items()
        ]
        return {
            "adapter": self.adapter,
            "base": self.base,
            "rank": self.rank,
            "changes_nothing": self.nothing,
            "norm": squares(self.updates) ** 0.5,
            "shares": {"module": self.shares("module"), "layer": self.shares("layer")},
            "energy": [{"rank": rank, "share": self.energy(rank)} for rank in ranks],
            "map": cells,
            "ranks": None if self.ranks is None else self._ranks_json(self.ranks),
            "not_measured": self.not_measured or None,
            "matrices": [asdict(update) for update in self.updates],
        }

    def _ranks_json(self, ranks: Ranks) -> dict[str, Any]:
        losses = [{"rank": rank, "loss": loss} for rank, loss in ranks.truncated]
        return {
            "base_loss": ranks.base,
            "adapter_loss": ranks.adapter,
            "truncated": losses,
            "enough": ranks.enough,
            "rows": ranks.rows,
            "held_out_rows": ranks.held_out,
        }

    def _relations(self) -> list[str]:
        found = [(update, update.relation) for update in self.updates if update.relation]
        if not found:
            return []
        sizes = [(relation.relative, update.name) for update, relation in found if relation.relative is not None]
        factors = [relation.amplification for _, relation in found if relation.amplification is not None]
        said = []
        if sizes and factors:
            said.append(
                f"‖ΔW‖/‖W‖: median {statistics.median(size for size, _ in sizes):.2%}, largest {max(sizes)[0]:.2%} in "
                f"{max(sizes)[1]}; along its own directions the update is {statistics.median(factors):.3g} times what W does "
                "(median)"
            )
        both = [relation for _, relation in found]
        estimated = sum(not relation.exact for relation in both)
        left, right = (statistics.mean(getattr(relation, side) for relation in both) for side in ("left", "right"))
        chance = [statistics.mean(r.directions / u.shape[side] for u, r in found) for side in (0, 1)]
        said.append(
            f"W's leading directions hold {left:.1%} of what the update writes ({chance[0]:.1%} by chance) and {right:.1%} of "
            f"what it reads ({chance[1]:.1%} by chance)" + (", estimated" if estimated else "")
        )
        where = sum(relation.intruders > 0 for relation in both)
        said.append(
            f"intruder dimensions: {'at most ' if estimated and where else ''}{sum(r.intruders for r in both)} of "
            f"{sum(r.top for r in both)}, in {where} matrices (leading left singular vectors of W+ΔW whose cosine with every one "
            f"of W is below {EPSILON:g}; Shuttleworth et al. 2024)"
        )
        if estimated:
            said.append(
                f"of {estimated} large matrices only W's leading directions were found, by iteration: their intruders are a count "
                "from above; --exact decomposes them fully"
            )
        return said

    def _rank_lines(self) -> list[str]:
        lower = powers(self.rank)
        fits = next((rank for rank in [*lower, self.rank] if self.energy(rank) >= KEPT), self.rank)
        said = [
            f"rank {fits} keeps {self.energy(fits):.1%} of ‖ΔW‖²"
            + (f", rank 1 {self.energy(1):.1%}" if fits > 1 else "")
        ]
        if self.ranks is None:
            return [*said, f"no held-out loss at lower ranks: {self.not_measured}"] if self.not_measured else said
        ranks = self.ranks
        where = f" on {ranks.rows} of {ranks.held_out} rows" if ranks.rows < ranks.held_out else ""
        before = f"held-out loss{where} {ranks.base:.4f} of the base, {ranks.adapter:.4f} of the adapter"
        if ranks.adapter >= ranks.base:
            return [*said, f"{before}: it does not improve on the base, so no rank can be said to do"]
        if ranks.enough is None:
            return [*said, f"{before}: none of the lower ranks tried would have done; it uses its rank {self.rank}"]
        loss = dict(ranks.truncated)[ranks.enough]
        return [
            *said,
            f"{before}: rank {ranks.enough} would have done, truncated to it the loss is {loss:.4f}, within {ENOUGH:.0%} of the "
            "improvement",
        ]

    def _map(self) -> Table:
        modules = list(grouped("module", self.updates))
        rows = []
        for layer, row in grouped("layer", self.updates).items():
            cells = {module: cell_of(some) for module, some in grouped("module", row).items()}
            rows.append([_number(layer) or "-", *(_shown(cells.get(module)) for module in modules)])
        size = "‖ΔW‖/‖W‖" if self.base else "‖ΔW‖"
        return f"{size} and effective rank, layer × module", ["layer", *modules], rows

    def _extremes(self) -> Table:
        def size(update: Update) -> float:
            return update.norm if update.relation is None else update.relation.relative or 0.0

        ordered = sorted(self.updates, key=size, reverse=True)
        chosen = ordered if len(ordered) <= 2 * EXTREMES else ordered[:EXTREMES] + ordered[-EXTREMES:]
        columns = [
            "matrix",
            "‖ΔW‖",
            "effective rank",
            "stable rank",
            "rank",
            *(["‖ΔW‖/‖W‖", "intruders"] if self.base else []),
        ]
        return "the most and the least changed matrices", columns, [_row(update) for update in chosen]

    def _losses(self) -> Table:
        assert self.ranks is not None
        rows = [["base", "0.0%", f"{self.ranks.base:.4f}"]]
        rows += [[str(rank), f"{self.energy(rank):.1%}", f"{loss:.4f}"] for rank, loss in self.ranks.truncated]
        rows.append([f"{self.rank} (as trained)", "100.0%", f"{self.ranks.adapter:.4f}"])
        return "the adapter truncated to lower ranks", ["rank", "share of ‖ΔW‖²", "held-out loss"], rows


def _shown(cell: dict[str, float | None] | None) -> str:
    if cell is None:
        return ""
    size = f"{cell['norm']:.3g}" if cell["relative"] is None else f"{cell['relative']:.2%}"
    return f"{size} · {cell['effective_rank']:.1f}"


def _row(update: Update) -> list[str]:
    row = [
        update.name,
        f"{update.norm:.4g}",
        f"{update.effective_rank:.1f}",
        f"{update.stable_rank:.1f}",
        str(update.rank),
    ]
    if (relation := update.relation) is not None:
        row.append("-" if relation.relative is None else f"{relation.relative:.2%}")
        row.append(f"{'' if relation.exact or not relation.intruders else '≤ '}{relation.intruders}")
    return row


def _number(layer: str) -> str:
    stack, _, number = layer.rpartition(".")
    return number if stack in ("model.layers", "") else layer


def _short(shares: dict[str, float]) -> dict[str, float]:
    return {f"layer {_number(layer)}" if layer else "outside the layers": share for layer, share in shares.items()}


def _largest(shares: dict[str, float]) -> str:
    """The three largest shares, in words."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in itertools.islice(ordered, 3))


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
