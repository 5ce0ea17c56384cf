"""The adapted projection y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ (Hu et al. 2021, arXiv:2106.09685), plain and as one autograd op.

W is frozen, so a step needs no gradient of W, only the one through it; it may be stored in any form of ``frozen``. Autograd's
own graph for the formula keeps the projection and the scaled product, and adds two gradients of x in a pass of their own; the
op keeps x and x·Aᵀ, and accumulates where a GEMM can. ``plain`` is the reference that the op is tested against.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.ops.frozen import Frozen
from lamina.ops.products import product
from lamina.ops.shapes import Float


def plain(
    x: Float[Tensor, "*N D"],
    dropped: Float[Tensor, "*N D"],
    weight: Float[Tensor, "out D"],
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "R D"],
    b: Float[Tensor, "out R"],
    scale: float,
) -> Float[Tensor, "*N out"]:
    """Computes the adapted projection in PEFT's order of operations.

    Args:
        dropped: what the adapter reads: ``x`` itself, or ``x`` after dropout.
        scale: s, alpha/R or, rank-stabilised, alpha/√R.
    """
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, a), b) * scale


def adapted_linear(
    x: Float[Tensor, "N D"],
    dropped: Float[Tensor, "N D"],
    weight: Frozen,
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "R D"],
    b: Float[Tensor, "out R"],
    scale: float,
) -> Float[Tensor, "N out"]:
    """Computes ``plain`` as one op; the same bits in fp32, fewer roundings and less traffic in bf16.

    ``a`` and ``b`` may be wider than ``x`` (fp32 masters of a bf16 model): they are used in x's dtype.
    """
    if not torch.is_grad_enabled():
        return _products(x, dropped, weight, bias, a.to(x.dtype), b.to(x.dtype), scale)[0]
    return _AdaptedLinear.apply(x, dropped, weight, bias, a, b, scale)  # type: ignore[no-untyped-call, no-any-return]


def _products(
    x: Tensor, dropped: Tensor, weight: Frozen, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The projection [N, out], and the adapter's inner product s·x·Aᵀ [N, R]."""
    if x.dtype == torch.float32:
        narrow = F.linear(dropped, a)
        out = weight.multiply(x, bias).add_(
            F.linear(narrow, b).mul_(scale)
        )  # each product and sum rounded, as PEFT does
        return out, narrow.mul_(scale)
    narrow = product((dropped, a.t()), scale=scale)
    return weight.multiply(x, bias, (narrow, b.t())), narrow


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor, weight: Frozen, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.master = a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        out, narrow = _products(x, dropped, weight, bias, a, b, scale)
        ctx.save_for_backward(dropped, narrow, a, b)
        ctx.weight, ctx.scale, ctx.same = weight, scale, dropped is x  # W is frozen: no version of it to watch
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dropped, narrow, a, b = ctx.saved_tensors
        narrow_grad = product((grad, b), scale=ctx.scale)  # [N, R]
        a_grad = product((narrow_grad.t(), dropped), dtype=ctx.master)
        b_grad = product((grad.t(), narrow), dtype=ctx.master)
        x_grad = dropped_grad = None
        to_input = (narrow_grad, a)
        if ctx.needs_input_grad[0]:
            x_grad = ctx.weight.multiply_back(grad, *([to_input] if ctx.same else []))
        if not ctx.same and ctx.needs_input_grad[1]:
            dropped_grad = product(to_input)
        return x_grad, dropped_grad, None, None, a_grad, b_grad, None
