"""The FP8 weight: its products within fp32 of the emulation, its error, non-finite numbers, and torch's own GEMM."""

from typing import Any

import pytest
import torch
from low_precision import FP32, UNIT, emulated, fp8_rows, made
from models import error
from torch import Tensor

from lamina.ops.fp8 import (
    E4M3,
    Fp8,
    emulated_product,
    fp8_bytes,
    native_product,
    quantise_rows,
    scaled_product,
)
from lamina.ops.frozen import Dense, prepared
from lamina.ops.int8 import ROWS

SHAPES = [(1, 8, 8), (1, 1, 1), (5, 7, 3), (33, 65, 17), (64, 128, 96)]  # rows, inputs, outputs
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def sample(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, bias, gradient; W as a view that is not contiguous."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(inputs, outputs).t() / inputs**0.5
    return x, weight, torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)


def assert_close(out: Tensor, expected: tuple[Tensor, Tensor], terms: int) -> None:
    """Products are exact; fp32 sums of n terms in any order, two scales and a bias are n + 3 roundings; then one more."""
    truth, magnitudes = expected
    fp32 = (terms + 3) * FP32 * (magnitudes + truth.abs())
    assert ((out.double() - truth).abs() <= fp32 + UNIT[out.dtype] * (truth.abs() + fp32)).all()


@BOTH
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_products_are_those_of_the_emulation(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight, bias, grad = sample(rows, inputs, outputs, dtype)
    form = made(Fp8, weight, dtype)
    assert form.multiply(x).dtype == form.multiply_back(grad).dtype == dtype
    assert_close(form.multiply(x), emulated(form, x), inputs)
    assert_close(form.multiply(x, bias), emulated(form, x, bias=bias), inputs)
    assert_close(form.multiply_back(grad), emulated(form, grad, back=True), outputs)


@BOTH
def test_rows_are_rounded_as_the_type_is_defined(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(40, 65) * 2.0 ** torch.randint(-12, 1, (40, 65))).to(dtype)
    for found, expected in zip(quantise_rows(x), fp8_rows(x.float()), strict=True):
        assert torch.equal(found.double(), expected.double())


def test_many_rows_of_a_weight_are_those_of_each_part() -> None:
    weight = torch.randn(ROWS + 3, 5)
    form = made(Fp8, weight)
    codes, scale = fp8_rows(weight)
    assert torch.equal(form.codes.double(), codes) and torch.equal(form.scale, scale.squeeze(1))


@BOTH
def test_views_give_what_copies_give(dtype: torch.dtype) -> None:
    _, weight, _, grad = sample(6, 10, 4, dtype)
    form = made(Fp8, weight)
    wide, tall = torch.randn(6, 25).to(dtype), torch.randn(4, 6).to(dtype)
    assert torch.equal(form.multiply(wide[:, 5:15]), form.multiply(wide[:, 5:15].clone()))
    assert torch.equal(form.multiply_back(tall.t()), form.multiply_back(tall.t().contiguous()))
    assert form.multiply(wide[:0, :10]).shape == (0, 4) and form.multiply_back(grad[:0]).shape == (0, 10)


@BOTH
def test_error_to_the_truth(dtype: torch.dtype) -> None:
    """Steps of 2⁻³ to 2⁻⁴ of a number: uniform within them, 2.6 % a side, by √2 for two sides."""
    x, weight, _, grad = sample(200, 1000, 600, dtype)
    form = made(Fp8, weight, dtype)
    assert 0.022 < error(form.dense(), weight.double()) < 0.030
    assert 0.032 < error(form.multiply(x), x.double() @ weight.double().t()) < 0.042
    assert 0.032 < error(form.multiply_back(grad), grad.double() @ weight.double()) < 0.042


def test_dense_is_what_the_products_see() -> None:
    _, weight, _, _ = sample(1, 9, 5, torch.float32)
    form = made(Fp8, weight, torch.bfloat16)
    assert torch.equal(form.dense(), (form.codes.float() * form.scale[:, None]).to(torch.bfloat16))


@BOTH
def test_rows_and_columns_of_zeros(dtype: torch.dtype) -> None:
    x, weight, bias, grad = sample(4, 6, 5, dtype)
    x[1], grad[2] = 0, 0
    weight[3], weight[:, 2] = 0, 0
    form = made(Fp8, weight, dtype)
    out, back = form.multiply(x, bias), form.multiply_back(grad)
    assert torch.equal(out[1], bias) and torch.equal(out[:, 3], bias[3].expand(4))
    assert not back[2].any() and not back[:, 2].any()


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_stay_in_sight(bad: float, dtype: torch.dtype) -> None:
    x, weight, _, grad = sample(5, 20, 12, dtype)
    form = made(Fp8, weight, dtype)
    x[2, 7] = grad[2, 7] = bad
    for out in (form.multiply(x), form.multiply_back(grad)):
        assert not out[2].isfinite().any()
        assert out[[0, 1, 3, 4]].isfinite().all()
    weight[1, 3] = bad
    form.store(weight)
    assert not form.multiply(x)[:, 1].isfinite().any()
    assert not form.dense()[1].isfinite().any()


@pytest.mark.parametrize("largest", [448.0, 1e-3, 3.0, 7.7, 1e30])
def test_the_largest_number_of_a_row_stays_finite(largest: float) -> None:
    codes, scale = quantise_rows(torch.tensor([[largest, -largest, largest / 2]]))
    assert codes.float().tolist() == [[448, -448, 224]]
    assert scale.item() == pytest.approx(largest / 448, rel=FP32)


def test_casting_a_model_leaves_the_weight_alone() -> None:
    x, weight, _, _ = sample(4, 6, 5, torch.float32)
    form = made(Fp8, weight)
    before = form.multiply(x)
    torch.nn.Sequential(form).to(torch.bfloat16).half().double()
    assert torch.equal(form.multiply(x), before)
    assert not list(form.parameters())


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 7), (64, 48)])
def test_bytes_are_those_predicted(outputs: int, inputs: int) -> None:
    form = Fp8(outputs, inputs, torch.bfloat16, scratch=torch.empty)
    assert form.nbytes == sum(b.numel() * b.element_size() for b in form.buffers()) == fp8_bytes(outputs, inputs)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Fp8) -> Tensor:
        ctx.form = form
        return form.multiply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.form.multiply_back(grad), None


@BOTH
def test_gradient_is_that_of_the_emulation(dtype: torch.dtype) -> None:
    x, weight, _, grad = sample(6, 10, 4, dtype)
    form, leaf = made(Fp8, weight, dtype), x.clone().requires_grad_()
    out = Linear.apply(leaf, form)
    out.backward(grad)
    assert leaf.grad is not None
    assert_close(leaf.grad, emulated(form, grad, back=True), 4)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_torchs_gemm_gives_what_the_emulation_gives(rows: int, with_bias: bool) -> None:
    """On the CPU, where torch has one too: the operands as they are for CUDA, padded rows and contiguous columns."""
    x, weight, bias, _ = sample(rows, 64, 48, torch.bfloat16)
    form = made(Fp8, weight, torch.bfloat16)
    codes, scale = quantise_rows(x)
    given = (codes, scale, form.codes.t(), form.scale[None], bias if with_bias else None)
    expected = emulated(form, x, bias=bias if with_bias else None)
    assert_close(native_product(*given), expected, 64)
    assert_close(emulated_product(*given, torch.bfloat16), expected, 64)
    assert torch.equal(scaled_product(*given, torch.bfloat16), emulated_product(*given, torch.bfloat16))


def test_rows_that_are_prepared_once_give_the_same_bits() -> None:
    x, weight, bias, _ = sample(7, 64, 48, torch.bfloat16)
    one, other = made(Fp8, weight, torch.bfloat16), made(Fp8, weight * 2, torch.bfloat16)
    given = prepared(x, [one, other])
    assert given.codes.dtype == E4M3
    for form in (one, other):
        assert torch.equal(form.multiply(given, bias), form.multiply(x, bias))
    assert prepared(x, [one]) is x  # nobody else reads it
    assert prepared(x, [one, Dense(weight)]) is x


def test_every_code_is_a_number_that_fp32_multiplies_exactly() -> None:
    """What the emulation rests on: products of e4m3 have eight bits of mantissa."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    codes = codes[codes.isfinite()]
    assert len(codes) == 254
    assert torch.equal((codes[:, None] * codes).double(), codes.double()[:, None] * codes.double())
