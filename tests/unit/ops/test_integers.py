"""The kernels of the int8 weight: the bits of the emulation, whatever lies where, and the memory that is announced."""

import pytest
import torch
from low_precision import FP32, UNIT, emulated, made, same_order, sample
from torch import Tensor

from lamina import native
from lamina.ops import int8
from lamina.ops.int8 import ROWS, WIDEST, Int8, working_memory
from lamina.ops.products import added

needs_kernels = pytest.mark.skipif(
    not int8.faster(64, 64, "cpu", torch.bfloat16), reason="no kernels that are faster than oneDNN"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were called."""
    names: list[str] = []
    call = native.call

    def told(name: str, *arguments: native.Argument, **settings: int | None) -> None:
        names.append(name)
        call(name, *arguments, **settings)

    monkeypatch.setattr(native, "call", told)
    return names


@needs_kernels
@pytest.mark.parametrize("inputs", [1, 3, 4, 17, 64, 130, 770])
@pytest.mark.parametrize("outputs", [32, 63, 64, 129])
def test_kernels_give_the_bits_of_the_emulation(inputs: int, outputs: int, calls: list[str]) -> None:
    """Ends of rows, of panels and of words of four terms, in both directions; the last rows of a tile are one to five."""
    for rows in (32, 49, 64, 101):
        x, weight, bias, _ = sample(rows, inputs, outputs, torch.bfloat16)
        form = made(Int8, weight)
        assert torch.equal(form.multiply(x), same_order(form, x))
        assert torch.equal(form.multiply(x, bias), same_order(form, x, bias=bias))
        _, weight, _, grad = sample(rows, outputs, inputs, torch.bfloat16)
        form = made(Int8, weight)
        assert torch.equal(form.multiply_back(grad), same_order(form, grad, back=True))
    assert calls == 4 * 3 * ["integer_rows", "integer_products"]


@needs_kernels
def test_kernels_read_rows_that_lie_apart_and_leave_the_rest_to_torch(calls: list[str]) -> None:
    x, weight, bias, _ = sample(64, 40, 32, torch.bfloat16)
    form, wide = made(Int8, weight), torch.randn(64, 95).bfloat16()
    assert torch.equal(form.multiply(wide[:, 3:43]), same_order(form, wide[:, 3:43]))
    assert torch.equal(form.multiply(x[:1].expand(64, 40)), same_order(form, x)[:1].expand(64, 32))
    assert len(calls) == 4
    assert torch.equal(form.multiply(x.t().contiguous().t(), bias), same_order(form, x, bias=bias))
    assert torch.equal(form.multiply(x[:31], bias), same_order(form, x[:31], bias=bias))
    assert torch.equal(form.multiply(x, bias.float()), same_order(form, x, bias=bias))
    assert form.multiply(x.float()).dtype == torch.float32
    assert len(calls) == 4


@needs_kernels
@pytest.mark.parametrize("size", [0.0, 1e-37, 1e-30, 3e-30, 1e30, 3e38, float("inf"), float("-inf"), float("nan")])
def test_rows_of_any_size_are_quantised_as_torch_does(size: float, calls: list[str]) -> None:
    """And whatever a row holds, the others have the bits that they would have without it."""
    x, weight, bias, grad = sample(64, 50, 50, torch.bfloat16)
    form = made(Int8, weight)
    x[::7] *= size
    x[5, 49] = grad[5, 49] = size
    for got, expected in (
        (form.multiply(x, bias), same_order(form, x, bias=bias)),
        (form.multiply_back(grad), same_order(form, grad, back=True)),
    ):
        finite = expected.isfinite()
        assert torch.equal(got.isfinite(), finite) and torch.equal(got[finite], expected[finite])
        assert finite.all(1).sum() >= 53
    assert len(calls) == 4


@needs_kernels
@pytest.mark.parametrize("inputs", [4096, WIDEST])
def test_kernels_do_not_saturate(inputs: int, calls: list[str]) -> None:
    """Sums as large as they can be of either sign; those of bytes without a sign pass int32's ends on the way."""
    form = made(Int8, torch.ones(32, inputs))
    form.codes[::2] = -127
    x = torch.ones(32, inputs).bfloat16()
    x[1::2] = -1
    assert torch.equal(form.multiply(x), same_order(form, x))
    back = made(Int8, torch.ones(inputs, 32))
    back.codes[:, ::2] = -127
    assert torch.equal(back.multiply_back(x), same_order(back, x, back=True))
    assert len(calls) == 4


@needs_kernels
@pytest.mark.parametrize("terms", [2, 6, 64, 256])
@pytest.mark.parametrize("turned", [False, True])
def test_a_narrow_product_is_added_before_the_one_rounding(terms: int, turned: bool, calls: list[str]) -> None:
    """To what is known in fp32: one rounding to bf16, and one to fp32 for every term of a sum."""
    for rows, inputs, outputs in ((32, 7, 32), (ROWS + 5, 40, 90), (61, 130, 64)):
        x, weight, bias, grad = sample(rows, inputs, outputs, torch.bfloat16)
        form = made(Int8, weight)
        wide = torch.randn(rows, terms + 3).bfloat16()
        for back in (False, True) if inputs >= 32 else (False,):
            a, b = wide[:, 1 : 1 + terms], torch.randn(terms, inputs if back else outputs).bfloat16()
            beside = a, b.t().contiguous().t() if turned else b
            got = form.multiply_back(grad, beside) if back else form.multiply(x, bias, beside)
            base, sizes = emulated(form, grad, back=True) if back else emulated(form, x, bias=bias)
            exact, sizes = base + a.double() @ b.double(), sizes + a.double().abs() @ b.double().abs()
            bound = UNIT[torch.bfloat16] * exact.abs() + (terms + 6) * FP32 * (sizes + bias.abs().max().double())
            assert ((got.double() - exact).abs() <= bound).all(), (rows, back)
    assert "products" not in calls


@needs_kernels
def test_other_products_are_added_as_everywhere() -> None:
    x, weight, bias, _ = sample(64, 40, 32, torch.bfloat16)
    form = made(Int8, weight)
    pairs = [(torch.randn(64, terms).bfloat16(), torch.randn(terms, 32).bfloat16()) for terms in (3, 8, 258)]
    for beside in ([pairs[0]], [pairs[2]], pairs[1:]):
        assert torch.equal(form.multiply(x, bias, *beside), added(form.multiply(x, bias), *beside))


@needs_kernels
def test_a_row_is_the_same_among_any_others_and_on_any_threads() -> None:
    x, weight, bias, grad = sample(500, 96, 200, torch.bfloat16)
    form, before, results = made(Int8, weight), torch.get_num_threads(), []
    narrow, a, b = torch.randn(500, 8).bfloat16(), torch.randn(8, 96).bfloat16(), torch.randn(8, 200).bfloat16()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((form.multiply(x, bias, (narrow, b)), form.multiply_back(grad, (narrow, a))))
            some = slice(100, 171)
            assert torch.equal(form.multiply(x[some], bias, (narrow[some], b)), results[-1][0][some])
            assert torch.equal(form.multiply_back(grad[some], (narrow[some], a)), results[-1][1][some])
    finally:
        torch.set_num_threads(before)
    for out, back in results:
        assert torch.equal(out, results[0][0]) and torch.equal(back, results[0][1])


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_kernels_stay_within_the_memory_that_is_announced(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more threads than tasks too. Results are checked by what lies behind them."""
    x, weight, bias, grad = sample(70, 45, 90, torch.bfloat16)
    form, before, asked = made(Int8, weight), torch.get_num_threads(), []
    narrow, a, b = torch.zeros(70, 256).bfloat16(), torch.randn(256, 45).bfloat16(), torch.randn(256, 90).bfloat16()
    expected = same_order(form, x, bias=bias), same_order(form, grad, back=True)

    def scratch(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        asked.append(torch.full((numel + 64,), 77, dtype=dtype))
        return asked[-1][:numel]

    def padded(self: Tensor, rows: int, columns: int) -> Tensor:
        asked.append(torch.full((rows * columns + 64,), 3.0, dtype=self.dtype))
        return asked[-1][: rows * columns].view(rows, columns)

    torch.set_num_threads(threads)
    try:
        form.scratch = scratch
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", padded)
            got = form.multiply(x, bias, (narrow, b)), form.multiply_back(grad, (narrow, a))
        sizes = [working_memory(70, 45, 90, kernel=True), working_memory(70, 90, 45, kernel=True)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert [len(asked[1]) - 64, len(asked[3]) - 64] == sizes
    assert all((memory[-64:] == value).all() for memory, value in zip(asked, (3.0, 77) * 2, strict=True))
