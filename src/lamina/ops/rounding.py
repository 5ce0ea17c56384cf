"""What rounding to a dtype leaves of a change: half its step, and the share of a small update that survives it."""

import torch
from torch import Tensor

NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""The dtypes in which a checkpoint stores plain numbers."""

_WEIGHTS, _CHANGES = 1024, 256  # quantiles that stand for a matrix, and for its update


def half_step(dtype: torch.dtype) -> float:
    """Half the distance of neighbouring numbers, relative to the number at least: 2⁻⁹ in bf16, 2⁻¹² in fp16, 2⁻²⁵ in fp32."""
    return torch.finfo(dtype).eps / 4


def surviving(relative: float, dtype: torch.dtype) -> float:
    """The share of an update ΔW of ‖ΔW‖/‖W‖ = ``relative`` that is left of it in round(W + ΔW): ⟨round(W + ΔW) - W, ΔW⟩/‖ΔW‖².

    W and ΔW are taken to be normally distributed and independent, W to be stored in ``dtype``; both are given by their
    quantiles, so nothing is drawn. In bf16 80 % is left of 2⁻⁹, and 51 % of half of that.
    """
    weight = _normal(_WEIGHTS).to(dtype).double()[:, None]
    change = relative * _normal(_CHANGES)
    written = (weight + change).to(dtype).double() - weight
    return float((written * change).sum() / (_WEIGHTS * change.square().sum()))


def _normal(count: int) -> Tensor:
    """Quantiles of the normal distribution, at the middles of so many equal shares."""
    quantiles: Tensor = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return quantiles
