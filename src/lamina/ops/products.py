"""Sums of matrix products, scale·Σ aᵢ·bᵢ + bias + onto: what an adapted projection is, forward and backward.

torch takes one product after the other and rounds each sum to the tensors' precision. In bf16 on a CPU a kernel of our own takes
all of them, sums in fp32 and rounds once, where there is one (``native``) that is faster than oneDNN.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import native
from lamina.ops.shapes import Float

FEW = 32
"""Rows or columns below which a product is left to torch: it waits for the memory of its factors, whoever computes it."""

MOST = 8
"""Products in one sum."""

Product = tuple[Tensor, Tensor]
"""The factors a [N, K] and b [K, M] of a·b; either may be the transpose of a matrix that lies row after row."""


@torch.no_grad()
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
    if _by_kernel(products):
        return _by_one_kernel(products, scale, bias, out, onto, dtype)
    (a, b), *others = products
    if out is None:
        total = F.linear(a, b.t(), bias if scale == 1.0 else None)
    else:
        total = out.addmm_(a, b, beta=int(onto), alpha=scale)
    if out is None and scale != 1.0:
        total.mul_(scale)
    if bias is not None and (out is not None or scale != 1.0):
        total.add_(bias)
    for a, b in others:
        total.addmm_(a, b, alpha=scale)
    return total if dtype is None else total.to(dtype)


def added(to: Float[Tensor, "N M"], *products: Product) -> Float[Tensor, "N M"]:
    """``to``, with the products added in place, if there are any."""
    return product(*products, out=to, onto=True) if products else to


def faster(rows: int, columns: int) -> bool:
    """Whether the kernel is there for a result of this size in bf16 on a CPU, and faster than torch."""
    return min(rows, columns) >= FEW and _here()


@cache
def _here() -> bool:
    return native.library() is not None and bool(native.ask("products_here"))


def _by_kernel(products: tuple[Product, ...]) -> bool:
    """Whether the kernel takes these, and is worth it.

    It reads pairs along a sum as one word; only where it packs both factors anyway may their number be odd.
    """
    a, b = products[0]
    if a.dtype is not torch.bfloat16 or not a.is_cpu or not faster(a.shape[0], b.shape[1]):
        return False
    return (
        all(
            1 in a.stride() and 1 in b.stride() and (a.shape[1] % 2 == 0 or (a.stride(1) != 1 and b.stride(1) == 1))
            for a, b in products
        )
        and len(products) <= MOST
    )


def _by_one_kernel(
    products: tuple[Product, ...],
    scale: float,
    bias: Tensor | None,
    out: Tensor | None,
    onto: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    a, b = products[0]
    rows, columns = a.shape[0], b.shape[1]
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype or a.dtype)
    job = [out.data_ptr(), rows, columns, *out.stride(), out.dtype == torch.float32, onto]
    job += [0 if bias is None else bias.data_ptr(), len(products)]
    terms, turned = 0, False
    for a, b in products:
        job += [a.data_ptr(), b.data_ptr(), a.shape[1], *_lines(a), *_lines(b)]
        terms, turned = terms + a.shape[1] + a.shape[1] % 2, turned or a.stride(1) != 1
    memory = torch.empty(working_memory(rows, columns, terms, turned), dtype=torch.uint8)
    native.call("products", (ctypes.c_long * len(job))(*job), scale, memory)
    return out


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
