"""Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467): x / √(mean x² + ε) · weight, reduced in fp32.

On a CPU torch composes it of simpler operations: each passes over a tensor of the whole batch, most of them in fp32, and
autograd keeps fp32 copies of them. Here the same operations run over a few rows at a time, which a core's cache holds, and only
x is kept, which the residual stream keeps anyway: the root of a few rows costs less to compute again than to remember. In bf16 a
kernel of our own makes it one pass, where there is one (``native``; on CUDA ``cuda``).
The weight is frozen, and gets no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lamina import cuda, native
from lamina.ops.shapes import Float

CHUNK = 2**16
"""Numbers that are normalised at one time: 256 kB in fp32, of which some three copies exist."""


def plain(x: Float[Tensor, "*N D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "*N D"]:
    """The norm as torch has it, forward and backward."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm(x: Float[Tensor, "*N D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "*N D"]:
    """Computes ``plain``; on a CPU, and in bf16 on CUDA, with a backward pass of its own, to x only.

    The bits are those of ``plain``, or in bf16, where the kernel rounds but once, no farther from the truth.
    """
    if weight.requires_grad or not (x.device.type == "cpu" or cuda.takes(x, weight)):
        return plain(x, weight, eps)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _forward(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call, no-any-return]


def _by_kernel(*tensors: Tensor) -> bool:
    return tensors[0].shape[-1] % native.LANES == 0 and native.takes(*tensors)


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if _by_kernel(x, weight):
        x, weight = x.contiguous(), weight.contiguous()
        out = torch.empty_like(x)
        native.call("norm", x, weight, out, x.numel() // x.shape[-1], x.shape[-1], eps)
        return out
    if cuda.takes(x, weight):
        from lamina.cuda import rows as kernels

        return kernels.norm(x.contiguous(), weight.contiguous(), eps)
    if x.numel() <= CHUNK:
        return plain(x, weight, eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows, here in zip(_chunks(x), _chunks(out), strict=True):
        here.copy_(plain(rows, weight, eps))
    return out


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    rows: tuple[Tensor, ...] = x.reshape(-1, x.shape[-1]).split(max(1, CHUNK // x.shape[-1]))
    return rows


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        if _by_kernel(x, weight, grad):
            x, weight, grad = x.contiguous(), weight.contiguous(), grad.contiguous()
            out = torch.empty_like(x)
            native.call("norm_back", x, weight, grad, out, x.numel() // x.shape[-1], x.shape[-1], ctx.eps)
            return out, None, None
        if cuda.takes(x, weight, grad):
            from lamina.cuda import rows as kernels

            return kernels.norm_back(x.contiguous(), weight.contiguous(), grad.contiguous(), ctx.eps), None, None
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, out = weight.to(wide), torch.empty_like(x, memory_format=torch.contiguous_format)
        for x_rows, grad_rows, here in zip(*map(_chunks, (x, grad, out)), strict=True):
            # With u = x/rms and v = grad·weight: (v - u·mean(u·v)) / rms.
            unit, pulled = x_rows.to(wide, copy=True), grad_rows.to(wide, copy=True).mul_(weight)
            inverse = unit.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()
            unit.mul_(inverse)
            along = (unit * pulled).mean(-1, keepdim=True)
            here.copy_(pulled.addcmul_(unit, along, value=-1).mul_(inverse))
        return out, None, None
