"""A frozen weight in FP8, with both products of training by FP8 GEMMs: W[o,i] ≈ s[o]·q[o,i], q in e4m3.

e4m3 (Micikevicius et al. 2022, arXiv:2209.05433) has three bits of mantissa and reaches 448, so it keeps relative precision
where int8 keeps an absolute one. The arrangement is that of ``lamina.ops.int8``: a scale per output channel of the weight,
found once; a scale per token of what meets it, found every time; and in the backward pass the weight's scales folded into
the gradient before that is quantised, so that one stored weight serves both directions. Forward and backward are both e4m3:
e5m2 is for gradients whose range one scale per tensor cannot hold, and there is one per row here.

The GEMM is ``torch._scaled_mm`` with row-wise scales, on CUDA devices of compute capability 8.9 or later. It takes its
second operand by contiguous columns. The stored rows are the columns of Wᵀ, so the forward pass needs nothing; the backward
pass transposes the bytes into scratch memory, where a second stored weight would double the memory. Everywhere else, and for
widths that are no multiples of 16, the product is emulated: exact products, fp32 sums, one rounding. It says what the numbers
would be, at the speed of fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina import cuda
from lamina.ops.frozen import Scratch
from lamina.ops.int8 import SMALLEST, STORED
from lamina.ops.products import Product, added
from lamina.ops.shapes import Float

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3, which has no infinity."""

FEWEST = 32
"""Rows that the device's GEMM is given at least."""


def fp8_bytes(outputs: int, inputs: int) -> int:
    """The bytes of a weight of this shape: one per element, and an fp32 scale per output."""
    return outputs * inputs + 4 * outputs


class Fp8(nn.Module):
    """A frozen weight [outputs, inputs] as e4m3 with a scale per output; made empty, then filled by ``store``.

    Both are kept as their bits in integer buffers, so that ``module.to(torch.bfloat16)``, which casts every floating buffer
    below it, leaves them alone.

    Args:
        dtype: the compute dtype, in which ``dense`` gives the weight.
        scratch: memory for intermediate results, shared by all weights of a model.
    """

    bits: Tensor
    scale_bits: Tensor
    kind = "fp8"

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype, *, scratch: Scratch) -> None:
        super().__init__()
        self.outputs, self.inputs, self.dtype, self.scratch = outputs, inputs, dtype, scratch
        self.register_buffer("bits", torch.empty(outputs, inputs, dtype=torch.uint8))
        self.register_buffer("scale_bits", torch.empty(outputs, dtype=torch.int32))

    @property
    def codes(self) -> Float[Tensor, "out D"]:
        """q, in e4m3; a view of the buffer."""
        return self.bits.view(E4M3)

    @property
    def scale(self) -> Float[Tensor, " out"]:
        """The scale of each output, fp32; a view of the buffer."""
        return self.scale_bits.view(torch.float32)

    @property
    def nbytes(self) -> int:
        """The bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def store(self, weight: Float[Tensor, "out D"]) -> None:
        """Quantises a weight into the buffers: |W - s·q| is at most 2⁻⁴·|W|, or s·2⁻¹⁰ where q is subnormal."""
        if weight.shape != self.bits.shape:
            raise ValueError(f"found a weight {list(weight.shape)}, expected {list(self.bits.shape)}")
        parts = zip(weight.split(STORED), self.codes.split(STORED), self.scale.split(STORED), strict=True)
        for given, codes, scale in parts:
            found, factors = quantise_rows(given)
            codes.copy_(found)
            scale.copy_(factors.squeeze(1))

    @torch.no_grad()
    def dense(self) -> Float[Tensor, "out D"]:
        """s·q, rounded once to the compute dtype; it lies in scratch memory."""
        out = self.scratch(self.bits.numel(), self.dtype, self.bits.device).view(self.bits.shape)
        return out.copy_(self.codes).mul_(self.scale[:, None])  # e4m3 is exact in every wider type

    @torch.no_grad()
    def prepared(self, x: Float[Tensor, "N D"]) -> "Rows":
        """x as ``multiply`` takes it, for several weights that read it."""
        return Rows(*quantise_rows(x), x.dtype)

    @torch.no_grad()
    def multiply(
        self, x: "Float[Tensor, 'N D'] | Rows", bias: Float[Tensor, " out"] | None = None, *beside: Product
    ) -> Float[Tensor, "N out"]:
        """Computes x·Wᵀ + b in x's dtype. A row with NaN or infinity in it comes out non-finite throughout."""
        codes, scale, dtype = x if isinstance(x, Rows) else self.prepared(x)
        return added(scaled_product(codes, scale, self.codes.t(), self.scale[None], bias, dtype), *beside)

    @torch.no_grad()
    def multiply_back(self, grad: Float[Tensor, "N out"], *beside: Product) -> Float[Tensor, "N D"]:
        """Computes grad·W in grad's dtype, as the gradient of ``multiply`` in x would be without x's quantisation."""
        codes, scale = quantise_rows(grad, self.scale)
        columns = self.scratch(self.bits.numel(), torch.uint8, grad.device).view(self.inputs, self.outputs)
        if cuda.takes(grad):
            from lamina.cuda import eights

            eights.transpose(self.bits, columns)
        else:
            columns.copy_(self.bits.t())
        weight = columns.view(E4M3).t()
        return added(scaled_product(codes, scale, weight, scale.new_ones(1, self.inputs), None, grad.dtype), *beside)


class Rows(NamedTuple):
    """Rows that were quantised, and the dtype they had: codes [N, D] in e4m3, scale [N, 1] in fp32."""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype


def by_kernel(device: str, dtype: torch.dtype) -> bool:
    """Whether a kernel of our own quantises: where there are kernels, and e4m3 in hardware."""
    if not cuda.available(device, dtype):
        return False
    return device != "cuda" or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))


def quantise_rows(
    x: Float[Tensor, "N D"], factors: Float[Tensor, " D"] | None = None
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N 1"]]:
    """x, or x·factors, in e4m3, and the scale of each row, max|row|/448.

    A row of zeros becomes zeros. e4m3 has no infinity, but the scale of a row with one is infinite, and that of a row with
    NaN is NaN, and with it all that the row is multiplied into.
    """
    if by_kernel(x.device.type, x.dtype):
        from lamina.cuda import eights

        return eights.quantise_rows(x.contiguous(), factors, SMALLEST, LARGEST)
    x = x if factors is None else x.float() * factors
    largest = x.abs().amax(1, keepdim=True).float().clamp_min_(SMALLEST)
    codes = (x.float() * (LARGEST / largest)).clamp_(-LARGEST, LARGEST).to(E4M3)  # rounding may pass 448, and then NaN
    return codes, largest.div_(LARGEST)


def scaled_product(
    a: Float[Tensor, "N D"],
    a_scale: Float[Tensor, "N 1"],
    b: Float[Tensor, "D out"],
    b_scale: Float[Tensor, "1 out"],
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "N out"]:
    """Computes (a·b)·a_scale·b_scale + bias for a and b in e4m3, by the device's FP8 GEMM where it has one."""
    fits = dtype == torch.bfloat16 and not (b.shape[0] % 16 or b.shape[1] % 16)
    if fits and a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 9):
        return native_product(a, a_scale, b, b_scale, bias)
    return emulated_product(a, a_scale, b, b_scale, bias, dtype)


def native_product(
    a: Float[Tensor, "N D"],
    a_scale: Float[Tensor, "N 1"],
    b: Float[Tensor, "D out"],
    b_scale: Float[Tensor, "1 out"],
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "N out"]:
    """``scaled_product`` by torch's GEMM, in bf16, the one type that row-wise scales give everywhere.

    Without fast accumulation sums are added in fp32, as the emulation does, but for those within an instruction, of which Hopper
    keeps some 14 bits: less than what rounding the result to bf16 takes away.
    """
    rows = len(a)
    if rows < FEWEST:  # a single row's scale would be taken for that of the whole
        a = F.pad(a.view(torch.uint8), (0, 0, 0, FEWEST - rows)).view(E4M3)
        a_scale = F.pad(a_scale, (0, 0, 0, FEWEST - rows))
    bias = None if bias is None else bias.to(torch.bfloat16)
    out = torch._scaled_mm(a, b, a_scale, b_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=False)
    return out[:rows]


def emulated_product(
    a: Float[Tensor, "N D"],
    a_scale: Float[Tensor, "N 1"],
    b: Float[Tensor, "D out"],
    b_scale: Float[Tensor, "1 out"],
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "N out"]:
    """``scaled_product`` in fp32, where products of e4m3 are exact, rounded once to ``dtype``."""
    out = (a.float() @ b.float()).mul_(a_scale).mul_(b_scale)
    return (out if bias is None else out.add_(bias)).to(dtype)
