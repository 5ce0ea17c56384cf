"""Low-rank adapters: W·x becomes W·x + s·B·A·x at chosen linears, with W frozen (Hu et al. 2021, arXiv:2106.09685).

``attach`` replaces leaves of the model; the model itself knows nothing of it. Which leaves, and with which rank and alpha,
is PEFT's language, so that a file written on either side means the same on the other.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lamina.errors import AdapterError, ConfigError
from lamina.model.decoder import Decoder
from lamina.model.quantised import Linear, device_of, form_of, linears_of, replace
from lamina.ops.dropout import Dropout
from lamina.ops.lora import Projection, Update, project
from lamina.section import section

ALL_LINEAR = "all-linear"


@section
class LoRA:
    """The adapter: where it is laid, and how wide it is."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank R of the update s·B·A: each adapted matrix gets R·(inputs + outputs) trainable numbers."""

    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by s = alpha/rank. The default learning rate is meant for alpha = 32, at any rank."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that are zeroed at random in training."""

    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Which linears are adapted: all-linear (all seven of every layer), names such as q_proj, or regular expressions
    that match the end of a module's path."""

    layers: Annotated[str, Field(pattern=r"^(all|\d+(-\d+)?(,\d+(-\d+)?)*)$")] = "all"
    """Which layers are adapted, counted from 0, ends included: all, 16-31, or 0,1,30-31."""

    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Other ranks for some modules: name or regular expression = rank; the first that matches counts."""

    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other alphas for some modules: name or regular expression = alpha."""

    rslora: bool = False
    """Rank-stabilised scaling, s = alpha/√rank (Kalajdzievski 2023, arXiv:2312.03732)."""

    def rank_of(self, path: str) -> int:
        """The rank at the module of this path."""
        return next((rank for pattern, rank in self.rank_pattern.items() if matches(pattern, path)), self.rank)

    def scale_of(self, path: str) -> float:
        """The scale s at the module of this path."""
        alpha = next((alpha for pattern, alpha in self.alpha_pattern.items() if matches(pattern, path)), self.alpha)
        rank = self.rank_of(path)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def matches(pattern: str, path: str) -> bool:
    """Whether a name or regular expression matches the end of a module's path, after a dot or from its start.

    This is how PEFT reads the keys of its rank and alpha patterns.
    """
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


class AdaptedLinear(nn.Module):
    """A frozen linear with a low-rank update beside it; A and B are fp32 masters, used in the activations' dtype.

    Attributes:
        strength: factor on the update, 1 as trained; 0 is exactly the base.
        narrow: A and B in the activations' dtype, for as long as they do not change (``narrowed``).
    """

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout, self.strength = base, scale, dropout, 1.0
        self.narrow: tuple[Tensor, Tensor] | None = None
        device = device_of(base)
        self.a = nn.Parameter(torch.zeros(rank, base.in_features, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))
        self.train(base.training)  # on a model in evaluation mode there is no dropout

    def projection(self) -> Projection:
        """What the linear computes, with a call of dropout of its own; where its strength is 0, the base alone.

        Another kind of adapter, with a ``forward`` of its own, returns None: then it is called by itself (``decoder.together``).
        """
        frozen = Projection(form_of(self.base), self.base.bias)
        if self.strength == 0.0:
            return frozen
        a, b = (self.narrow if not torch.is_grad_enabled() else None) or (self.a, self.b)
        dropout = Dropout.drawn(self.dropout) if self.training and self.dropout else None
        return frozen._replace(update=Update(a, b, self.scale * self.strength, dropout))

    def forward(self, x: Tensor) -> Tensor:  # [N, in] -> [N, out]
        return project(x, self.projection())[0]


def attach(model: Decoder, lora: LoRA, seed: int = 0) -> dict[str, AdaptedLinear]:
    """Lays an adapter over the model: A drawn as PEFT draws it, uniform in ±1/√inputs, and B zero.

    Each A is a function of (seed, path), whatever else is adapted.

    Returns:
        The adapted modules by their path, in the model's order.

    Raises:
        AdapterError: the model has an adapter already.
        ConfigError: a target or layer matches nothing, a pattern is no regular expression, or a rank exceeds a matrix.
    """
    if adapted(model):
        raise AdapterError("this model already carries an adapter; detach it before laying on another")
    linears = linears_of(model)
    chosen = choose(model, lora)
    modules = {}
    for path in chosen:
        modules[path] = AdaptedLinear(linears[path], lora.rank_of(path), lora.scale_of(path), lora.dropout)
        generator = torch.Generator().manual_seed(_seed(seed, path))
        bound = 1 / math.sqrt(linears[path].in_features)  # kaiming_uniform with a = √5, PEFT's default
        drawn = torch.empty(modules[path].a.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            modules[path].a.copy_(drawn)
        replace(model, path, modules[path])
    return modules


def detach(model: Decoder) -> None:
    """Takes the adapter off again: the model is the untouched base."""
    for path, module in adapted(model).items():
        replace(model, path, module.base)


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted modules of a model by their path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


@contextlib.contextmanager
def adapter_scale(model: nn.Module, strength: float) -> Iterator[None]:
    """Runs a block with the update multiplied by ``strength``: 0 for the base, 1 as trained."""
    modules = list(adapted(model).values())
    before = [module.strength for module in modules]
    for module in modules:
        module.strength = strength
    try:
        yield
    finally:
        for module, strength_before in zip(modules, before, strict=True):
            module.strength = strength_before


@contextlib.contextmanager
def narrowed(model: Decoder) -> Iterator[None]:
    """Runs a block in which A and B do not change: without gradients they are cast to the activations' dtype once, and not for
    every token."""
    modules = list(adapted(model).values())
    for module in modules:
        module.narrow = module.a.detach().to(model.vocabulary.dtype), module.b.detach().to(model.vocabulary.dtype)
    try:
        yield
    finally:
        for module in modules:
            module.narrow = None


def choose(model: Decoder, lora: LoRA) -> list[str]:
    """The paths of the linears that an adapter is laid on, in the model's order.

    Raises:
        ConfigError: a target or layer matches nothing, a pattern is no regular expression, or a rank exceeds a matrix.
    """
    linears, layers = linears_of(model), model.architecture.layers
    problems = [
        f"{setting}: {pattern!r} is no regular expression ({error})"
        for setting in ("targets", "rank_pattern", "alpha_pattern")
        for pattern in getattr(lora, setting)
        if (error := _broken(pattern))
    ]
    if problems:
        raise ConfigError("adapter." + "; adapter.".join(problems))
    wanted = layers_of(lora.layers, layers)
    in_layer = {path: linears[path] for path in linears if int(path.split(".")[2]) in wanted}
    leaves = sorted({path.rsplit(".", 1)[1] for path in linears})
    for setting in ("targets", "rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, setting):
            if pattern != ALL_LINEAR and not any(matches(pattern, path) for path in in_layer):
                problems.append(
                    f"adapter.{setting}: {pattern!r} matches no linear of the model, whose names are {', '.join(leaves)}"
                )
    chosen = [
        path for path in in_layer if any(target == ALL_LINEAR or matches(target, path) for target in lora.targets)
    ]
    sides = {path: min(linears[path].out_features, linears[path].in_features) for path in chosen}
    if too_wide := [path for path in chosen if lora.rank_of(path) > sides[path]]:
        least = min(too_wide, key=lambda path: sides[path])
        problems.append(
            f"adapter.rank: found {lora.rank_of(least)}, expected at most {sides[least]}, the smaller side of {least} "
            f"({len(too_wide)} of {len(chosen)} matrices are too small)"
        )
    if problems:
        raise ConfigError("; ".join(problems))
    if not chosen:
        raise ConfigError("adapter.targets: found nothing to adapt; name at least one linear, or all-linear")
    return chosen


def layers_of(text: str, layers: int) -> list[int]:
    """The layers that a setting such as ``0,1,30-31`` means.

    Raises:
        ConfigError: a layer the model does not have, or a range that runs backwards.
    """
    if text == "all":
        return list(range(layers))
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not int(first) <= int(last or first) < layers:
            raise ConfigError(
                f"adapter.layers: found {part!r}, expected layers between 0 and {layers - 1}, in rising order"
            )
        chosen.update(range(int(first), int(last or first) + 1))
    return sorted(chosen)


def _broken(pattern: str) -> str | None:
    try:
        re.compile(pattern)
        matches(pattern, "")  # within a larger expression no pattern may begin with flags
    except re.error as error:
        return str(error)
    return None


def _seed(seed: int, path: str) -> int:
    """A seed for this path: the same on every machine and in every version of Python."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "big") >> 1
