"""Linears whose frozen weight is stored in another form than its numbers. The decoder knows nothing of it: its leaves are replaced."""

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn

from lamina.model.decoder import Decoder
from lamina.ops.fourbit import FourBit, four_bit_bytes
from lamina.ops.fp8 import Fp8, fp8_bytes
from lamina.ops.frozen import Dense, Frozen, Quantised, Scratch, SharedBuffer
from lamina.ops.int8 import Int8, int8_bytes
from lamina.ops.lora import Projection, project

Base = Literal["nf4", "fp4", "int8", "fp8"]
"""The forms of a frozen weight beside the plain ones."""

APPROXIMATE: tuple[Base, ...] = ("int8", "fp8")
"""Forms that round the activations too, and so the products themselves; the others only store W rounded."""


class QuantisedLinear(nn.Module):
    """A frozen linear, y = x·Wᵀ + b, with W in a stored form; the bias is a parameter as in ``nn.Linear``."""

    def __init__(self, form: Quantised, outputs: int, inputs: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.form, self.out_features, self.in_features, self.bias = form, outputs, inputs, bias

    def projection(self) -> Projection:
        """What the linear computes, for an op that takes several."""
        return Projection(self.form, self.bias)

    def forward(self, x: Tensor) -> Tensor:  # [N, in] -> [N, out]
        return project(x, self.projection())[0]


Linear = nn.Linear | QuantisedLinear


def quantised_of(model: nn.Module) -> list[QuantisedLinear]:
    """The linears of a model whose weight is stored in another form."""
    return [module for module in model.modules() if isinstance(module, QuantisedLinear)]


def form_of(linear: Linear) -> Frozen:
    """The weight of a linear, whatever its form."""
    return linear.form if isinstance(linear, QuantisedLinear) else Dense(linear.weight)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's numbers are."""
    return next(tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors)


def linears_of(model: Decoder) -> dict[str, Linear]:
    """The linears of the layers by their path; the head is none of them."""
    named = model.model.named_modules(prefix="model")
    return {path: module for path, module in named if isinstance(module, Linear)}


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of the one at ``path``."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def quantise_leaves(
    model: Decoder, base: Base, double: bool, dtype: torch.dtype, only: Collection[str] | None = None
) -> None:
    """Replaces the linears of the layers of a model on the ``meta`` device; their forms have shapes and no contents yet.

    Args:
        only: paths of the linears that are replaced; nothing means all.
        double: whether the scales of 4-bit blocks are quantised too.
        dtype: in which the model computes.
    """
    scratch = SharedBuffer()
    for path, linear in linears_of(model).items():
        if only and path not in only:
            continue
        outputs, inputs = linear.out_features, linear.in_features
        with torch.device("meta"):
            form = new_form(base, outputs, inputs, double, dtype, scratch)
        replace(model, path, QuantisedLinear(form, outputs, inputs, linear.bias))


def form_bytes(base: Base, double: bool, outputs: int, inputs: int) -> int:
    """Bytes of a weight in a form."""
    if base == "int8":
        return int8_bytes(outputs, inputs)
    return fp8_bytes(outputs, inputs) if base == "fp8" else four_bit_bytes(outputs, inputs, double)


def new_form(base: Base, outputs: int, inputs: int, double: bool, dtype: torch.dtype, scratch: Scratch) -> Quantised:
    """A form with memory for a weight [outputs, inputs], which has no contents yet."""
    if base == "int8":
        return Int8(outputs, inputs, dtype, scratch=scratch)
    if base == "fp8":
        return Fp8(outputs, inputs, dtype, scratch=scratch)
    return FourBit(outputs, inputs, dtype, kind=base, double=double, scratch=scratch)
