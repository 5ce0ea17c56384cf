"""Blocks of 4 and 8 bit: codes and bytes that can be written down, the fast search, what a bad number does to its block."""

import pytest
import torch
from torch import Tensor

from lamina.ops.blockwise import (
    FP4_CODE,
    NF4_CODE,
    Kind,
    code_of,
    dequantise_4bit,
    dequantise_8bit,
    dynamic_map,
    nearest,
    nearest_plain,
    quantise_4bit,
    quantise_8bit,
)

KINDS: tuple[Kind, ...] = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bounds(kind: Kind) -> Tensor:
    ascending = code_of(kind).sort().values
    return (ascending[:-1] + ascending[1:]) / 2


def test_nf4_is_quantiles_of_the_normal_distribution() -> None:
    """Dettmers et al. 2023, section 3: eight quantiles below zero, nine above, the two zeros being one."""

    def half(count: int) -> list[float]:
        probabilities = torch.linspace(0.9677083, 0.5, count + 1, dtype=torch.float64)[:-1]
        return torch.special.ndtri(probabilities).tolist()

    values = torch.tensor(sorted([*half(8), 0.0, *(-value for value in half(7))]), dtype=torch.float64)
    expected = values / values.abs().max()
    # The published values went through fp32 probabilities: a slope of ndtri of at most 14 there, times 2⁻²⁴ and its
    # share in the division, is below 2e-6.
    assert (NF4_CODE - expected).abs().max() < 2e-6


def test_fp4_is_a_sign_two_exponent_bits_and_a_mantissa_bit() -> None:
    magnitudes = [
        0.0625 * m if e == 0 else (1 + m / 2) * 2.0**power
        for e, power in ((0, 0), (1, 3), (2, 2), (3, 1))
        for m in (0, 1)
    ]
    assert FP4_CODE.tolist() == pytest.approx([m / 12 for m in magnitudes] + [-m / 12 for m in magnitudes], rel=1e-7)


def test_the_dynamic_map_has_256_values_of_seven_decades() -> None:
    code = dynamic_map()
    assert len(code.unique()) == 256 and code.max() == 1 and 0 in code
    positive = code[(code > 0) & (code < 1)]
    assert torch.histc(positive.log10(), 7, -7, 0).tolist() == [2**i for i in range(7)]
    assert torch.equal(-code[code < 0].flip(0), positive)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_finds_what_the_search_finds(kind: Kind) -> None:
    """Around every bound and every border of a cell, to the last bit, and all over the range."""
    points = torch.cat([bounds(kind), torch.arange(-1024, 1025) / 1024])
    near = [points]
    for direction in (-torch.inf, torch.inf):
        step = points
        for _ in range(3):
            step = torch.nextafter(step, torch.tensor(direction))
            near.append(step)
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38])
    scaled = torch.cat([*near, torch.linspace(-1, 1, 100_003), tiny]).clamp(-1, 1)
    assert torch.equal(nearest(scaled, kind), nearest_plain(scaled, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_bounds_share_a_cell(kind: Kind) -> None:
    assert len((bounds(kind) * 1024).to(torch.int32).unique()) == 15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.5, 3.25, 2.0**-100])
def test_values_of_the_code_come_back(kind: Kind, scale: float) -> None:
    values = (code_of(kind) * scale).repeat(8)
    packed, absmax = quantise_4bit(values, kind)
    assert absmax.tolist() == [scale] * 2
    assert torch.equal(dequantise_4bit(packed, absmax, kind, len(values), torch.float32), values)


def test_bytes_hold_the_first_number_in_the_high_bits() -> None:
    packed, absmax = quantise_4bit(torch.tensor([-4.0, 4.0, 0.0]), "nf4")
    assert packed.tolist() == [0x0F, 0x77] and absmax.tolist() == [4.0]  # an odd count ends with a zero


@pytest.mark.parametrize("kind", KINDS)
def test_a_tie_goes_to_the_smaller_value(kind: Kind) -> None:
    ascending = code_of(kind).sort().values
    scaled = bounds(kind)
    assert torch.equal(nearest(scaled, kind), torch.arange(15, dtype=torch.uint8))
    above = torch.nextafter(scaled, torch.tensor(2.0))
    assert torch.equal(ascending[nearest(above, kind).int()], ascending[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [64, 70])
def test_zeros_stay_zeros(kind: Kind, count: int) -> None:
    packed, absmax = quantise_4bit(torch.zeros(count), kind)
    assert not dequantise_4bit(packed, absmax, kind, count, torch.float32).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_spoils_its_block_only(kind: Kind, bad: float) -> None:
    values = torch.randn(192, generator=torch.Generator().manual_seed(0))
    values[100] = bad
    found = [quantise_4bit(values, kind, plain=plain) for plain in (False, True)]
    assert torch.equal(found[0][0], found[1][0])
    out = dequantise_4bit(*found[0], kind, 192, torch.float32)
    assert out[:64].isfinite().all() and out[128:].isfinite().all() and not out[64:128].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_numbers_given_are_not_changed(dtype: torch.dtype) -> None:
    values = torch.randn(130, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = values.clone()
    quantise_4bit(values, "nf4")
    quantise_8bit(values.float())
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantising_rounds_once(dtype: torch.dtype) -> None:
    packed, absmax = quantise_4bit(torch.randn(1000, generator=torch.Generator().manual_seed(0)), "nf4")
    exact = dequantise_4bit(packed, absmax, "nf4", 1000, torch.float32)
    assert torch.equal(dequantise_4bit(packed, absmax, "nf4", 1000, dtype), exact.to(dtype))


def test_values_of_the_dynamic_map_come_back_where_positions_tell_them_apart() -> None:
    """Positions are 2/65535 apart, so a neighbour that close may be taken."""
    code = dynamic_map()
    codes, absmax = quantise_8bit(code * 3)
    out = dequantise_8bit(codes, absmax)
    assert absmax.tolist() == [3.0]
    assert torch.equal(out[code.abs() > 1e-2], (code * 3)[code.abs() > 1e-2])
    assert (out - code * 3).abs().max() <= 3 * 2 / 65535


def test_a_block_of_zeros_has_the_first_place_in_8_bit() -> None:
    codes, absmax = quantise_8bit(torch.zeros(300))
    assert not codes.any() and not absmax.any() and not dequantise_8bit(codes, absmax).any()
