"""What moves the adapter: AdamW with decoupled decay and its forms in less memory, the rate's default, and its schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import unwrap
from typing import Literal

import torch
from torch import Tensor, nn

from lamina.errors import ConfigError

Schedule = Literal["constant", "linear", "cosine"]
Kind = Literal["adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit"]


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


def check_pages(kind: Kind, device: torch.device) -> None:
    """Refuses a paged form where there are no pages.

    Raises:
        ConfigError: the adapter would not be on a GPU, whose unified memory a paged form needs.
    """
    if kind.startswith("paged") and device.type != "cuda":
        raise ConfigError(
            f"train.optimizer: found {kind} on {device.type}, but pages live in CUDA's unified memory; expected adamw or adamw8bit"
        )


class AdamW(torch.optim.AdamW):
    """torch's AdamW without its decorators: they load torch's compiler, for a second, only to tell it that it must not compile these."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def adamw(
    kind: Kind, parameters: Iterable[nn.Parameter], weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); the rate is set before every step.

    Raises:
        ConfigError: a paged form where the parameters are not on a GPU, whose unified memory it needs.
    """
    parameters = list(parameters)
    if kind == "adamw":
        return AdamW(parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    check_pages(kind, parameters[0].device)
    from lamina.ops.library import bitsandbytes

    bits, paged = 8 if kind.endswith("8bit") else 32, kind.startswith("paged")
    made: torch.optim.Optimizer = bitsandbytes().optim.AdamW(
        parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, optim_bits=bits, is_paged=paged
    )
    return made


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an optimiser that has made a step remembers of a parameter, but for the number of steps."""
    constant = {"step", "qmap1", "qmap2"}  # the maps are those of all parameters
    return {name: value for name, value in optimizer.state[parameter].items() if name not in constant}


def remember(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Makes room for the moments of an optimiser that is to go on after ``step`` steps; they are to be filled in."""
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            state = optimizer.state[parameter]
            if isinstance(optimizer, torch.optim.AdamW):
                state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                state["step"] = torch.tensor(float(step), device=parameter.device)  # where the fused kernel wants it
            else:
                optimizer.init_state(group, parameter, number, place)  # type: ignore[attr-defined]
                state["step"] = step


def relative_update(steps: int, rate: float, schedule: Schedule, warmup: float, shape: "Shape") -> float:
    """Estimates ‖ΔW‖/‖W‖ that a run can reach at most: AdamW moves an entry of B by about the rate in a step.

    ΔW = s·B·A with |B| ≤ Σ rates and A uniform in ±1/√D, so an entry of ΔW is about s·Σ rates·√(R/3D). What of it
    rounding leaves is told by ``ops.rounding``: in bf16, where half a unit is 2⁻⁹ of a weight, two thirds at 1.5e-3, half at 1e-3.
    """
    points = min(steps, 4096)  # the shape of a longer schedule is no finer
    moved = rate * steps / points * sum(rate_factor(step, points, schedule, warmup) for step in range(points))
    return shape.scale * moved * math.sqrt(shape.rank / (3 * shape.inputs)) / shape.weight


@dataclass(frozen=True)
class Shape:
    """What of an adapted matrix decides how large its update can get; ``weight`` is the root mean square of W."""

    scale: float
    rank: int
    inputs: int
    weight: float
