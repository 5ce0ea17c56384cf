"""What holds of any weight in blocks: the bound of its error, idempotence, independence of the blocks."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.ops.blockwise import (
    BLOCK,
    NESTED_BLOCK,
    Kind,
    code_of,
    dequantise_4bit,
    dequantise_8bit,
    dynamic_map,
    quantise_4bit,
    quantise_8bit,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
fast = settings(max_examples=60, deadline=None)
kinds = st.sampled_from(["nf4", "fp4"])


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """1 to 700 numbers, heavy-tailed or not, with blocks of zeros, in one of the dtypes and far from its limits."""
    count, seed = draw(st.integers(1, 700)), draw(st.integers(0, 2**31))
    power, scale = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1e-2, 1.0, 30.0]))
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=random) ** power * scale
    for block in values.split(BLOCK):
        if draw(st.integers(0, 5)) == 0:
            block.zero_()
    return values.to(draw(st.sampled_from(DTYPES)))


def there_and_back(values: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    packed, absmax = quantise_4bit(values, kind)
    return packed, absmax, dequantise_4bit(packed, absmax, kind, len(values), values.dtype)


def per_number(absmax: Tensor, count: int, block: int = BLOCK) -> Tensor:
    return absmax.repeat_interleave(block)[:count]


@fast
@given(values=weights(), kind=kinds)
def test_the_error_is_at_most_half_the_widest_gap(values: Tensor, kind: Any) -> None:
    """To half the gap, relative to the block's absmax: 2⁻²³ for scaling (a reciprocal and a product are rounded), 2⁻²⁴ for the
    rounded bound, 2⁻²⁴ for the product in fp32, and the unit roundoff of the dtype; and half a step of fp16's subnormals.
    """
    _, absmax, out = there_and_back(values, kind)
    info = torch.finfo(values.dtype)
    half = code_of(kind).sort().values.diff().max().item() / 2
    allowed = per_number(absmax, len(values)).double() * (half + 2**-22 + info.eps / 2)
    assert ((values.double() - out.double()).abs() <= allowed + info.smallest_normal * info.eps / 2).all()


@fast
@given(values=weights(), kind=kinds)
def test_quantising_again_changes_no_value(values: Tensor, kind: Any) -> None:
    """The number that is a block's absmax becomes ±1 · absmax, exactly; the others are off by their last rounding, far from
    a bound. NF4's bytes are the same too; FP4's second zero becomes the first.
    """
    packed, absmax, out = there_and_back(values, kind)
    again = there_and_back(out, kind)
    assert torch.equal(again[1], absmax) and torch.equal(again[2], out)
    if kind == "nf4":
        assert torch.equal(again[0], packed)


@fast
@given(values=weights(), kind=kinds)
def test_the_plain_search_gives_the_same_bytes(values: Tensor, kind: Any) -> None:
    assert torch.equal(quantise_4bit(values, kind)[0], quantise_4bit(values, kind, plain=True)[0])


@fast
@given(values=weights(), kind=kinds, blocks=st.integers(1, 10))
def test_parts_of_whole_blocks_are_parts_of_the_whole(values: Tensor, kind: Any, blocks: int) -> None:
    packed, absmax = quantise_4bit(values, kind)
    parts = [quantise_4bit(part, kind) for part in values.split(blocks * BLOCK)]
    assert torch.equal(torch.cat([part[0] for part in parts]), packed)
    assert torch.equal(torch.cat([part[1] for part in parts]), absmax)


@fast
@given(count=st.integers(1, 1500), seed=st.integers(0, 2**31), power=st.sampled_from([1, 3]))
def test_the_error_of_8_bit_is_at_most_half_the_widest_gap(count: int, seed: int, power: int) -> None:
    """Half a position, 1/65535, more than half the gap, and 2⁻²² for scaling, bounds and product, as in 4 bit."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) ** power
    codes, absmax = quantise_8bit(values)
    # -1 is not in the map; its distance to the smallest value, -0.993, is half the widest gap there is, and not more.
    half = max(dynamic_map().diff().max().item() / 2, 1 + dynamic_map()[0].item())
    allowed = per_number(absmax, count, NESTED_BLOCK).double() * (half + 1 / 65535 + 2**-22)
    assert ((values.double() - dequantise_8bit(codes, absmax).double()).abs() <= allowed).all()
