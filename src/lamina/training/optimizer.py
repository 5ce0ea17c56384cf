"""What moves the adapter: AdamW with decoupled decay, the learning rate's default, and its schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Schedule = Literal["constant", "linear", "cosine"]


def rule_of_thumb(width: int, family: str) -> float:
    """The learning rate to start from for LoRA with alpha = 32: 5e-4·(2000/D)^0.781, for Qwen 5e-4·(2000/D)^0.0775.

    Ten times the rate of full fine-tuning, nearly independent of the rank, with exponents fitted over fourteen Llama and
    Qwen models. For Llama-2-7B, D = 4096, it is 2.9e-4.

    Args:
        width: D, the model's hidden size.
        family: the config's ``model_type``.

    Source: Schulman et al. 2025, "LoRA Without Regret", Thinking Machines; the formula is in tinker-cookbook.
    """
    exponent = 0.0775 if family.startswith("qwen") else 0.781
    return float(5e-4 * (2000 / width) ** exponent)


def rate_factor(step: int, steps: int, schedule: Schedule, warmup: float) -> float:
    """The share of the peak learning rate that step ``step`` (from 0) of ``steps`` takes.

    The first ``warmup``·steps steps rise in a line, the last of them to 1; the rest stays (``constant``), or falls to 0 just
    after the last step in a line (``linear``) or half a cosine (``cosine``).
    """
    rising = math.ceil(round(warmup * steps, 6))  # 0.07 * 100 is a little more than 7
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    if schedule == "constant":
        return 1.0
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def adamw(
    parameters: Iterable[nn.Parameter], weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with fp32 moments; the rate is set before every step."""
    return torch.optim.AdamW(list(parameters), lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def relative_update(steps: int, rate: float, schedule: Schedule, warmup: float, shape: "Shape") -> float:
    """Estimates ‖ΔW‖/‖W‖ that a run can reach at most: AdamW moves an entry of B by about the rate in a step.

    ΔW = s·B·A with |B| ≤ Σ rates and A uniform in ±1/√D, so an entry of ΔW is about s·Σ rates·√(R/3D). Where that is under
    2⁻⁹ of a weight, half a unit of bf16's rounding, merging into bf16 loses most of it.
    """
    moved = rate * sum(rate_factor(step, steps, schedule, warmup) for step in range(steps))
    return shape.scale * moved * math.sqrt(shape.rank / (3 * shape.inputs)) / shape.weight


@dataclass(frozen=True)
class Shape:
    """What of an adapted matrix decides how large its update can get; ``weight`` is the root mean square of W."""

    scale: float
    rank: int
    inputs: int
    weight: float
