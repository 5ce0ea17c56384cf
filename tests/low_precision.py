"""Forms of a frozen weight to test, and slow, obviously right emulations of their products."""

from typing import TypeVar

import torch
from torch import Tensor

from lamina.ops.fp8 import Fp8
from lamina.ops.int8 import Int8

SMALLEST = 1e-30
FP32 = 2.0**-24  # half a unit in the last place, relative
UNIT = {torch.float32: FP32, torch.bfloat16: 2.0**-8}
Form = TypeVar("Form", Int8, Fp8)


class Poisoned:
    """One growing buffer, of NaN in every floating type from each call on: what an earlier call gave is lost."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def __call__(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = numel * dtype.itemsize
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        return self.buffer.fill_(0xFF)[:size].view(dtype)


def made(form: type[Form], weight: Tensor, dtype: torch.dtype = torch.float32) -> Form:
    """A form on its way from the ``meta`` device to holding ``weight``."""
    with torch.device("meta"):
        empty = form(*weight.shape, dtype, scratch=Poisoned())
    filled = empty.to_empty(device=weight.device)
    filled.store(weight)
    return filled


def largest_of_rows(wide: Tensor) -> Tensor:
    return wide.abs().amax(1, keepdim=True).clamp_min(SMALLEST)


def int8_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of rows in fp32, and their scales."""
    largest = largest_of_rows(wide)
    return (wide * (127 / largest)).round().long(), largest / 127


def fp8_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of e4m3 nearest to rows in fp32, in float64 and from the definition of the type, and their scales."""
    largest = largest_of_rows(wide)
    values = (wide * (448 / largest)).double()
    exponent = values.abs().clamp_min(2.0**-6).log2().floor()
    step = 2.0 ** (exponent - 3)
    return ((values / step).round() * step).clamp(-448, 448), largest / 448


def operands(form: Int8 | Fp8, x: Tensor, back: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both sides of a product as whole numbers or float64, exactly, and the scales of rows and columns, fp32."""
    rows = int8_rows if isinstance(form, Int8) else fp8_rows
    codes = form.codes.long() if isinstance(form, Int8) else form.codes.double()
    left, scale = rows(x.float() * form.scale if back else x.float())
    return left, codes if back else codes.t(), scale, torch.ones(1) if back else form.scale[None]


def emulated(form: Int8 | Fp8, x: Tensor, *, back: bool = False, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product in float64 from the same quantised operands, and the sum of the magnitudes of its terms."""
    left, right, scale, factors = operands(form, x, back)
    both = scale.double() * factors.double()
    terms = (left.abs() @ right.abs()) * both
    out = (left @ right) * both
    return out if bias is None else out + bias.double(), terms


def sample(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, bias, gradient; W as a view that is not contiguous."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(inputs, outputs).t() / inputs**0.5
    return x, weight, torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)


def same_order(form: Int8, x: Tensor, *, back: bool = False, bias: Tensor | None = None) -> Tensor:
    """Sums of int64, then the roundings of the form, one by one."""
    left, right, scale, factors = operands(form, x, back)
    out = (left @ right).float() * scale * factors
    return (out if bias is None else out + bias.float()).to(x.dtype)
