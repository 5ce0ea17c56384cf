"""Blockwise quantisation to 4 and 8 bit, in plain PyTorch (Dettmers et al. 2022, arXiv:2110.02861; 2023, arXiv:2305.14314).

A weight is cut into blocks of 64 numbers. Each block keeps the largest magnitude in it, its absmax, and of each number the
place of (number / absmax) among the 16 values of a code: NF4, the quantiles of a normal distribution, or FP4. Double
quantisation stores the absmax themselves, less their mean, in 8 bit: 4.5 bits a weight become 4.127.

These functions are the reference for bitsandbytes' kernels, the way on devices that have none, and on a CPU also the
faster way to quantise: bitsandbytes searches each number's place (``torch.bucketize``, 20 ns a number on one core), which
``nearest`` looks up in a table of 2,049 cells, at 3 ns and with the same result, because the table only proposes and the
exact bound decides. Bits are those of bitsandbytes 0.50 on a CPU: bytes, absmax, and what comes out in fp32, bf16, fp16.

Where its CUDA kernels may differ: NF4's bounds are these very midpoints, but the kernels are compiled with fast math, so
a scaled number may be a unit in the last place off, and one that close to a midpoint gets the other neighbour, with nearly
the same error. FP4's bounds are decimals (0.583333, 0.00260417, …) up to 4e-7 off the midpoints, and are compared with
magnitudes, so a negative tie goes the other way. A block of zeros has other bytes there, but zeros all the same; so do
FP4's two zeros, told apart by the sign of the number there, and by the search here, which gives (0, 0.0026] the second.
The search of 8-bit values is exact there; that of the CPU, and here, first rounds to one of 65,536 positions.
"""

from functools import cache
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from lamina.ops.shapes import Float

Kind = Literal["nf4", "fp4"]

BLOCK = 64  # numbers that share an absmax
NESTED_BLOCK = 256  # absmax that share one of their own in double quantisation

NF4_CODE = torch.tensor(
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
)
# Sign, two bits of exponent, one of mantissa; in the order of the bits, not of the values.
FP4_CODE = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12

_SMALLEST = 1e-38  # divisor of a block of zeros
_CELLS = 1024  # per unit of the scaled numbers: narrower than any two bounds lie apart, FP4's 0 and 0.0026
_POSITIONS = 65536  # in [-1, 1], of the search of 8-bit values


def code_of(kind: Kind) -> Float[Tensor, "16"]:
    """The 16 values of a code, in fp32, scaled to a largest magnitude of 1."""
    return {"nf4": NF4_CODE, "fp4": FP4_CODE}[kind]


@cache
def dynamic_map() -> Float[Tensor, "256"]:
    """The 8-bit code of double quantisation: ±, seven decades, the higher a decade the more of its fraction, 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decade = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += decade + [-value for value in decade]
    return torch.tensor(sorted(values))


@cache
def on_device(name: Literal["nf4", "fp4", "dynamic"], device: torch.device) -> Float[Tensor, " values"]:
    """A code's values on a device: one copy there for all modules, which need no buffer for it."""
    return (dynamic_map() if name == "dynamic" else code_of(name)).to(device)


@cache
def _bounds(kind: Kind, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 15 midpoints between neighbouring values, and which place in the code the n-th smallest value has."""
    code = code_of(kind)
    order = torch.argsort(code, stable=True)
    ascending = code[order]
    return ((ascending[:-1] + ascending[1:]) / 2).to(device), order.to(torch.uint8).to(device)


def nearest_plain(scaled: Float[Tensor, " n"], kind: Kind) -> UInt8[Tensor, " n"]:
    """Searches which of the ascending values of a code is nearest to each number; a tie goes to the smaller value."""
    return torch.bucketize(scaled, _bounds(kind, scaled.device)[0], out_int32=True).to(torch.uint8)


def nearest(scaled: Float[Tensor, " n"], kind: Kind) -> UInt8[Tensor, " n"]:
    """Looks up what ``nearest_plain`` searches, for numbers in [-1, 1].

    The cell of a number never decreases with the number. So a number in a higher cell than a bound is above that bound, one
    in a lower cell below it; the table counts the bounds in lower cells, and the one bound that the number's own cell may
    hold is compared.
    """
    below, bound = _cells(kind, scaled.device)
    cell = _cell(scaled)
    above = scaled > bound.index_select(0, cell)
    return below.index_select(0, cell).add_(above.view(torch.uint8))


def _cell(scaled: Tensor) -> Tensor:
    return (scaled * _CELLS).to(torch.int32).add_(_CELLS)


@cache
def _cells(kind: Kind, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell the number of bounds in lower cells, and its own bound, +∞ where it has none."""
    bounds, _ = _bounds(kind, torch.device("cpu"))
    held = _cell(bounds)
    cells = torch.arange(2 * _CELLS + 1)
    below = (cells[:, None] > held).sum(1).to(torch.uint8)
    bound = torch.full(cells.shape, torch.inf).index_copy_(0, held.long(), bounds)
    return below.to(device), bound.to(device)


def quantise_4bit(
    values: Float[Tensor, " n"], kind: Kind, *, plain: bool = False
) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, " blocks"]]:
    """Quantises n numbers in blocks of 64: ⌈n/2⌉ bytes, the first number of two in the high bits, ⌈n/64⌉ absmax in fp32.

    A part that begins at a multiple of 64 has the bytes it has in the whole. Numbers that are not finite make their block
    NaN, as in bitsandbytes.

    Args:
        plain: searches with ``nearest_plain``.
    """
    scaled, absmax = _scale(values)
    places = (nearest_plain if plain else nearest)(scaled, kind)
    if kind == "fp4":  # whose values do not ascend
        places = _bounds(kind, values.device)[1].index_select(0, places.int())
    # Two neighbouring bytes are a number of 16 bits, the first the lower one; its low byte takes them both.
    pairs = places.view(torch.int16)
    return (pairs << 4).bitwise_or_(pairs >> 8).to(torch.uint8), absmax


def _scale(values: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers divided by their block's absmax, in [-1, 1] and of an even count, and the absmax.

    As bitsandbytes does, whole blocks are multiplied by a reciprocal, and the numbers of the last, shorter one are divided.
    """
    count, whole = len(values), len(values) - len(values) % BLOCK
    scaled = torch.empty(count + count % 2, device=values.device)
    scaled[:count] = values
    scaled[count:] = 0
    blocks = scaled[:whole].view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    blocks.mul_((1.0 / absmax.clamp(min=_SMALLEST))[:, None])
    if whole < count:
        last = scaled[whole:].abs().amax().clamp(min=_SMALLEST)
        scaled[whole:].div_(last)
        absmax = torch.cat([absmax, last[None]])
    # A reciprocal is rounded, so the product may exceed 1. NaN becomes 1, the place that a search gives it.
    return torch.fmin(scaled, scaled.new_ones(()), out=scaled).clamp_(min=-1), absmax


def dequantise_4bit(
    packed: UInt8[Tensor, " bytes"], absmax: Float[Tensor, " blocks"], kind: Kind, count: int, dtype: torch.dtype
) -> Float[Tensor, " n"]:
    """Computes code[place] · absmax of the first ``count`` numbers in fp32 and rounds once, to ``dtype``."""
    places = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count]
    values = on_device(kind, packed.device).index_select(0, places.int())
    return values.mul_(absmax.repeat_interleave(BLOCK)[:count]).to(dtype)


def quantise_8bit(values: Float[Tensor, " n"]) -> tuple[UInt8[Tensor, " n"], Float[Tensor, " blocks"]]:
    """Quantises fp32 numbers in blocks of 256: the nearest value of ``dynamic_map`` to number / absmax, and the absmax.

    Numbers are first rounded to one of 65,536 positions in [-1, 1], as bitsandbytes' CPU kernel does: values of the map
    that lie closer together than these, below 1e-4, may be missed by some.
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax)[:, None]).flatten()[: len(values)]
    scaled = scaled.nan_to_num_(nan=-1.0).clamp_(-1, 1)  # 0/0: a block of zeros has place 0 everywhere
    position = ((scaled + 1) * 0.5 * (_POSITIONS - 1) + 0.5).to(torch.int32)
    return _dynamic_places(values.device).index_select(0, position), absmax


@cache
def _dynamic_places(device: torch.device) -> Tensor:
    """The place in ``dynamic_map`` of the value nearest to each position in [-1, 1]."""
    positions = torch.arange(_POSITIONS, dtype=torch.float32).mul_(2).div_(_POSITIONS - 1).sub_(1)
    code = dynamic_map()
    return torch.bucketize(positions, (code[:-1] + code[1:]) * 0.5, out_int32=True).to(torch.uint8).to(device)


def dequantise_8bit(codes: UInt8[Tensor, " n"], absmax: Float[Tensor, " blocks"]) -> Float[Tensor, " n"]:
    """Computes dynamic_map[place] · absmax in fp32."""
    values = on_device("dynamic", codes.device).index_select(0, codes.int())
    return values.mul_(absmax.repeat_interleave(NESTED_BLOCK)[: len(codes)])
