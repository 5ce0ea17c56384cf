"""Bytes, absmax and values of a 4-bit weight are those of bitsandbytes on a CPU, bit for bit, also after it is saved."""

import json
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.ops.blockwise import (
    Kind,
    code_of,
    dequantise_4bit,
    dequantise_8bit,
    dynamic_map,
    quantise_4bit,
    quantise_8bit,
)
from lamina.ops.fourbit import FourBit

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of kernels that it did not download

KINDS: tuple[Kind, ...] = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (1, 2), (1, 63), (1, 64), (5, 13), (8, 16), (24, 96), (130, 128), (513, 129)]


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def weights(shape: tuple[int, int]) -> dict[str, Tensor]:
    """Weights of all sorts. The largest magnitudes are within fp16, and the smallest of them normal in fp32 and bf16."""
    heavy = random(shape) ** 3
    gaps = random(shape).flatten()
    for block in gaps.split(64)[::2]:
        block.zero_()
    return {
        "normal": random(shape),
        "heavy tails": heavy,
        "zeros": torch.zeros(shape),
        "negative zeros": -torch.zeros(shape),
        "some blocks of zeros": gaps.view(shape),
        "constant": torch.full(shape, -0.37),
        "two values": torch.where(random(shape) > 0, 1.5, -0.25),
        "huge": random(shape) * 5e5,
        "tiny": random(shape) * 1e-25,
        "transposed": random((shape[1], shape[0])).t(),
        "every second": random((shape[0], 2 * shape[1]))[:, ::2],
    }


def theirs(weight: Tensor, kind: Kind, double: bool) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, compress_statistics=double, quant_type=kind)


def their_values(packed: Tensor, state: Any) -> Tensor:
    """What their CPU kernel makes of it, as one row: of several, not of whole blocks, it may read the wrong absmax."""
    absmax, numel = state.absmax, state.shape.numel()
    if state.nested:
        given = (state.state2.absmax, state.state2.code, 256, torch.float32)
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, *given) + state.offset
    even = [numel + numel % 2]
    values = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, state.quant_type, even, state.dtype)
    return values.flatten()[:numel].view(state.shape)


def lent(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(numel, dtype=dtype, device=device)


def form(weight: Tensor, dtype: torch.dtype, kind: Kind, double: bool) -> FourBit:
    made = FourBit(*weight.shape, dtype, kind=kind, double=double, scratch=lent)
    made.store(weight)
    return made


def test_codes() -> None:
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    assert torch.equal(dynamic_map(), create_dynamic_map())
    for kind in KINDS:
        assert torch.equal(code_of(kind), get_4bit_type(kind, device="cpu"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_and_back(shape: tuple[int, int], dtype: torch.dtype, kind: Kind) -> None:
    for name, weight in weights(shape).items():
        given = weight.to(dtype)
        packed, state = theirs(given, kind, double=False)
        for plain in (False, True):
            bytes_, absmax = quantise_4bit(given.reshape(-1), kind, plain=plain)
            assert torch.equal(bytes_, packed.flatten()) and torch.equal(absmax, state.absmax), name
        values = dequantise_4bit(bytes_, absmax, kind, weight.numel(), dtype)
        assert torch.equal(values.view(shape), their_values(packed, state)), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_weights(shape: tuple[int, int], dtype: torch.dtype, double: bool, kind: Kind) -> None:
    """A weight of fp32, cast to the compute dtype and then quantised, as transformers does."""
    for name, weight in weights(shape).items():
        made = form(weight, dtype, kind, double)
        packed, state = theirs(weight.to(dtype), kind, double)
        assert torch.equal(made.packed, packed.flatten()) and torch.equal(made.absmax, state.absmax), name
        if double:
            assert torch.equal(made.nested_absmax, state.state2.absmax) and torch.equal(made.offset, state.offset), name
        assert torch.equal(made.dense(), their_values(packed, state)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-36, 1e-39])
def test_below_the_smallest_normal_number(dtype: torch.dtype, scale: float) -> None:
    """The bytes are theirs; of the values AVX-512 makes zeros where bf16 would be subnormal, and the reference does not."""
    weight = (random((24, 128)) * scale).to(dtype)
    made = form(weight, dtype, "nf4", double=False)
    packed, state = theirs(weight, "nf4", double=False)
    assert torch.equal(made.packed, packed.flatten()) and torch.equal(made.absmax, state.absmax)
    assert torch.equal(made.dense(), their_values(packed, state))
    values = dequantise_4bit(made.packed, made.absmax, "nf4", weight.numel(), dtype).view(24, 128)
    assert (made.dense().double() - values.double()).abs().max() <= torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("columns", [64, 128, 8, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_called_by_its_symbol_gives_the_op_s_bits(dtype: torch.dtype, kind: Kind, columns: int) -> None:
    """Of shapes whose absmax the op reads right: rows of whole blocks, and rows that AVX-512 does not take."""
    made = form(random((48, columns)), dtype, kind, double=False)
    given = (made.packed[:, None], made.absmax, 64, kind, [48, columns], dtype)
    assert torch.equal(made.dense(), torch.ops.bitsandbytes.dequantize_4bit(*given))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 7, 255, 256, 257, 5000, 100_000])
def test_8_bit(count: int, seed: int) -> None:
    for values in (
        random((count,), seed),
        random((count,), seed) ** 3,
        torch.zeros(count),
        random((count,), seed).abs(),
    ):
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, dynamic_map(), 256)
        found = quantise_8bit(values)
        assert torch.equal(found[0], codes) and torch.equal(found[1], absmax)
        out = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, dynamic_map(), 256, torch.float32)
        assert torch.equal(dequantise_8bit(*found), out)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_state_is_theirs(dtype: torch.dtype, kind: Kind, double: bool) -> None:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    weight = random((6, 128)).to(dtype)
    made = form(weight, dtype, kind, double)
    packed, state = theirs(weight, kind, double)
    expected = {"w": packed, **{f"w.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}
    found = made.state_tensors("w")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Ours is as long as it may get, with spaces at the end: JSON does not mind.
        ours = found[name][: len(tensor)] if "quant_state" in name else found[name]
        assert ours.dtype == tensor.dtype and torch.equal(ours, tensor), name
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(found)

    bytes_ = found.pop("w")
    back = QuantState.from_dict({name.removeprefix("w."): t for name, t in found.items()}, torch.device("cpu"))
    assert torch.equal(dequantize_4bit(bytes_, back), made.dense())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_their_saved_state_loads(dtype: torch.dtype, double: bool) -> None:
    packed, state = theirs(random((24, 96)).to(dtype), "nf4", double)
    tensors = state.as_dict(packed=True)
    text = json.loads(bytes(tensors.pop("quant_state.bitsandbytes__nf4").tolist()))
    made = FourBit(24, 96, dtype, kind="nf4", double=double, scratch=lent)
    nested = {name: tensors.get(name) for name in ("nested_absmax", "nested_quant_map")}
    made.load_stored(packed, tensors["absmax"], tensors["quant_map"], **nested, state=text)
    assert torch.equal(made.dense(), their_values(packed, state))


def test_double_quantisation_keeps_the_bytes_when_quantised_again() -> None:
    """Not the absmax: their mean is another one. A number that was ±absmax is ±1 times what the absmax became, and so is
    largest again, as long as that is positive; each absmax moves by at most the bound of 8 bit, twice.
    """
    made = form(random((64, 128)), torch.float32, "nf4", double=True)
    dense = made.dense().clone()
    again = form(dense, torch.float32, "nf4", double=True)
    assert torch.equal(again.packed, made.packed)
    assert made.nested_absmax is not None and again.nested_absmax is not None
    most = dense.view(-1, 64).abs().amax(1), again.dense().view(-1, 64).abs().amax(1)
    # Half the widest gap of the map, 0.00704, half a position and roundings.
    assert (most[0] - most[1]).abs().max() <= 0.0071 * again.nested_absmax.max()
