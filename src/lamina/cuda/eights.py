"""What the FP8 products need beside their GEMM: rows in e4m3 with a scale each, in one pass, and the transpose of a weight's bytes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamina.cuda.rows import warps

TILE = 64
"""Side of the square of bytes that a program turns."""


@triton.jit
def _rows(
    x,
    factors,
    codes,
    scales,
    width,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    numbers = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if factors is not None:
        numbers *= tl.load(factors + at, mask=inside, other=0.0)
    largest, most = tl.full((), LARGEST, tl.float32), tl.maximum(tl.max(tl.abs(numbers)), SMALLEST)
    most = tl.where(tl.max((numbers != numbers).to(tl.int32)) > 0, float("nan"), most)
    scaled = numbers * tl.div_rn(largest, most)
    scaled = tl.minimum(tl.maximum(scaled, -largest), largest)  # rounding may pass the largest number
    tl.store(codes + row * width + at, scaled.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, tl.div_rn(most, largest))


def quantise_rows(x: Tensor, factors: Tensor | None, smallest: float, largest: float) -> tuple[Tensor, Tensor]:
    """x·factors in e4m3 and the scale of each row: ``ops.fp8.quantise_rows`` in one pass."""
    rows, width = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    scales, block = torch.empty(rows, 1, dtype=torch.float32, device=x.device), triton.next_power_of_2(width)
    _rows[(rows,)](x, factors, codes, scales, width, smallest, largest, BLOCK=block, num_warps=warps(block))
    return codes, scales


@triton.jit
def _turn(bytes_, out, rows, columns, TILE: tl.constexpr):
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    tile = tl.load(
        bytes_ + row[:, None] * columns + column[None, :], mask=(row[:, None] < rows) & (column[None, :] < columns)
    )
    mask = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), mask=mask)


def transpose(bytes_: Tensor, out: Tensor) -> None:
    """Writes the transpose of bytes, row after row."""
    rows, columns = bytes_.shape
    _turn[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](bytes_, out, rows, columns, TILE=TILE, num_warps=4)
