"""The adapted projection: gradients by finite differences, bits of the plain formula, errors in bf16."""

import pytest
import torch
from low_precision import made
from models import error
from torch import Tensor
from torch.nn import functional as F

from lamina.ops.dropout import Dropout
from lamina.ops.fourbit import FourBit
from lamina.ops.fp8 import Fp8
from lamina.ops.frozen import Dense, Frozen, SharedBuffer, multiply_back
from lamina.ops.int8 import Int8
from lamina.ops.lora import Projection, Update, plain, project

DROPOUT = Dropout(0.5, seed=3)
SCALE = 1.7  # no power of two, so that a scale in the wrong place would show in the bits


def operands(dtype: torch.dtype, tokens: int = 5, inputs: int = 7, outputs: int = 6, rank: int = 3) -> list[Tensor]:
    """x, W, bias, A, B."""
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, dtype=torch.float64)
    shapes = ((outputs, inputs), (outputs,), (rank, inputs), (outputs, rank))
    rest = [torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes]
    return [tensor.to(dtype) for tensor in (x, *rest)]


def adapted_linear(
    x: Tensor, weight: Frozen, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: Dropout | None = None
) -> Tensor:
    """One projection by itself."""
    return project(x, Projection(weight, bias, Update(a, b, scale, dropout)))[0]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("x_learns", [False, True])
def test_gradients_without_dropout(with_bias: bool, x_learns: bool) -> None:
    x, weight, bias, a, b = operands(torch.float64)

    def op(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return adapted_linear(x, Dense(weight), bias if with_bias else None, a, b, SCALE)

    inputs = (x.requires_grad_(x_learns), a.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize("x_learns", [False, True])
def test_gradients_with_dropout(x_learns: bool) -> None:
    """What is dropped going back is what was dropped going forward."""
    x, weight, bias, a, b = operands(torch.float64)

    def op(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return adapted_linear(x, Dense(weight), bias, a, b, SCALE, DROPOUT)

    assert torch.autograd.gradcheck(op, (x.requires_grad_(x_learns), a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_no_more_than_its_absence(dtype: torch.dtype) -> None:
    x, weight, bias, a, b = operands(dtype)
    found = []
    for dropout in (None, DROPOUT):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
            adapted_linear(x, Dense(weight), bias, a.requires_grad_(), b.requires_grad_(), SCALE, dropout)
        assert kept[0].data_ptr() == x.data_ptr()
        found.append([tensor.shape for tensor in kept])
    assert found[0] == found[1]


def test_an_input_that_does_not_learn_gets_no_gradient() -> None:
    x, weight, _, a, b = operands(torch.float32)
    adapted_linear(x, Dense(weight), None, a.requires_grad_(), b.requires_grad_(), SCALE, DROPOUT).sum().backward()
    assert x.grad is None and weight.grad is None
    assert a.grad is not None and b.grad is not None


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("tokens", "inputs", "outputs", "rank"), [(1, 8, 8, 1), (33, 65, 17, 5), (128, 96, 160, 16)])
def test_fp32_bits_are_those_of_the_formula(tokens: int, inputs: int, outputs: int, rank: int, with_bias: bool) -> None:
    x, weight, bias, a, b = operands(torch.float32, tokens, inputs, outputs, rank)
    given = (bias if with_bias else None, a, b, SCALE)
    assert torch.equal(adapted_linear(x, Dense(weight), *given), plain(x, x, weight, *given))
    assert torch.equal(adapted_linear(x, Dense(weight), *given, DROPOUT), plain(x, DROPOUT(x), weight, *given))


def gradients(op: object, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    x, a, b = (tensor.detach().requires_grad_() for tensor in (x, a, b))
    assert callable(op)
    if op is plain:
        out = plain(x, x, weight, None, a.to(x.dtype), b.to(x.dtype), SCALE)
    else:
        out = op(x, Dense(weight), None, a, b, SCALE)
    out.backward(upstream.to(out.dtype))
    assert x.grad is not None and a.grad is not None and b.grad is not None
    return {"out": out.detach(), "x": x.grad, "a": a.grad, "b": b.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_that_of_the_formula(dtype: torch.dtype) -> None:
    """1.2: the rule of the house for two orders of rounding. Masters are fp32, so the truth knows their low bits."""
    x, weight, _, a, b = operands(torch.float32, 200, 96, 160, 8)
    x, weight = x.to(dtype), weight.to(dtype)
    upstream = torch.randn(200, 160).to(dtype)
    wide = (tensor.double() for tensor in (x, weight, a, b, upstream))
    truth = gradients(plain, *wide)
    ours, reference = (gradients(op, x, weight, a, b, upstream) for op in (adapted_linear, plain))
    for name in truth:
        assert error(ours[name], truth[name]) <= 1.2 * error(reference[name], truth[name]), name


def test_masters_of_a_bf16_model_get_fp32_gradients() -> None:
    x, weight, _, a, b = operands(torch.float32)
    x, weight = x.bfloat16(), weight.bfloat16()
    out = adapted_linear(x, Dense(weight), None, a.requires_grad_(), b.requires_grad_(), SCALE)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert a.grad is not None and a.grad.dtype == torch.float32
    assert b.grad is not None and b.grad.dtype == torch.float32


def test_b_zero_is_the_base_and_only_b_learns() -> None:
    x, weight, bias, a, b = operands(torch.float32)
    a, b = a.requires_grad_(), torch.zeros_like(b).requires_grad_()
    out = adapted_linear(x, Dense(weight), bias, a, b, SCALE)
    assert torch.equal(out, F.linear(x, weight, bias))
    out.sum().backward()
    assert a.grad is not None and not a.grad.any()
    assert b.grad is not None and b.grad.all()


def siblings(
    dtype: torch.dtype, kind: str = "adapted", tokens: int = 5, inputs: int = 8, wider: int = 1
) -> tuple[Tensor, list[Projection]]:
    """x, and three projections of it, of different outputs and ranks, one without a bias, whose A and B learn.

    ``some``: the one in the middle has no update; ``dropped``: each reads x through a dropout of its own, but for the last;
    ``scaled``: the first is scaled otherwise.
    """
    x, parts = operands(dtype, tokens, inputs)[0], []
    for outputs, rank in ((6, 3), (4, 2), (10, 1)):
        weight, bias, a, b = (operands(dtype, tokens, inputs, wider * outputs, wider * rank))[1:]
        parts.append((weight, None, a, b) if not parts else (weight.flip(0), bias, a.flip(0), b))
    found = []
    for index, (weight, bias, a, b) in enumerate(parts):
        scale = SCALE / 2 if kind == "scaled" and index == 0 else SCALE
        dropout = Dropout(0.5, index) if kind == "dropped" and index < 2 else None
        update = Update(a.requires_grad_(), b.requires_grad_(), scale, dropout)
        found.append(Projection(Dense(weight), bias, None if kind == "some" and index == 1 else update))
    return x, found


KINDS = ["adapted", "some", "dropped", "scaled"]


@pytest.mark.parametrize("x_learns", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_siblings(kind: str, x_learns: bool) -> None:
    x, projections = siblings(torch.float64, kind)
    updates = [projection.update for projection in projections if projection.update]

    def op(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        given = iter(zip(factors[::2], factors[1::2], strict=True))
        renewed = (
            one._replace(update=one.update._replace(**dict(zip("ab", next(given), strict=True)))) if one.update else one
            for one in projections
        )
        return tuple(out for out in project(x, *renewed) if out.requires_grad)

    factors = [factor for update in updates for factor in (update.a, update.b)]
    assert torch.autograd.gradcheck(op, (x.requires_grad_(x_learns), *factors))


@pytest.mark.parametrize("kind", KINDS)
def test_siblings_are_what_each_is_by_itself(kind: str) -> None:
    x, projections = siblings(torch.float32, kind, tokens=70)
    for out, one in zip(project(x, *projections), projections, strict=True):
        assert torch.equal(out, project(x, one)[0])
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            x, projections = siblings(dtype, kind, tokens=70)
            for out, one in zip(project(x, *projections), projections, strict=True):
                assert torch.equal(out, project(x, one)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_siblings_in_bf16_pass_on_the_gradients_of_the_formula(kind: str) -> None:
    """With the masks that the bf16 calls draw: as near to the truth as one op and sum after the other, by the 1.2 of the house."""
    x, projections = siblings(torch.bfloat16, kind, tokens=96, inputs=96, wider=16)
    masters = [master for one in projections if one.update for master in one.update[:2]]
    torch.manual_seed(1)
    upstream = [torch.randn(len(x), one.weight.dense().shape[0]).bfloat16() for one in projections]
    masks = [
        one.update.dropout(torch.ones_like(x)) != 0 if one.update and one.update.dropout else None
        for one in projections
    ]

    def by_formula(dtype: torch.dtype) -> tuple[Tensor, ...]:
        learning, outs = x.to(dtype).requires_grad_(), []
        for one, mask in zip(projections, masks, strict=True):
            weight, bias = one.weight.dense().to(dtype), None if one.bias is None else one.bias.to(dtype)
            dropped = learning if mask is None else torch.where(mask, learning / 0.5, 0)
            if one.update is None:
                outs.append(F.linear(learning, weight, bias))
            else:
                a, b, scale, _ = one.update
                outs.append(plain(learning, dropped, weight, bias, a.to(dtype), b.to(dtype), scale))
        return torch.autograd.grad(outs, [learning, *masters], [grad.to(dtype) for grad in upstream])

    x.requires_grad_()
    ours = torch.autograd.grad(project(x, *projections), [x, *masters], upstream)
    for exact, found, usual in zip(by_formula(torch.float64), ours, by_formula(torch.bfloat16), strict=True):
        assert error(found, exact) <= 1.2 * error(usual, exact) < 0.05


def test_an_output_that_nobody_uses_has_no_part_in_the_gradients() -> None:
    x, projections = siblings(torch.float32)
    project(x, *projections)[1].sum().backward()
    learnt = [one.update.a.grad for one in projections if one.update]
    assert [bool(grad is not None and grad.any()) for grad in learnt] == [False, True, False]


def test_frozen_siblings_keep_nothing_and_below_the_lowest_adapter_nobody_asks_for_their_gradient() -> None:
    x, projections = siblings(torch.float32, "some")
    frozen, kept = projections[1], []
    assert [out.requires_grad for out in project(x, *projections)] == [True, False, True]
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        assert [out.requires_grad for out in project(x.requires_grad_(), frozen, frozen)] == [True, True]
    assert not kept


def of_every_form(rows: int, inputs: int) -> list[Frozen]:
    """A weight [rows, inputs] as it is, and stored in each other form."""
    weight = torch.randn(rows, inputs)
    fourbit = FourBit(rows, inputs, torch.float32, kind="nf4", double=True, scratch=SharedBuffer())
    fourbit.store(weight)
    return [Dense(weight), fourbit, made(Int8, weight), made(Fp8, weight)]


def test_every_form_adds_the_products_beside_it() -> None:
    torch.manual_seed(0)
    x, grad, narrow, a, b = (torch.randn(size) for size in ((9, 64), (9, 32), (9, 4), (4, 64), (4, 32)))
    for form in of_every_form(32, 64):
        alone, back = form.multiply(x, None).clone(), form.multiply_back(grad).clone()
        torch.testing.assert_close(form.multiply(x, None, (narrow, b)), alone + narrow @ b)
        torch.testing.assert_close(form.multiply_back(grad, (narrow, a)), back + narrow @ a)


def test_siblings_in_every_form_pass_on_the_sum_of_their_gradients() -> None:
    torch.manual_seed(0)
    grads = torch.randn(2, 9, 32)
    for first, second in zip(of_every_form(32, 64), of_every_form(32, 64), strict=True):
        expected = first.multiply_back(grads[0]).clone() + second.multiply_back(grads[1])
        torch.testing.assert_close(multiply_back([first, second], list(grads)), expected)
