"""The adapted projection y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ (Hu et al. 2021, arXiv:2106.09685), plain and as one autograd op.

W is frozen, so a step needs no gradient of W, only the one through it; it may be stored in any form of ``frozen``. Autograd's
own graph for the formula keeps the projection and the scaled product, and adds two gradients of x in a pass of their own; the
op keeps x and s·x·Aᵀ, and sums where a GEMM can. Projections of the same input, such as q, k and v, are one op, and the gradient
of x is one sum. What dropout takes from the adapter's input is drawn again for the backward pass and not kept. ``plain`` is the
reference that the op is tested against.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.ops.dropout import Dropout
from lamina.ops.frozen import Dense, Frozen, multiply_back, prepared
from lamina.ops.products import Sum, product, several
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


class Adapted(NamedTuple):
    """A frozen projection and its adapter: W [out, D] in any form, b [out], A [R, D], B [out, R].

    A and B may be wider than x (fp32 masters of a bf16 model): they are used in x's dtype.
    """

    weight: Frozen
    bias: Tensor | None
    a: Tensor
    b: Tensor


def adapted_linear(
    x: Float[Tensor, "N D"],
    weight: Frozen,
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "R D"],
    b: Float[Tensor, "out R"],
    scale: float,
    dropout: Dropout | None = None,
) -> Float[Tensor, "N out"]:
    """Computes ``plain`` as one op; the same bits in fp32, fewer roundings and less traffic in bf16."""
    return adapted_linears(x, scale, Adapted(weight, bias, a, b), dropout=dropout)[0]


def adapted_linears(
    x: Float[Tensor, "N D"], scale: float, *linears: Adapted, dropout: Dropout | None = None
) -> tuple[Float[Tensor, "N _"], ...]:
    """Computes ``adapted_linear`` for several projections of the same input, as one op.

    Args:
        scale: s of all of them.
        dropout: what all the adapters read x through; by default nothing is dropped.
    """
    if not torch.is_grad_enabled():
        return _without_graph(x, dropout, scale, linears)
    masters = [master for linear in linears for master in (linear.a, linear.b)]
    return _AdaptedLinear.apply(x, dropout, scale, linears, *masters)  # type: ignore[no-untyped-call, no-any-return]


def _without_graph(x: Tensor, dropout: Dropout | None, scale: float, linears: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """The projections; over dense weights in half precision all products together, as a token in generation wants it."""
    if x.dtype == torch.float32 or not all(isinstance(linear.weight, Dense) for linear in linears):
        return _products(x, dropout, scale, linears)[0]
    first, sums, dropped = [], [], _through(dropout, x)
    for weight, bias, a, b in linears:
        inner = x.new_empty(len(x), len(a))
        first.append(Sum(((dropped, a.to(x.dtype).t()),), scale, out=inner))
        sums.append(Sum(((x, weight.dense().t()), (inner, b.to(x.dtype).t())), bias=bias))
    return tuple(several(sums, first))


def _products(
    x: Tensor, dropout: Dropout | None, scale: float, linears: Sequence[Adapted]
) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor]]:
    """The projections [N, out], the adapters' inner products s·x·Aᵀ [N, ΣR], all A [ΣR, D] and each B in x's dtype."""
    all_a, each_b = _stacked([linear.a for linear in linears], x.dtype), [linear.b.to(x.dtype) for linear in linears]
    narrow, outs, dropped = x.new_empty(len(x), len(all_a)), [], _through(dropout, x)
    parts = zip(linears, _split(all_a, linears, 0), each_b, _split(narrow, linears), strict=True)
    if x.dtype == torch.float32:  # each product and sum is rounded by itself, as PEFT does
        for linear, a, b, inner in parts:
            product((dropped, a.t()), out=inner)
            outs.append(linear.weight.multiply(x, linear.bias).add_(F.linear(inner, b).mul_(scale)))
        narrow.mul_(scale)
    else:
        product((dropped, all_a.t()), scale=scale, out=narrow)
        del dropped
        given = prepared(x, [linear.weight for linear in linears])
        outs = [linear.weight.multiply(given, linear.bias, (inner, b.t())) for linear, _, b, inner in parts]
    return tuple(outs), narrow, [all_a, *each_b]


def _through(dropout: Dropout | None, x: Tensor) -> Tensor:
    return x if dropout is None else dropout(x)


def _stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The rows of all matrices, one below the other; a matrix that stands alone and has the dtype is not copied."""
    if len(matrices) == 1:
        return matrices[0].to(dtype)
    stacked = matrices[0].new_empty(sum(map(len, matrices)), matrices[0].shape[1], dtype=dtype)
    for part, matrix in zip(stacked.split([len(matrix) for matrix in matrices]), matrices, strict=True):
        part.copy_(matrix)
    return stacked


def _split(narrow: Tensor, linears: Sequence[Adapted], dim: int = 1) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = narrow.split([len(linear.a) for linear in linears], dim)
    return parts


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropout: Dropout | None, scale: float, linears: Sequence[Adapted], *masters: Tensor
    ) -> tuple[Tensor, ...]:
        outs, narrow, factors = _products(x, dropout, scale, linears)
        ctx.save_for_backward(x, narrow, *factors)
        ctx.linears, ctx.scale, ctx.dropout = linears, scale, dropout  # W is frozen: no version of it to watch
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, all_a, *each_b = ctx.saved_tensors
        master = ctx.linears[0].a.dtype
        narrow_grad = torch.empty_like(narrow)
        inner_grads = _split(narrow_grad, ctx.linears)
        for grad, b, inner_grad in zip(grads, each_b, inner_grads, strict=True):
            product((grad, b), scale=ctx.scale, out=inner_grad)
        a_grads = _split(product((narrow_grad.t(), _through(ctx.dropout, x)), dtype=master), ctx.linears, 0)
        inners = zip(grads, _split(narrow, ctx.linears), strict=True)
        b_grads = [product((grad.t(), inner), dtype=master) for grad, inner in inners]
        x_grad, to_input = None, (narrow_grad, all_a)
        if ctx.needs_input_grad[0]:
            weights = [linear.weight for linear in ctx.linears]
            x_grad = multiply_back(weights, grads, *([] if ctx.dropout else [to_input]))
            if ctx.dropout:
                x_grad.add_(ctx.dropout(product(to_input)))
        of_masters = (grad for both in zip(a_grads, b_grads, strict=True) for grad in both)
        return x_grad, None, None, None, *of_masters
