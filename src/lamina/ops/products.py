"""Sums of matrix products, scale·Σ aᵢ·bᵢ + bias + onto: what an adapted projection is, forward and backward.

torch takes one product after the other and rounds each sum to the tensors' precision. In bf16 on a CPU a kernel of our own takes
all of them, sums in fp32 and rounds once, where there is one (``native``) that is faster than oneDNN: ``products.c`` where there
are many rows and columns, ``few.c`` where there are few of either.
"""

import ctypes
import struct
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import functional as F

from lamina import native
from lamina.ops.shapes import Float

FEW = 64
"""Rows or columns below which a product waits for the memory of its larger factor, which then is read where it lies and not packed."""

MOST = 8
"""Products in one sum: PARTS in the kernel."""

Product = tuple[Tensor, Tensor]
"""The factors a [N, K] and b [K, M] of a·b; either may be the transpose of a matrix that lies row after row."""


class Sum(NamedTuple):
    """scale·Σ aᵢ·bᵢ + bias, and where it goes, as ``product`` takes it."""

    products: tuple[Product, ...]
    scale: float = 1.0
    bias: Tensor | None = None
    out: Tensor | None = None
    onto: bool = False
    dtype: torch.dtype | None = None


def product(
    *products: Product,
    scale: float = 1.0,
    bias: Float[Tensor, " M"] | None = None,
    out: Float[Tensor, "N M"] | None = None,
    onto: bool = False,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "N M"]:
    """Computes scale·Σ aᵢ·bᵢ + bias, without a graph.

    Args:
        out: where the result goes, or with ``onto`` what it is added to; by default new memory.
        dtype: of new memory; by default that of the factors.
    """
    return _computed(Sum(products, scale, bias, out, onto, dtype))


def several(sums: Sequence[Sum], first: Sequence[Sum] = ()) -> list[Tensor]:
    """Computes each of the sums, without a graph; of few rows all in one call.

    Args:
        first: sums whose results, given as ``out``, those read.
    """
    if native.takes(*sums[0].products[0]) and few_here() and all(map(_few, (*first, *sums))):
        waits = [False] * len(sums)
        waits[0] = bool(first)
        return _by_few([*((one, False) for one in first), *zip(sums, waits, strict=True)])[len(first) :]
    for one in first:
        _computed(one)
    return [_computed(one) for one in sums]


def _few(one: Sum) -> bool:
    """Whether it has few rows or columns, and the kernel for those reads it."""
    a, b = one.products[0]
    return min(a.shape[0], b.shape[1]) < FEW and _readable(one.products, one.bias, one.out, one.dtype, along=True)


def _computed(one: Sum) -> Tensor:
    a, b = one.products[0]
    if not native.takes(a, b):  # asked first: other dtypes and devices need not wait until kernels are compiled
        pass
    elif faster(a.shape[0], b.shape[1]):
        if _readable(one.products, one.bias, one.out, one.dtype):
            return _by_kernel(one)
    elif few_here() and _few(one):
        return _by_few([(one, False)])[0]
    with torch.no_grad():
        return _by_torch(one)


def _by_torch(one: Sum) -> Tensor:
    ((a, b), *others), scale, bias, out, onto, dtype = one
    if a.is_cuda and dtype not in (None, a.dtype) and not others and scale == 1.0 and out is bias is None:
        return torch.mm(a, b, out_dtype=dtype)  # its sums are fp32 and are not rounded in between
    if out is None and scale == 1.0:
        total = F.linear(a, b.t(), bias)
    else:
        to = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
        total = to.addmm_(a, b, beta=int(onto), alpha=scale)
        total = total if bias is None else total.add_(bias)
    for a, b in others:
        total.addmm_(a, b, alpha=scale)
    return total if dtype is None else total.to(dtype)


def added(to: Float[Tensor, "N M"], *products: Product) -> Float[Tensor, "N M"]:
    """``to``, with the products added in place, if there are any."""
    return product(*products, out=to, onto=True) if products else to


def faster(rows: int, columns: int) -> bool:
    """Whether the kernel that packs is there for a result of this size in bf16 on a CPU, and faster than torch."""
    return min(rows, columns) >= FEW and _here()


@cache
def few_here() -> bool:
    """Whether there is a kernel for few rows or columns in bf16 on a CPU, of factors that both lie along the sum."""
    return native.library() is not None and bool(native.ask("few_here"))


@cache
def _here() -> bool:
    return native.library() is not None and bool(native.ask("products_here"))


def _readable(
    products: tuple[Product, ...],
    bias: Tensor | None,
    out: Tensor | None,
    dtype: torch.dtype | None,
    along: bool = False,
) -> bool:
    """Whether the kernel reads these as they are. What does not fit together is torch's, which says so.

    With ``along`` both factors have to lie along the sum. Otherwise pairs along a sum are read as one word; only where both factors are
    packed anyway may their number be odd.
    """
    rows, columns = products[0][0].shape[0], products[0][1].shape[1]
    for a, b in products:
        inner = a.shape[1]
        if not (a.dtype is b.dtype is torch.bfloat16 and a.is_cpu and b.is_cpu):
            return False
        if a.shape != (rows, inner) or b.shape != (inner, columns):
            return False
        (_, a_column), (b_row, b_column) = a.stride(), b.stride()
        if along and (a_column != 1 or b_row != 1):
            return False
        if not along and not (1 in a.stride() and 1 in b.stride()):
            return False
        if not along and inner % 2 and (a_column == 1 or b_column != 1):
            return False
    if bias is not None and not (bias.dtype is torch.bfloat16 and bias.shape == (columns,) and bias.is_contiguous()):
        return False
    if out is not None and not (out.is_cpu and out.shape == (rows, columns)):
        return False
    return len(products) <= MOST and (dtype if out is None else out.dtype) in (None, torch.bfloat16, torch.float32)


def _by_kernel(one: Sum) -> Tensor:
    products, scale, bias, out, onto, dtype = one
    a, b = products[0]
    rows, columns = a.shape[0], b.shape[1]
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype or a.dtype, device="cpu")
    job = [out.data_ptr(), rows, columns, *out.stride(), out.dtype == torch.float32, onto]
    job += [0 if bias is None else bias.data_ptr(), len(products)]
    terms, turned = 0, False
    for a, b in products:
        job += [a.data_ptr(), b.data_ptr(), a.shape[1], *_lines(a), *_lines(b)]
        terms, turned = terms + a.shape[1] + a.shape[1] % 2, turned or a.stride(1) != 1
    memory = torch.empty(working_memory(rows, columns, terms, turned), dtype=torch.uint8, device="cpu")
    native.call("products", (ctypes.c_long * len(job))(*job), float(scale), memory)
    increment_version(out)
    return out


def _by_few(sums: Iterable[tuple[Sum, bool]]) -> list[Tensor]:
    """All of them in one call, each with whether it reads what those before it make."""
    job, outs = array("q"), []
    for (products, scale, bias, out, onto, dtype), waits in sums:
        rows, columns = products[0][0].shape[0], products[0][1].shape[1]
        turned = columns < rows  # then the columns are the few
        if out is None:
            out = torch.empty(rows, columns, dtype=dtype or torch.bfloat16, device="cpu")
        job.extend((out.data_ptr(), min(rows, columns), max(rows, columns), *out.stride()))
        job.extend((out.dtype is torch.float32, onto, turned, waits, 0 if bias is None else bias.data_ptr()))
        job.extend((_bits(scale), len(products)))
        for a, b in products:
            if turned:
                job.extend((b.data_ptr(), a.data_ptr(), a.shape[1], b.stride(1), a.stride(0)))
            else:
                job.extend((a.data_ptr(), b.data_ptr(), a.shape[1], a.stride(0), b.stride(1)))
        outs.append(out)
    native.call("few_products", job.buffer_info()[0], len(outs))
    for out in outs:
        increment_version(out)
    return outs


@cache
def _bits(scale: float) -> int:
    """Of a number in double precision, as an integer."""
    return int.from_bytes(struct.pack("d", scale), "little", signed=True)


def _lines(x: Tensor) -> tuple[int, bool]:
    """From one line of a matrix to the next, and whether a line is a column."""
    row, column = x.stride()
    return (row, False) if column == 1 else (column, True)


def working_memory(rows: int, columns: int, terms: int, turned: bool) -> int:
    """Bytes that the kernel needs beside factors and result.

    Args:
        terms: of the sums of all products, an even number for each; turned: whether an a is a transpose.
    """
    threads = torch.get_num_threads()
    return threads * 4 * native.ask("products_memory", rows, columns, terms, turned, threads)
