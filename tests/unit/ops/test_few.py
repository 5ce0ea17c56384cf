"""Sums of products with few rows or columns: the kernel against float64 over odd shapes and strides, alone and several at once."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.ops import products
from lamina.ops.products import FEW, Sum, product, several

SUM = 2.0**-24
UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""Half a unit in the last place of what sums are kept in, and of the result."""

FEW_LINES, MANY_LINES, TERMS = (1, 2, 5, 6, 7, 13, 16, 33, 63), (1, 3, 15, 64, 66, 130), (1, 2, 31, 32, 33, 95, 200)

needs_kernel = pytest.mark.skipif(not products.few_here(), reason="no kernel that is faster than oneDNN")


def along(lines: int, terms: int, apart: int = 0) -> Tensor:
    """Lines along the sum, with so many other numbers, none of them finite, between one and the next."""
    whole = torch.full((lines, terms + apart), torch.nan).bfloat16()
    whole[:, :terms] = torch.randn(lines, terms)
    return whole[:, :terms]


def pairs_of(rows: int, columns: int, *terms: int, apart: int = 0) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((along(rows, inner, apart), along(columns, inner, apart).t()) for inner in terms)


def within(got: Tensor, one: Sum, start: Tensor | None = None) -> bool:
    """Whether the result is off by its own rounding and one of each term of the sum, at most; numbers that are subnormal in bf16 count
    as zero."""
    exact, sizes = 0, 0
    for a, b in one.products:
        exact, sizes = exact + a.double() @ b.double(), sizes + a.double().abs() @ b.double().abs()
    exact, sizes = exact * one.scale, sizes * abs(one.scale)
    for more in (one.bias, start):
        if more is not None:
            exact, sizes = exact + more.double(), sizes + more.double().abs()
    terms = sum(len(b) for _, b in one.products) + 3
    bound = UNIT[got.dtype] * exact.abs() + 2 * terms * SUM * sizes + torch.finfo(torch.bfloat16).tiny
    return bool(((got.double() - exact).abs() <= bound).all())


@needs_kernel
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("turned", [False, True])
def test_every_number_of_lines(terms: int, turned: bool) -> None:
    torch.manual_seed(terms)
    for few, many, apart in itertools.product(FEW_LINES, MANY_LINES, (0, 3)):
        rows, columns = (many, few) if turned else (few, many)
        bias = torch.randn(columns).bfloat16()
        one = Sum(pairs_of(rows, columns, terms, apart=apart), bias=bias, scale=0.3)
        assert products._few(one)
        assert within(product(*one.products, bias=bias, scale=0.3), one), (rows, columns, apart)


@needs_kernel
@pytest.mark.parametrize(("rows", "columns"), [(7, 90), (90, 7), (20, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["rows", "columns", "apart", "part"])
@pytest.mark.parametrize("onto", [False, True])
def test_a_result_lies_anywhere(rows: int, columns: int, dtype: torch.dtype, layout: str, onto: bool) -> None:
    """And nothing beside it is written."""
    torch.manual_seed(0)
    shape = (columns, 2 * rows + 9) if layout == "columns" else (rows + 1, 2 * columns + 9)
    around = torch.full(shape, 3.0, dtype=dtype)
    out = {
        "rows": around.flatten()[: rows * columns].view(rows, columns),
        "columns": around.t()[1 : rows + 1],
        "apart": around[:rows, 1 : 2 * columns + 1 : 2],
        "part": around[1:, 5 : columns + 5],
    }[layout]
    out.copy_(torch.randn(rows, columns))
    start, one = out.clone(), Sum(pairs_of(rows, columns, 40, 16), bias=torch.randn(columns).bfloat16())
    assert product(*one.products, bias=one.bias, out=out, onto=onto) is out
    assert within(out, one, start if onto else None)
    out.fill_(3)
    assert (around == 3).all()


@needs_kernel
def test_a_sum_of_products_is_rounded_once() -> None:
    torch.manual_seed(0)
    for rows, columns in ((3, 100), (100, 3)):
        one = Sum(pairs_of(rows, columns, 64, 30, 7, 500))
        assert within(product(*one.products), one) and within(product(*one.products, dtype=torch.float32), one)


@needs_kernel
def test_a_row_is_the_same_among_any_others() -> None:
    """Bit by bit, and with any number of threads."""
    torch.manual_seed(0)
    ((a, b),) = pairs_of(63, 3000, 96)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(product((a, b)))
            for rows in (slice(1), slice(5, 9), slice(20, 61)):
                assert torch.equal(product((a[rows], b)), results[-1][rows])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernel
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(broken: float) -> None:
    ((a, b),) = pairs_of(13, 70, 45)
    a[7, 44] = broken
    finite = product((a, b)).isfinite().all(1)
    assert not finite[7] and finite.sum() == 12


@needs_kernel
def test_several_are_those_of_one_after_the_other() -> None:
    """Also where the last read what the first make, as an adapter's products do, and threads share the work."""
    torch.manual_seed(0)
    x, inputs = along(16, 768), 768
    sizes, scales = (768, 256, 300), (2.0, 0.3, -1.0)
    inners = [torch.full((16, 16), torch.nan).bfloat16() for _ in sizes]
    first = [Sum(((x, along(16, inputs).t()),), scale, out=inner) for scale, inner in zip(scales, inners, strict=True)]
    sums = [
        Sum(((x, along(size, inputs).t()), (inner, along(size, 16).t())), bias=torch.randn(size).bfloat16())
        for size, inner in zip(sizes, inners, strict=True)
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for _ in range(20):
                for inner in inners:
                    inner.fill_(torch.nan)
                together = several(sums, first)
                for one in first:
                    product(*one.products, scale=one.scale, out=one.out)
                for got, one in zip(together, sums, strict=True):
                    assert torch.equal(got, product(*one.products, bias=one.bias))
    finally:
        torch.set_num_threads(before)


def test_several_go_to_torch_where_one_has_to() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 40)
    inner = torch.empty(5, 4)
    first = Sum(((x, torch.randn(40, 4)),), out=inner)
    sums = [Sum(((x, torch.randn(40, size)), (inner, torch.randn(4, size)))) for size in (9, 70)]
    for got, one in zip(several(sums, [first]), sums, strict=True):
        assert within(got, one)
    assert within(inner, first)


@needs_kernel
def test_what_the_kernel_does_not_read_goes_to_torch() -> None:
    torch.manual_seed(0)
    left, right = along(4, 40), along(70, 40).t()
    for a, b in ((along(40, 4).t(), right), (left, along(40, 70)), (left.float(), right.float())):
        assert not products._few(Sum(((a, b),)))
        assert within(product((a, b)), Sum(((a, b),)))
    for wrong in (along(70, 42).t(), right.float()):
        with pytest.raises(RuntimeError):
            product((left, wrong))
    with pytest.raises(RuntimeError):
        product((left, right), out=along(4, 71))


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 40, 70), (4, 0, 70), (4, 40, 0), (70, 0, 4)])
def test_nothing_is_computed_of_nothing(shape: Any) -> None:
    rows, terms, columns = shape
    got = product((along(rows, terms), along(columns, terms).t()), bias=torch.ones(columns).bfloat16())
    assert got.shape == (rows, columns) and (terms or (got == 1).all())


@needs_kernel
def test_a_change_in_place_is_seen() -> None:
    out = torch.zeros(4, 70).bfloat16()
    before = out._version
    product(*pairs_of(4, 70, 8), out=out)
    assert out._version > before


def test_few_is_what_the_kernel_has_room_for() -> None:
    assert FEW == 64, "MOST in few.c"
