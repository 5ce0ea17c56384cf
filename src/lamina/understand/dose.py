"""The dose curve: what the adapter gains and what it costs when its update is taken more or less strongly.

The update s·B·A is multiplied by 0, 0.25, … 1.5, and at each scale two losses are measured: on held-out rows, the task,
and on neutral text, which has nothing to do with it. Between base and fine-tune lies a line of models, and the best trade
is seldom at its end (Wortsman et al. 2022, arXiv:2109.01903; of an update taken at a scale, Ilharco et al. 2023,
arXiv:2212.04089). All scales are measured on the same rows, so the curve's form is more certain than its height.

The knee is the smallest scale with at least ``ENOUGH`` of the largest gain that any scale has over the base: nine tenths of
what there is to gain, at the least cost. Rejected: the point farthest from the chord ("Kneedle", Satopää et al. 2011), which
moves when the curve is measured farther out, and says nothing of how much is gained there.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lamina.adapter import adapter_scale
from lamina.data.render import Rendered
from lamina.data.store import TokenStore
from lamina.evaluation import Scores, evaluate
from lamina.model.decoder import Decoder

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
ENOUGH = 0.9
NO_GAIN = 0.01
"""Nats a token below which a gain has no knee: there is nothing to trade."""


@dataclass(frozen=True)
class Dose:
    """Losses in nats per token at each scale of the adapter; None where one is not finite."""

    scales: tuple[float, ...]
    task: tuple[float | None, ...]
    neutral: tuple[float | None, ...] | None
    knee: float | None
    rows: int
    """Held-out rows on which the task's loss was measured."""

    def line(self) -> str:
        """The knee in a sentence."""
        base, at = self.task[0], dict(zip(self.scales, self.task, strict=True))
        if self.knee is None or base is None:
            return f"dose: at no scale of the adapter is the held-out loss {NO_GAIN} nats below the base's"
        best = min(loss for loss in self.task if loss is not None)
        loss = at[self.knee]
        assert loss is not None, "a knee is at a finite loss"
        said = (
            f"dose: at {self.knee:g} of its strength the adapter has {(base - loss) / (base - best):.0%} of the gain that any "
            f"strength has (loss {loss:.4f} on {self.rows} row{'' if self.rows == 1 else 's'}; at 1: {_said(at[1.0])})"
        )
        if self.neutral is None:
            return said
        neutral = dict(zip(self.scales, self.neutral, strict=True))
        return f"{said}; loss of neutral text there {_said(neutral[self.knee])}, at 0 {_said(neutral[0.0])}, at 1 {_said(neutral[1.0])}"

    def as_json(self) -> dict[str, Any]:
        """The curve for machines."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Known:
    """Rows of one kind, with their scores without the adapter and with it as trained."""

    rows: TokenStore | Sequence[Rendered]
    base: Scores
    adapter: Scores


def dose(model: Decoder, task: Known, neutral: Known | None, portion: int) -> Dose:
    """Measures the curve; scales 0 and 1 are what is known already, and equal the base's and the adapter's scores."""

    def curve(known: Known) -> tuple[float | None, ...]:
        losses = []
        for scale in SCALES:
            if scale in (0.0, 1.0):
                losses.append((known.adapter if scale else known.base).evaluation.loss)
            else:
                with adapter_scale(model, scale):
                    losses.append(evaluate(model, known.rows, portion).loss)
        return tuple(loss if math.isfinite(loss) else None for loss in losses)

    losses = curve(task)
    return Dose(SCALES, losses, None if neutral is None else curve(neutral), knee(SCALES, losses), len(task.rows))


def knee(scales: Sequence[float], losses: Sequence[float | None]) -> float | None:
    """The smallest scale with at least ``ENOUGH`` of the largest gain over the first; None where nothing is gained."""
    base = losses[0]
    if base is None:
        return None
    gains = [-math.inf if loss is None else base - loss for loss in losses]
    if max(gains) < NO_GAIN:
        return None
    return next(scale for scale, gain in zip(scales, gains, strict=True) if gain >= ENOUGH * max(gains))


def _said(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
