"""Projections y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ of a frozen W (Hu et al. 2021, arXiv:2106.09685), plain and as one autograd op.

W is frozen, so a step needs no gradient of W, only the one through it; it may be stored in any form of ``frozen``. Autograd's
own graph for the formula would keep the projection and the scaled product, and add two gradients of x in a pass of their own;
the op keeps x and s·x·Aᵀ, and lets the matrix products add to what is there. Projections of the same input, such as q, k and v,
are one op, whether all of them are adapted or some, and the gradient of x is one sum. What dropout takes from an adapter's input
is drawn again for the backward pass and not kept. ``plain`` is the reference that the op is tested against.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.ops.dropout import Dropout
from lamina.ops.frozen import Dense, Frozen, multiply_back, prepared
from lamina.ops.products import Product, Sum, product, several
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


class Update(NamedTuple):
    """What an adapter adds, s·B·A: A [R, D] and B [out, R], and the dropout through which it reads x, if any.

    A and B may be wider than x (fp32 masters of a bf16 model): they are used in x's dtype.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: Dropout | None = None


class Projection(NamedTuple):
    """A frozen projection, W [out, D] in any form and b [out], and the update beside it, where it is adapted."""

    weight: Frozen
    bias: Tensor | None
    update: Update | None = None


def project(x: Float[Tensor, "N D"], *projections: Projection) -> tuple[Float[Tensor, "N _"], ...]:
    """Computes projections of the same input as one op: in fp32 the bits of ``plain``, in bf16 fewer roundings and less traffic."""
    if not torch.is_grad_enabled():
        return _without_graph(x, projections)
    masters = [master for _, _, update in projections if update for master in (update.a, update.b)]
    return _Project.apply(x, projections, *masters)  # type: ignore[no-untyped-call, no-any-return]


def _without_graph(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The projections; over dense weights in half precision all products together, as a token in generation wants it."""
    if x.dtype == torch.float32 or not all(isinstance(weight, Dense) for weight, _, _ in projections):
        return _products(x, projections)[0]
    first, sums = [], []
    for weight, bias, update in projections:
        products = [(x, weight.dense().t())]
        if update:
            inner = x.new_empty(len(x), len(update.a))
            first.append(Sum(((_through(update.dropout, x), update.a.to(x.dtype).t()),), update.scale, out=inner))
            products.append((inner, update.b.to(x.dtype).t()))
        sums.append(Sum(tuple(products), bias=bias))
    return tuple(several(sums, first))


Reading = Sequence[Update]
"""Updates that read the same input at the same scale, so that their s·x·Aᵀ are one product."""


def _readings(x: Tensor, projections: Sequence[Projection]) -> list[Reading]:
    """The updates, in their order; in fp32 each by itself, as PEFT computes it."""
    updates = [(update, index) for index, (_, _, update) in enumerate(projections) if update]
    alone = x.dtype == torch.float32
    groups = groupby(updates, lambda one: one[1] if alone else (one[0].scale, one[0].dropout))
    return [[update for update, _ in group] for _, group in groups]


def _products(x: Tensor, projections: Sequence[Projection]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The projections [N, out]; and of each reading s·x·Aᵀ [N, ΣR], then all its A [ΣR, D], then each B, in x's dtype."""
    exact = x.dtype == torch.float32  # each product and sum is rounded by itself, as PEFT does
    readings = _readings(x, projections)
    all_a = [_stacked([update.a for update in reading], x.dtype) for reading in readings]
    narrow = [
        product((_through(reading[0].dropout, x), a.t()), scale=1.0 if exact else reading[0].scale)
        for reading, a in zip(readings, all_a, strict=True)
    ]
    inners = (inner for part, reading in zip(narrow, readings, strict=True) for inner in _split(part, reading))
    each_b = [update.b.to(x.dtype) for reading in readings for update in reading]
    beside = zip(inners, each_b, strict=True)
    taken, outs = prepared(x, [weight for weight, _, _ in projections]), []
    for weight, bias, update in projections:
        if update is None:
            outs.append(weight.multiply(taken, bias))
            continue
        inner, b = next(beside)
        if exact:
            outs.append(weight.multiply(taken, bias).add_(F.linear(inner, b).mul_(update.scale)))
            inner.mul_(update.scale)  # a view into narrow, which is kept as s·x·Aᵀ
        else:
            outs.append(weight.multiply(taken, bias, (inner, b.t())))
    return tuple(outs), [*narrow, *all_a, *each_b]


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


def _split(of_all: Tensor, reading: Reading, dim: int = 1) -> tuple[Tensor, ...]:
    """The part of each update."""
    parts: tuple[Tensor, ...] = of_all.split([len(update.a) for update in reading], dim)
    return parts


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: Sequence[Projection], *masters: Tensor) -> tuple[Tensor, ...]:
        outs, factors = _products(x, projections)
        if factors:  # of frozen projections nothing is kept, not even x
            ctx.save_for_backward(x, *factors)
        ctx.projections = projections  # W is frozen: no version of it to watch
        if not ctx.needs_input_grad[0]:
            frozen = zip(outs, projections, strict=True)
            ctx.mark_non_differentiable(*(out for out, (_, _, update) in frozen if not update))
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With g the gradient of each output: ∂A = (s·g·B)ᵀ·x, ∂B = gᵀ·(s·x·Aᵀ), ∂x = Σ g·W + (s·g·B)·A."""
        projections: Sequence[Projection] = ctx.projections
        of_adapted = iter([grad for grad, (_, _, update) in zip(grads, projections, strict=True) if update])
        of_factors: list[Tensor] = []
        to_input: list[tuple[Dropout | None, Product]] = []
        if saved := ctx.saved_tensors:  # named, as a checkpointed layer gives them once
            x, *factors = saved
            readings = _readings(x, projections)
            count = len(readings)
            narrows, all_a, each_b = factors[:count], factors[count : 2 * count], iter(factors[2 * count :])
            for reading, narrow, a in zip(readings, narrows, all_a, strict=True):
                scale, dropout, dtype = reading[0].scale, reading[0].dropout, reading[0].a.dtype
                mine = [next(of_adapted) for _ in reading]
                narrow_grad = torch.empty_like(narrow)  # s·g·B
                for grad, inner_grad in zip(mine, _split(narrow_grad, reading), strict=True):
                    product((grad, next(each_b)), scale=scale, out=inner_grad)
                a_grads = _split(product((narrow_grad.t(), _through(dropout, x)), dtype=dtype), reading, 0)
                for grad, inner, a_grad in zip(mine, _split(narrow, reading), a_grads, strict=True):
                    of_factors += a_grad, product((grad.t(), inner), dtype=dtype)
                to_input.append((dropout, (narrow_grad, a)))
        if not ctx.needs_input_grad[0]:
            return None, None, *of_factors
        whole = [through for dropout, through in to_input if dropout is None]
        x_grad = multiply_back([weight for weight, _, _ in projections], grads, *whole)
        for dropout, through in to_input:
            if dropout:
                dropout(product(through), onto=x_grad)
        return x_grad, None, *of_factors
