"""Norm, gate and rotation: one pass over a tensor each, in fp32, rounded once. All take and give contiguous tensors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers that a program of an elementwise kernel computes."""


def warps(block: int) -> int:
    """Groups of 32 threads for a block that lies in registers: eight to sixteen numbers a thread, within what a program may have."""
    return max(1, min(32, block // 512))


@triton.jit
def _norm(x, weight, out, width, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    numbers = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(numbers * numbers) / width + eps)
    scaled = numbers * inverse * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_back(x, weight, grad, out, width, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    numbers = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    pulled = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32)
    pulled *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(numbers * numbers) / width + eps)
    unit = numbers * inverse
    along = tl.sum(unit * pulled) / width
    tl.store(out + row * width + at, ((pulled - unit * along) * inverse).to(out.dtype.element_ty), mask=inside)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes ``ops.norm.plain``."""
    width, out = x.shape[-1], torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _norm[(x.numel() // width,)](x, weight, out, width, eps, BLOCK=block, num_warps=warps(block))
    return out


def norm_back(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> Tensor:
    """The gradient of ``norm`` in x."""
    width, out = x.shape[-1], torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _norm_back[(x.numel() // width,)](x, weight, grad, out, width, eps, BLOCK=block, num_warps=warps(block))
    return out


@triton.jit
def _gate(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _gate_back(gate, up, grad, gate_grad, up_grad, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(gate_grad + at, (d * u * slope).to(gate_grad.dtype.element_ty), mask=at < count)
    tl.store(up_grad + at, (d * g * sigmoid).to(up_grad.dtype.element_ty), mask=at < count)


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """Computes ``ops.swiglu.plain``."""
    out = torch.empty_like(gate)
    _gate[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out


def gate_back(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``gate`` in both."""
    outs = torch.empty_like(gate), torch.empty_like(up)
    count = grad.numel()
    _gate_back[(triton.cdiv(count, BLOCK),)](gate, up, grad, *outs, count, BLOCK=BLOCK, num_warps=4)
    return outs


@triton.jit
def _rotate(x, cos, sin, out, count, heads, half, sign, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, head, place = pair < count, pair // half, pair % half
    angle = head // heads * half + place
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32) * sign
    low_at = head * 2 * half + place
    low = tl.load(x + low_at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + low_at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + low_at, (low * c - high * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + low_at + half, (high * c + low * s).to(out.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Turns each pair of a head by its token's angle, or with ``sign`` -1 back."""
    out, pairs, half = torch.empty_like(x), x.numel() // 2, x.shape[-1] // 2
    _rotate[(triton.cdiv(pairs, BLOCK),)](x, cos, sin, out, pairs, x.shape[1], half, sign, BLOCK=BLOCK, num_warps=4)
    return out
