"""The int8 weight: its products to the bit, its error, non-finite numbers, and the road to every GEMM."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from low_precision import FP32, int8_rows, made, same_order, sample
from models import error
from torch import Tensor

from lamina.errors import ModelError
from lamina.ops.int8 import (
    ROWS,
    WIDEST,
    Int8,
    cpu_is_exact,
    cuda_product,
    int8_bytes,
    integer_product,
    plain_product,
    quantise_rows,
)

SHAPES = [(1, 8, 8), (1, 1, 1), (5, 7, 3), (33, 65, 17), (64, 128, 96)]  # rows, inputs, outputs
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@BOTH
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_products_have_the_bits_of_the_emulation(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight, bias, grad = sample(rows, inputs, outputs, dtype)
    form = made(Int8, weight, dtype)
    assert torch.equal(form.multiply(x), same_order(form, x))
    assert torch.equal(form.multiply(x, bias), same_order(form, x, bias=bias))
    assert torch.equal(form.multiply_back(grad), same_order(form, grad, back=True))


def test_many_rows_are_those_of_each_part() -> None:
    x, weight, bias, grad = sample(ROWS + 3, 5, 4, torch.bfloat16)
    form = made(Int8, weight)
    assert torch.equal(form.multiply(x, bias), same_order(form, x, bias=bias))
    assert torch.equal(form.multiply_back(grad), same_order(form, grad, back=True))
    tall = made(Int8, x)
    codes, scale = int8_rows(x.float())
    assert torch.equal(tall.codes, codes.to(torch.int8)) and torch.equal(tall.scale, scale.squeeze(1))
    assert form.multiply(x[:0]).shape == (0, 4) and form.multiply_back(grad[:0]).shape == (0, 5)


@BOTH
def test_views_give_what_copies_give(dtype: torch.dtype) -> None:
    x, weight, _, grad = sample(6, 10, 4, dtype)
    form = made(Int8, weight)
    wide, tall = torch.randn(6, 25).to(dtype), torch.randn(4, 6).to(dtype)
    assert torch.equal(form.multiply(wide[:, 5:15]), form.multiply(wide[:, 5:15].clone()))
    assert torch.equal(form.multiply_back(tall.t()), form.multiply_back(tall.t().contiguous()))
    assert torch.equal(form.multiply(x.expand(6, 10)[::2]), form.multiply(x)[::2])
    assert torch.equal(form.multiply_back(grad)[1:2], form.multiply_back(grad[1:2]))


@BOTH
def test_error_to_the_truth(dtype: torch.dtype) -> None:
    """Steps are max/127, about 3.5 σ/127 over 1,000 normal numbers; their error is a 12th of that squared: 0.8 % a side."""
    x, weight, _, grad = sample(200, 1000, 600, dtype)
    form = made(Int8, weight, dtype)
    assert 0.005 < error(form.dense(), weight.double()) < 0.01
    assert 0.008 < error(form.multiply(x), x.double() @ weight.double().t()) < 0.014
    assert 0.008 < error(form.multiply_back(grad), grad.double() @ weight.double()) < 0.014


def test_dense_is_what_the_products_see() -> None:
    _, weight, _, _ = sample(1, 9, 5, torch.float32)
    form = made(Int8, weight, torch.bfloat16)
    assert torch.equal(form.dense(), (form.codes * form.scale[:, None]).to(torch.bfloat16))


@BOTH
def test_rows_and_columns_of_zeros(dtype: torch.dtype) -> None:
    x, weight, bias, grad = sample(4, 6, 5, dtype)
    x[1], grad[2] = 0, 0
    weight[3], weight[:, 2] = 0, 0
    form = made(Int8, weight, dtype)
    out, back = form.multiply(x, bias), form.multiply_back(grad)
    assert torch.equal(out[1], bias) and torch.equal(out[:, 3], bias[3].expand(4))
    assert not back[2].any() and not back[:, 2].any()
    assert torch.equal(out, same_order(form, x, bias=bias)) and torch.equal(back, same_order(form, grad, back=True))


@BOTH
@pytest.mark.parametrize("size", [1e-20, 1e-37, 1e-40, 1e30])
def test_tiny_and_huge_rows_do_not_wrap(size: float, dtype: torch.dtype) -> None:
    x, weight, _, _ = sample(4, 6, 5, dtype)
    form = made(Int8, weight, dtype)
    out, truth = form.multiply(x * size), (x * size).double() @ weight.double().t()
    if size > 1e-30:
        assert error(out, truth) < 0.02
    else:
        assert not out.any()


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-37, 1e-30, 1.0, 1e38])
def test_only_finite_numbers_become_integers(size: float) -> None:
    """What NaN and infinity become in a cast to int8 is up to the device."""
    x, wide, codes = torch.tensor([[size, -size, 0.0]]), torch.empty(1, 3), torch.empty(1, 3, dtype=torch.int8)
    scale = quantise_rows(x, None, wide, codes)
    assert wide.isfinite().all() and (wide == codes).all()
    assert scale.item() >= 1e-30 / 128


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_stay_in_sight(bad: float, dtype: torch.dtype) -> None:
    x, weight, _, grad = sample(5, 20, 12, dtype)
    form = made(Int8, weight, dtype)
    x[2, 7] = grad[2, 7] = bad
    for out in (form.multiply(x), form.multiply_back(grad)):
        assert not out[2].isfinite().any()
        assert out[[0, 1, 3, 4]].isfinite().all()
    weight[1, 3] = bad
    form.store(weight)
    assert not form.multiply(x)[:, 1].isfinite().any()
    assert not form.dense()[1].isfinite().any()


def test_casting_a_model_leaves_the_weight_alone() -> None:
    x, weight, _, _ = sample(4, 6, 5, torch.float32)
    form = made(Int8, weight)
    before = form.multiply(x)
    torch.nn.Sequential(form).to(torch.bfloat16).half().double()
    assert torch.equal(form.multiply(x), before)
    assert not list(form.parameters())


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 7), (64, 48)])
def test_bytes_are_those_predicted(outputs: int, inputs: int) -> None:
    form = Int8(outputs, inputs, torch.bfloat16, scratch=torch.empty)
    assert form.nbytes == sum(b.numel() * b.element_size() for b in form.buffers()) == int8_bytes(outputs, inputs)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Int8) -> Tensor:
        ctx.form = form
        return form.multiply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.form.multiply_back(grad), None


@BOTH
def test_gradient_is_that_of_the_emulation(dtype: torch.dtype) -> None:
    x, weight, _, grad = sample(6, 10, 4, dtype)
    form, leaf = made(Int8, weight, dtype), x.clone().requires_grad_()
    (Linear.apply(leaf, form).square() * grad).sum().backward()
    upstream = grad * (2 * same_order(form, x))
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, same_order(form, upstream, back=True))


def test_the_widest_sum_fits() -> None:
    """Every product is 127²; five roundings: of both scales, of the sum, and of its products with them."""
    form = made(Int8, torch.ones(1, WIDEST))
    assert abs(form.multiply(torch.ones(1, WIDEST)).item() / WIDEST - 1) <= 5 * FP32
    for shape in ((1, WIDEST + 1), (WIDEST + 1, 1)):
        with pytest.raises(ModelError, match=r"is too wide for int8: sums of more than 133144 products"):
            Int8(*shape, torch.float32, scratch=torch.empty)


def integers(*shape: int) -> Tensor:
    """Whole numbers of the full range, half of them at its ends, where a narrow accumulator saturates."""
    inner = torch.randint(-127, 128, shape, dtype=torch.int8)
    return inner.where(torch.rand(shape) < 0.5, inner.sign() * 127)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("columns_contiguous", [False, True])
def test_every_road_gives_the_sums_of_int64(rows: int, columns_contiguous: bool) -> None:
    torch.manual_seed(0)
    a, b = integers(rows, 3000), integers(3000, 24)
    if columns_contiguous:
        b = b.t().contiguous().t()
    expected = (a.long() @ b.long()).int()
    for road in (integer_product, plain_product, *([cuda_product] if cpu_is_exact() else [])):
        out = torch.full((rows, 24), -7, dtype=torch.int32)
        road(a, b, out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (2, 1, 3), (17, 1, 8), (3, 2, 1), (3, 8, 2)])
def test_sums_of_few_products_are_written(rows: int, inner: int, columns: int) -> None:
    """torch 2.13 leaves the result of one transposed column undefined."""
    torch.manual_seed(0)
    a, b = integers(rows, inner), integers(columns, inner).t()
    out = torch.full((rows, columns), -7, dtype=torch.int32)
    integer_product(a, b, out)
    assert torch.equal(out, (a.long() @ b.long()).int())


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX512_CORE", "AVX2"])
def test_a_cpu_whose_sums_saturate_is_found_out(isa: str) -> None:
    """oneDNN told to do without VNNI; without x86, the setting changes nothing and the sums are exact."""
    script = """
import torch
from lamina.ops.int8 import integer_product
a, b = torch.full((33, 768), 127, dtype=torch.int8), torch.full((768, 64), 127, dtype=torch.int8)
out = torch.empty(33, 64, dtype=torch.int32)
integer_product(a, b, out)
print(out.min().item(), out.max().item())
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(768 * 127**2)] * 2


def test_an_llm_int8_checkpoint_is_taken_over() -> None:
    """Two fp32 roundings: of SCB/127, and of its product with the integer."""
    torch.manual_seed(0)
    cb, scb = torch.randint(-127, 128, (5, 8), dtype=torch.int8), torch.rand(5)
    form = made(Int8, torch.zeros(5, 8))
    form.from_bitsandbytes(cb, scb)
    assert torch.equal(form.codes, cb)
    torch.testing.assert_close(form.dense().double(), cb.double() * scb.double()[:, None] / 127, rtol=2 * FP32, atol=0)
    for parts in ((cb.t(), scb), (cb, scb[:1]), (cb.int(), scb)):
        with pytest.raises(ModelError, match=r"an LLM.int8 weight has CB .* expected \[5, 8\] of torch.int8 and \[5\]"):
            form.from_bitsandbytes(*parts)


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_own_weight_is_taken_over() -> None:
    """Three more roundings of theirs."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    cb, scb, _ = functional.int8_vectorwise_quant(torch.randn(16, 32).half())
    form = made(Int8, torch.zeros(16, 32))
    form.from_bitsandbytes(cb, scb)
    torch.testing.assert_close(form.dense(), functional.int8_vectorwise_dequant(cb, scb), rtol=5 * FP32, atol=0)
