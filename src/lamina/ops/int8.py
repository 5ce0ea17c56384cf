"""A frozen weight in int8, with both products of training by integer GEMMs: W[o,i] ≈ s[o]·q[o,i], |q| ≤ 127.

LoRA never changes W, so it is quantised once, one scale per output channel; activations are quantised as they come, one
scale per token (Dettmers et al. 2022, arXiv:2208.07339, without its outlier columns; Xiao et al. 2022, arXiv:2211.10438).
Then both scales stand outside the sum:

    forward    y[n,o] = a[n]·s[o]·Σ_i p[n,i]·q[o,i]       x ≈ a·p, row by row
    backward   g = grad·s,  dx[n,i] = b[n]·Σ_o r[n,o]·q[o,i]      g ≈ b·r, row by row

In the backward pass s lies inside the sum over o. Folded into the gradient *before* that is quantised it costs one
multiplication per element, and one stored weight serves both directions; the usual way out is a second, transposed copy
with scales per input channel. The sums are exact in int32. Every scale, the bias, and the products with them are fp32,
rounded once to the dtype of x.

In bf16 on a CPU kernels of our own (``native/integers.c``) quantise the rows in one pass, and multiply and rescale in another, where
they are faster than oneDNN; torch's operations are what they are tested against. The bits are the same but for numbers that are
subnormal in bf16, which become zero, as in all kernels.

Rejected: slices of rows that stay in cache (what they save in traffic goes into smaller GEMMs and more operators), and
``torch.aminmax`` and ``vector_norm`` for the largest number of a row (several times slower than ``amax`` beside ``amin``).
"""

import ctypes
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina import native
from lamina.errors import ModelError
from lamina.ops.frozen import Scratch
from lamina.ops.products import Product, added
from lamina.ops.shapes import Float, Int

FEW = 32
"""Rows or outputs below which a product is left to torch."""

LARGEST = 127
WIDEST = (2**31 - 1) // LARGEST**2
"""The longest sum that fits into int32 whatever the numbers are: 133,144 products."""

SMALLEST = 1e-30
"""Rows with no number above this are quantised as if they had one: their scale, and its reciprocal, stay normal fp32."""

ROWS = 2048
"""Tokens that are quantised, multiplied and rescaled at one time, which bounds the scratch memory."""

STORED = 128
"""Rows of a weight that are quantised at one time: loading takes little memory beside the model."""

EXACT = 1024
"""The longest sum of products of int8 that fp32 holds exactly: 1024·128·127 < 2²⁴."""


def int8_bytes(outputs: int, inputs: int) -> int:
    """The bytes of a weight of this shape: one per element, and an fp32 scale per output."""
    return outputs * inputs + 4 * outputs


class Int8(nn.Module):
    """A frozen weight [outputs, inputs] as int8 with a scale per output; made empty, then filled by ``store``.

    The scales are kept as the bits of fp32 in an integer buffer, so that ``module.to(torch.bfloat16)``, which casts every
    floating buffer below it, leaves them alone. Wider than ``WIDEST`` in either direction is refused.

    Args:
        dtype: the compute dtype, in which ``dense`` gives the weight.
        scratch: memory for intermediate results, shared by all weights of a model.
    """

    codes: Tensor
    scale_bits: Tensor
    kind = "int8"

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype, *, scratch: Scratch) -> None:
        super().__init__()
        if max(outputs, inputs) > WIDEST:
            raise ModelError(
                f"a weight [{outputs}, {inputs}] is too wide for int8: sums of more than {WIDEST} products may overflow int32; "
                "keep this layer in bf16"
            )
        self.outputs, self.inputs, self.dtype, self.scratch = outputs, inputs, dtype, scratch
        self.register_buffer("codes", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale_bits", torch.empty(outputs, dtype=torch.int32))

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
        """Quantises a weight into the buffers: |W - s·q| ≤ s/2, up to fp32's rounding of W/s."""
        if weight.shape != self.codes.shape:
            raise ValueError(f"found a weight {list(weight.shape)}, expected {list(self.codes.shape)}")
        parts = zip(weight.split(STORED), self.codes.split(STORED), self.scale.split(STORED), strict=True)
        for given, codes, scale in parts:
            wide = self.scratch(given.numel(), torch.float32, given.device).view(given.shape)
            scale.copy_(quantise_rows(given, None, wide, codes).squeeze(1))

    @torch.no_grad()
    def from_bitsandbytes(self, cb: Int[Tensor, "..."], scb: Float[Tensor, "..."]) -> None:
        """Takes over a weight of an LLM.int8 checkpoint, W = CB·SCB/127: the same integers, the scale rounded once."""
        if cb.shape != self.codes.shape or scb.shape != self.scale.shape or cb.dtype != torch.int8:
            raise ModelError(
                f"an LLM.int8 weight has CB {list(cb.shape)} of {cb.dtype} and SCB {list(scb.shape)}, expected "
                f"{list(self.codes.shape)} of torch.int8 and {list(self.scale.shape)}: the checkpoint is damaged or of another kind"
            )
        self.codes.copy_(cb)
        self.scale.copy_(scb.float() / LARGEST)

    @torch.no_grad()
    def dense(self) -> Float[Tensor, "out D"]:
        """s·q, rounded once to the compute dtype; it lies in scratch memory."""
        out = self.scratch(self.codes.numel(), self.dtype, self.codes.device).view(self.codes.shape)
        return torch.mul(self.codes, self.scale[:, None], out=out)

    def multiply(
        self, x: Float[Tensor, "N D"], bias: Float[Tensor, " out"] | None = None, *beside: Product
    ) -> Float[Tensor, "N out"]:
        """Computes x·Wᵀ + b in x's dtype. A row with NaN or infinity in it comes out non-finite throughout."""
        return self._product(x, self.codes.t(), *beside, after=self.scale, bias=bias)

    def multiply_back(self, grad: Float[Tensor, "N out"], *beside: Product) -> Float[Tensor, "N D"]:
        """Computes grad·W in grad's dtype, as the gradient of ``multiply`` in x would be without x's quantisation."""
        return self._product(grad, self.codes, *beside, before=self.scale)

    @torch.no_grad()
    def _product(
        self,
        x: Tensor,
        codes: Tensor,
        *beside: Product,
        before: Tensor | None = None,
        after: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(x·before, quantised)·codes·after + bias + ``beside``; ``before`` and ``after`` are factors of columns."""
        inputs, outputs = codes.shape
        out = x.new_empty(len(x), outputs)
        if _by_kernel(x, outputs, bias):
            inside = beside if len(beside) == 1 and _is_narrow(*beside[0]) else ()
            for first in range(0, len(x), ROWS):
                part = slice(first, first + ROWS)
                memory = self.scratch(working_memory(len(x[part]), inputs, outputs, kernel=True), torch.uint8, x.device)
                _multiply(x[part], codes, before, after, bias, [(a[part], b) for a, b in inside], out[part], memory)
            return out if inside else added(out, *beside)
        if x.is_cuda and codes.stride(0) != 1:
            codes = codes.t().contiguous().t()
        for given, result in zip(x.split(ROWS), out.split(ROWS), strict=True):
            wide, sums, narrow = self._workspace(len(given), inputs, outputs, x.device)
            scale = quantise_rows(given, before, wide[: given.numel()].view(given.shape), narrow)
            integer_product(narrow, codes, sums)
            rescaled = wide[: sums.numel()].view(sums.shape).copy_(sums).mul_(scale)
            if after is not None:
                rescaled.mul_(after)
            if bias is not None:
                rescaled.add_(bias)
            result.copy_(rescaled)
        return added(out, *beside)

    def _workspace(self, rows: int, inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Cuts scratch memory into flat fp32 for either side of a product, its sums in int32, and its operand in int8."""
        sizes = _parts(rows, inputs, outputs, kernel=False)
        wide, sums, narrow = self.scratch(sum(sizes), torch.uint8, device).split(sizes)
        return (
            wide.view(torch.float32),
            sums.view(torch.int32).view(rows, outputs),
            narrow.view(torch.int8).view(rows, inputs),
        )


def faster(rows: int, outputs: int, device: str, dtype: torch.dtype) -> bool:
    """Whether a product with a result of this size goes to the kernels."""
    return min(rows, outputs) >= FEW and native.available(device, dtype) and _here()


@cache
def _here() -> bool:
    return bool(native.ask("integers_here"))


def _by_kernel(x: Tensor, outputs: int, bias: Tensor | None) -> bool:
    """Whether the kernels take these, and are worth it."""
    readable = x.stride(1) == 1 and (bias is None or bias.dtype == x.dtype)
    return readable and faster(len(x), outputs, x.device.type, x.dtype)


def working_memory(rows: int, inputs: int, outputs: int, kernel: bool) -> int:
    """Bytes of scratch memory that the product of so many rows, ``ROWS`` at most, takes."""
    return sum(_parts(rows, inputs, outputs, kernel))


def _parts(rows: int, inputs: int, outputs: int, kernel: bool) -> list[int]:
    """Bytes of fp32 for either side of a product, sums and operand; for the kernels of operand, packed columns and scales."""
    if kernel:
        panels = torch.get_num_threads() * native.ask("integer_panel", inputs)
        return [rows * native.ask("integer_step", inputs), panels, 4 * rows]
    return [4 * rows * max(inputs, outputs), 4 * rows * outputs, rows * inputs]


def _is_narrow(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel adds a·b itself: pairs along the sum are read as one word."""
    terms, halves = a.shape[1], a.dtype == b.dtype == torch.bfloat16
    return halves and a.stride(1) == 1 and 1 in b.stride() and terms % 2 == 0 and terms <= native.ask("integer_narrow")


def _multiply(
    x: Tensor,
    codes: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    bias: Tensor | None,
    beside: list[Product],
    out: Tensor,
    memory: Tensor,
) -> None:
    """Writes (x·before, quantised)·codes·after + bias + ``beside``, one narrow product at most, by the kernels."""
    inputs, outputs = codes.shape
    turned = not codes.is_contiguous()
    quantised, panels, scale = memory.split(_parts(len(x), inputs, outputs, kernel=True))
    native.call("integer_rows", _at(x), x.stride(0), before, len(x), inputs, SMALLEST, quantised, scale)
    weight = codes.t() if turned else codes, turned
    more: list[native.Argument] = [None, 0, None, 0, 0, 0]
    for a, b in beside:
        columns = b.stride(1) != 1  # lie one after the other
        more = [_at(a), a.stride(0), _at(b), b.stride(1) if columns else b.stride(0), columns, a.shape[1]]
    sizes = len(x), inputs, outputs
    native.call("integer_products", quantised, scale, *weight, after, bias, *more, out, *sizes, panels)


def _at(x: Tensor) -> ctypes.c_void_p:
    """Where the rows of x lie, which may be apart."""
    return ctypes.c_void_p(x.data_ptr())


def quantise_rows(
    x: Float[Tensor, "N D"],
    factors: Float[Tensor, " D"] | None,
    wide: Float[Tensor, "N D"],
    codes: Int[Tensor, "N D"],
) -> Float[Tensor, "N 1"]:
    """Writes x·factors as integers of [-127, 127] into ``codes``, and gives the scale of each row, max|row|/127.

    A row of zeros becomes zeros. NaN and infinity have no integer, but the scale of their row is non-finite, and with it
    all that the row is multiplied into.

    Args:
        wide: fp32 memory to work in; what it holds afterwards is of no use.
    """
    wide.copy_(x)
    if factors is not None:
        wide.mul_(factors)
    largest = torch.maximum(wide.amax(1, keepdim=True), wide.amin(1, keepdim=True).neg_()).clamp_min_(SMALLEST)
    codes.copy_(wide.mul_(LARGEST / largest).round_())
    return largest.div_(torch.full_like(largest, LARGEST))  # CUDA multiplies by the reciprocal of a plain number


def integer_product(a: Int[Tensor, "N D"], b: Int[Tensor, "D out"], out: Int[Tensor, "N out"]) -> None:
    """Writes a·b, int8 by int8, into ``out``, int32, by the device's integer GEMM where that is exact.

    That of the CPU leaves ``out`` unwritten, without an error, for one transposed column (torch 2.13).
    """
    if a.device.type == "cpu" and len(b) > 1 and cpu_is_exact():
        torch._int_mm(a, b, out=out)
    elif a.is_cuda and not (b.shape[0] % 8 or b.shape[1] % 8):
        cuda_product(a, b, out)
    else:
        plain_product(a, b, out)


def plain_product(a: Int[Tensor, "N D"], b: Int[Tensor, "D out"], out: Int[Tensor, "N out"]) -> None:
    """``integer_product`` in fp32, in parts of the sum that are short enough to be exact there."""
    out.zero_()
    for left, right in zip(a.split(EXACT, dim=1), b.split(EXACT), strict=True):
        out.add_((left.float() @ right.float()).to(torch.int32))


def cuda_product(a: Int[Tensor, "N D"], b: Int[Tensor, "D out"], out: Int[Tensor, "N out"]) -> None:
    """Writes a·b as cuBLAS takes it: more than 16 rows on the left, columns that are contiguous on the right."""
    if len(a) < 32:
        out.copy_(torch._int_mm(F.pad(a, (0, 0, 0, 32 - len(a))), b)[: len(a)])
    else:
        torch._int_mm(a, b, out=out)


@cache
def cpu_is_exact() -> bool:
    """Whether this CPU sums products of int8 in int32.

    Without VNNI, oneDNN adds pairs of products in int16, which saturates: at large numbers its sums are silently wrong.
    """
    large = torch.full((64, 64), LARGEST, dtype=torch.int8)
    return bool((torch._int_mm(large, large) == 64 * LARGEST**2).all())
