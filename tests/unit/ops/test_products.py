"""Sums of products: the kernel against float64 over odd shapes, every way in which matrices lie, and what is left to torch."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.ops import products
from lamina.ops.products import product

SUM, BF16, FP32 = (
    2.0**-24,
    2.0**-8,
    2.0**-24,
)  # half a unit in the last place of what sums are kept in, and of the result
ROWS, COLUMNS, TERMS = (1, 32, 33, 65, 130), (1, 32, 40, 64, 129), (1, 2, 8, 66, 513, 2400)

needs_kernel = pytest.mark.skipif(not products._here(), reason="no kernel that is faster than oneDNN")


def matrix(rows: int, columns: int, turned: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    drawn = torch.randn(columns, rows).t() if turned else torch.randn(rows, columns)
    return drawn.to(dtype)


def kernel_takes(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    rows, columns = pairs[0][0].shape[0], pairs[0][1].shape[1]
    return products.faster(rows, columns) and products._readable(tuple(pairs), None, None, None)


def sums(pairs: list[tuple[Tensor, Tensor]], bias: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """In float64; with ``start`` it is what is rounded and added by absolute value, for the bound of an error."""
    total = sum(a.double() @ b.double() for a, b in pairs)
    assert isinstance(total, Tensor)
    for more in (bias, start):
        total = total if more is None else total + more.double()
    return total


def within(
    got: Tensor, pairs: list[tuple[Tensor, Tensor]], bias: Tensor | None = None, start: Tensor | None = None
) -> bool:
    """Whether the result is off by its own rounding and one of each term of the sum, at most."""
    exact = sums(pairs, bias, start)
    sizes = sums([(a.abs(), b.abs()) for a, b in pairs], *(None if x is None else x.abs() for x in (bias, start)))
    terms = sum(a.shape[1] for a, _ in pairs) + 3
    unit = BF16 if got.dtype == torch.bfloat16 else FP32
    return bool(((got.double() - exact).abs() <= unit * exact.abs() + 2 * terms * SUM * sizes).all())


@pytest.mark.parametrize(("a_turned", "b_turned"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("terms", TERMS)
def test_every_shape_and_layout(terms: int, a_turned: bool, b_turned: bool) -> None:
    torch.manual_seed(terms)
    for rows, columns in itertools.product(ROWS, COLUMNS):
        pairs = [(matrix(rows, terms, a_turned), matrix(terms, columns, b_turned))]
        bias = torch.randn(columns).bfloat16()
        assert within(product(*pairs, bias=bias), pairs, bias), (rows, columns)
        if kernel_takes(pairs):
            assert within(product(*pairs, dtype=torch.float32), pairs), (rows, columns)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_result_can_be_added_to_what_is_there(turned: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pairs = [(matrix(70, 6, False), matrix(6, 90, True))]
    out = matrix(70, 90, turned, dtype)
    start = out.clone()
    if dtype == torch.float32 and not products._here():
        pytest.skip("torch adds to its own precision only")
    assert product(*pairs, out=out, onto=True) is out
    assert within(out, pairs, start=start)
    assert within(product(*pairs, out=out), pairs)


@needs_kernel
def test_a_sum_of_products_is_rounded_once() -> None:
    torch.manual_seed(0)
    pairs = [(matrix(70, inner, i == 1), matrix(inner, 90, i == 2)) for i, inner in enumerate((64, 30, 8, 2400))]
    assert within(product(*pairs), pairs)
    scaled = [(a * 0.5, b) for a, b in pairs]
    assert torch.equal(product(*pairs, scale=0.5), product(*scaled))


@needs_kernel
def test_a_row_is_the_same_among_any_others() -> None:
    """Bit by bit, in whatever order threads take the tasks, from FEW rows on: examples cannot feel each other."""
    torch.manual_seed(0)
    a, b, turned = matrix(500, 96, False), matrix(96, 200, True), matrix(96, 200, False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(product((a, b), (a, turned)))
            part = product((a[100:171], b), (a[100:171], turned))
            assert torch.equal(part, results[-1][100:171])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_nothing_is_written_beside_the_result(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither beside the working memory that is announced, with more threads than tasks too."""
    torch.manual_seed(0)
    sizes = []

    def padded(size: int, **given: object) -> Tensor:
        whole = torch.full((size + 64,), 77, dtype=torch.uint8)
        sizes.append(whole)
        return whole[:size]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for terms, turned in ((40, False), (2500, False), (700, True)):
            around = torch.full((72, 200), 3.0).bfloat16()
            a, b = matrix(70, terms, turned), matrix(terms, 90, False)
            with monkeypatch.context() as patch:
                patch.setattr(products.torch, "empty", padded)
                product((a, b), out=around[1:71, 50:140])
            assert within(around[1:71, 50:140], [(a, b)])
            around[1:71, 50:140] = 3
            assert (around == 3).all() and (sizes[-1][-64:] == 77).all()
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(broken: float) -> None:
    a, b = matrix(64, 40, False), matrix(40, 64, False)
    a[7, 3] = broken
    finite = product((a, b)).isfinite().all(1)
    assert not finite[7] and finite.sum() == 63


@needs_kernel
def test_what_the_kernel_does_not_read_goes_to_torch() -> None:
    torch.manual_seed(0)
    odd = [(matrix(64, 7, False), matrix(7, 64, False))]
    apart = [(torch.randn(64, 16, 2).bfloat16()[..., 0], matrix(16, 64, False))]
    many = [(matrix(64, 8, False), matrix(8, 64, False)) for _ in range(products.MOST + 1)]
    small = [(matrix(3, 8, False), matrix(8, 64, False))]
    for pairs in (odd, apart, many, small):
        assert not kernel_takes(pairs)
    assert within(product(*odd), odd) and within(product(*apart), apart) and within(product(*small), small)
    assert product(*many).shape == (64, 64)
    assert kernel_takes([(odd[0][0].t().contiguous().t(), odd[0][1])])


@needs_kernel
@pytest.mark.parametrize(
    "given", [{"bias": torch.ones(90)}, {"bias": torch.ones(1).bfloat16().expand(90)}, {"dtype": torch.float64}]
)
def test_what_surrounds_the_factors_is_read_right(given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    pairs = [(matrix(70, 64, False), matrix(64, 90, True))]
    bias = given.get("bias")
    if bias is not None and bias.dtype == torch.float32:
        with pytest.raises(RuntimeError, match="dtype"):
            product(*pairs, **given)
    else:
        assert within(product(*pairs, **given).bfloat16(), pairs, bias)


@needs_kernel
@pytest.mark.parametrize(
    "pairs",
    [
        [(matrix(64, 64, False), matrix(66, 64, False))],
        [(matrix(64, 64, False), matrix(64, 64, False).float())],
        [(matrix(64, 64, False), matrix(64, 64, False)), (matrix(64, 64, False), matrix(64, 66, False))],
        [(matrix(64, 64, False), matrix(64, 64, False)), (matrix(66, 64, False), matrix(64, 64, False))],
    ],
)
def test_factors_that_do_not_fit_are_told(pairs: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(RuntimeError):
        product(*pairs)
    with pytest.raises(RuntimeError):
        product((matrix(64, 64, False), matrix(64, 64, False)), out=matrix(64, 66, False))


def test_the_scale_is_applied_before_anything_is_rounded() -> None:
    """A scale that is no power of two, by torch and by the kernel; an integer is a scale too."""
    torch.manual_seed(0)
    for rows, columns in ((70, 8), (70, 90)):
        pairs = [(matrix(rows, 64, False), matrix(64, columns, True))]
        scaled = [(a.double() * 11.31, b.double()) for a, b in pairs]
        error = product(*pairs, scale=11.31).double() - sums(scaled)
        assert (
            error.abs() <= BF16 * sums(scaled).abs() + 128 * SUM * sums([(a.abs(), b.abs()) for a, b in scaled])
        ).all()
        assert torch.equal(product(*pairs, scale=2), product(*pairs, scale=2.0))


@needs_kernel
def test_a_change_in_place_is_seen() -> None:
    out = torch.zeros(64, 64).bfloat16()
    before = out._version
    product((matrix(64, 64, False), matrix(64, 64, False)), out=out)
    assert out._version > before


def test_what_is_not_bf16_waits_for_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> None:
        raise AssertionError("the kernels were asked for")

    monkeypatch.setattr(products.native, "library", asked)
    few, many = (torch.randn(3, 8), torch.randn(8, 70)), (torch.randn(70, 8), torch.randn(8, 70))
    assert torch.equal(product(few), few[0] @ few[1]) and product(many).shape == (70, 70)
    assert [out.shape for out in products.several([products.Sum((few,)), products.Sum((many,))])] == [(3, 70), (70, 70)]


@needs_kernel
def test_the_default_device_is_not_where_the_result_lies() -> None:
    pairs = [(matrix(70, 64, False), matrix(64, 90, True))]
    few = [(matrix(3, 64, False), matrix(64, 90, True))]
    expected = product(*pairs), product(*few)
    with torch.device("meta"):
        found = product(*pairs), product(*few)
    assert all(map(torch.equal, found, expected))


def test_no_graph_is_made() -> None:
    a, b = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
    assert not product((a, b)).requires_grad
