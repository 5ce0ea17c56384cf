"""What a merge did, and how we know: matrix by matrix, and on held-out rows against what was trained.

Of every adapted matrix: how large the update is, how far the merged matrix is from the one that base and adapter made in
training, and which share of the update is left after rounding. A weak update can vanish in the rounding, and a base that was
trained on in four bits is another base in sixteen: both show here, in numbers, before anybody wonders about answers.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lamina.understand.difference import CLEAR, SAME_CHOICE, SAME_KL, Difference

SURVIVED = 0.5
"""Mean share of the update, of which less means that it was not merged: most of it was rounded away, and the error that rounding
made instead, about 0.8 of the update there, is larger than what is left. In bf16 it is reached at ‖ΔW‖/‖W‖ of about 1e-3."""

Policy = Literal["original", "dequantised", "requantised"]

SAID: dict[Policy, str] = {
    "original": "added to the weights as they are stored",
    "dequantised": "added to the weights that training saw, made dense again",
    "requantised": "added, and the sum quantised in the form of the base",
}


@dataclass(frozen=True)
class Matrix:
    """What merging did to one matrix; W is what training saw, ΔW = s·B·A, W' what was written."""

    name: str
    relative: float
    """‖ΔW‖/‖W‖, Frobenius norms."""
    error: float
    """‖W' - (W + ΔW)‖/‖W‖: how far the merged matrix is from what base and adapter make together."""
    survived: float
    """Share of the update that is left: ⟨W' - W₀, ΔW⟩/‖ΔW‖² with W₀ the merged matrix of no update; 1 when nothing is lost."""

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[2])


@dataclass(frozen=True)
class MergeRecord:
    """What was written and what was proved; also in ``lamina_merge.json`` beside the weights."""

    folder: Path
    adapter: str
    policy: Policy
    base: str
    """The form in which training kept the base: nf4, …, or the dtype of plain numbers."""
    matrices: tuple[Matrix, ...]
    difference: Difference | None
    not_compared: str = ""
    """Why there is no difference."""

    @property
    def survived(self) -> float:
        """Mean over the matrices of the share of the update that survived."""
        return statistics.fmean(matrix.survived for matrix in self.matrices)

    @property
    def rounded_away(self) -> bool:
        """Whether most of the update is not in the merged model; where the adapter does little, both may answer alike all the same."""
        return self.survived < SURVIVED

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """A head and a row for each layer: medians over its matrices, and the matrix of which least survived."""
        layers: dict[int, list[Matrix]] = {}
        for matrix in self.matrices:
            layers.setdefault(matrix.layer, []).append(matrix)
        head = ("layer", "matrices", "‖ΔW‖/‖W‖", "error/‖W‖", "survived", "least survived")
        return head, [_row(layer, members) for layer, members in layers.items()]

    def lines(self) -> list[str]:
        """The record in sentences."""
        largest = max(self.matrices, key=lambda matrix: matrix.relative)
        weakest = min(self.matrices, key=lambda matrix: matrix.survived)
        farthest = max(self.matrices, key=lambda matrix: matrix.error)
        said = [
            f"merged {self.adapter} into {len(self.matrices)} matrices, {self.policy} ({SAID[self.policy]}): {self.folder}",
            f"largest update: {100 * largest.relative:.3g} % of the norm of {largest.name}",
            f"share of the update that survived rounding: {self.survived:.1%} on average, {weakest.survived:.1%} in {weakest.name}",
            f"farthest from base + adapter: {100 * farthest.error:.3g} % of the norm of {farthest.name}",
        ]
        compared = [f"not compared: {self.not_compared}"] if self.difference is None else self.difference.lines()
        return said + compared + self.advice()

    def advice(self) -> list[str]:
        """What to do about an update that was rounded away, and about a merged model that answers otherwise for another reason."""
        differs = self.difference is not None and not self.difference.same
        if not self.rounded_away:
            return [self._otherwise()] if differs else []
        mend = (
            "merge with --policy dequantised, or use the adapter beside its base"
            if self.policy == "requantised"
            else "use the adapter beside its base, or train with a higher learning rate, a larger alpha or more steps; or merge into a "
            "copy of the base that is stored in fp32 (lamina.merge with changes={'model': FOLDER, 'revision': None}), and load it in fp32"
        )
        said = f"most of the update was rounded away: {self.survived:.1%} of it survived, expected at least {SURVIVED:.0%}; {mend}"
        seen_otherwise = self.base in ("int8", "fp8") or (self.policy == "original" and self.base in ("nf4", "fp4"))
        return [said, self._otherwise()] if differs and seen_otherwise else [said]

    def _otherwise(self) -> str:
        """What to do about a merged model that answers otherwise, by what makes it do so."""
        if self.policy == "requantised":
            return "the sum was rounded to four bits anew: merge with --policy dequantised, or use the adapter beside its base"
        if self.base in ("int8", "fp8"):
            return f"training over {self.base} rounds what is multiplied too, a plain model does not: perplexities say what that is worth"
        if self.policy == "original" and self.base in ("nf4", "fp4"):
            return f"training saw the base in {self.base}, and this is another one: merge with --policy dequantised"
        return (
            "look at the matrices of which little survived, in lamina_merge.json; where much was rounded away, use the adapter "
            "beside its base, or merge into a copy of the base that is stored in fp32"
        )

    def as_json(self) -> dict[str, Any]:
        """The record for machines, with the limits of its verdicts."""
        return {
            "adapter": self.adapter,
            "policy": self.policy,
            "base": self.base,
            "survived": self.survived,
            "rounded_away": self.rounded_away,
            "difference": None if self.difference is None else self.difference.as_json(),
            "not_compared": self.not_compared or None,
            "advice": self.advice(),
            "limits": {
                "survived_at_least": SURVIVED,
                "kl_below": SAME_KL,
                "clear_agreement_at_least": SAME_CHOICE,
                "clear_above_nats": CLEAR,
            },
            "matrices": [asdict(matrix) for matrix in self.matrices],
        }


def _row(layer: int, members: Sequence[Matrix]) -> tuple[str, ...]:
    relative, error, survived = (
        statistics.median(getattr(matrix, name) for matrix in members) for name in ("relative", "error", "survived")
    )
    weakest = min(members, key=lambda matrix: matrix.survived)
    least = f"{weakest.survived:.1%} {weakest.name.rsplit('.', 1)[1]}"
    return str(layer), str(len(members)), f"{relative:.2e}", f"{error:.2e}", f"{survived:.1%}", least
