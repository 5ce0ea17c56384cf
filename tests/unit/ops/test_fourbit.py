"""The 4-bit form of a frozen weight: sizes, filling it, products, moves, and what of stored forms is refused."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.ops import fourbit, library
from lamina.ops.blockwise import BLOCK, Kind, dequantise_4bit, quantise_4bit
from lamina.ops.fourbit import FourBit, four_bit_bytes

KINDS: tuple[Kind, ...] = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of blocks, of parts of blocks that AVX-512 takes 16 at a time, odd ones; a last block that is short, or of one number.
SHAPES = [(1, 1), (3, 128), (24, 96), (5, 16), (7, 33), (13, 5), (9, 80)]


class Lent:
    """The shared memory, which counts its callers and never has the last one's numbers in it."""

    def __init__(self) -> None:
        self.memory, self.calls = torch.empty(0, dtype=torch.uint8), 0

    def __call__(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.calls += 1
        if self.memory.numel() < numel * dtype.itemsize:
            self.memory = torch.empty(numel * dtype.itemsize, dtype=torch.uint8, device=device)
        return self.memory.fill_(255)[: numel * dtype.itemsize].view(dtype)


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def form(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, kind: Kind = "nf4", double: bool = False
) -> FourBit:
    made = FourBit(*shape, dtype, kind=kind, double=double, scratch=Lent())
    made.store(weight(shape))
    return made


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (129, 128), (4096, 11008)])
def test_bytes_are_foretold(shape: tuple[int, int], double: bool) -> None:
    with torch.device("meta"):
        made = FourBit(*shape, torch.bfloat16, kind="nf4", double=double, scratch=Lent())
    assert made.nbytes == four_bit_bytes(*shape, double)


def test_bits_of_a_weight_are_those_of_the_paper() -> None:
    """Dettmers et al. 2023, section 3: 4 bits, and 32/64 = 0.5 of constants, or 8/64 + 32/(64·256) = 0.127 of them."""
    weights = 4096 * 11008
    assert four_bit_bytes(4096, 11008, False) * 8 / weights == 4.5
    assert four_bit_bytes(4096, 11008, True) * 8 / weights == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_made_on_meta_then_filled(dtype: torch.dtype, double: bool) -> None:
    with torch.device("meta"):
        made = FourBit(24, 96, dtype, kind="nf4", double=double, scratch=Lent())
    made.to_empty(device="cpu").store(weight((24, 96)))
    assert torch.equal(made.dense(), form((24, 96), dtype, double=double).dense())
    assert list(made.parameters()) == []


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_is_what_the_reference_dequantises(shape: tuple[int, int], dtype: torch.dtype, kind: Kind) -> None:
    made = form(shape, dtype, kind)
    packed, absmax = quantise_4bit(weight(shape).to(dtype).flatten(), kind, plain=True)
    assert torch.equal(made.packed, packed) and torch.equal(made.absmax, absmax)
    expected = dequantise_4bit(packed, absmax, kind, shape[0] * shape[1], dtype).view(shape)
    assert torch.equal(made.dense(), expected)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (50, 96), (7, 333)])
def test_a_weight_stored_in_slices_is_that_stored_at_once(
    shape: tuple[int, int], double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = form(shape, double=double)
    monkeypatch.setattr(fourbit, "_SLICE", 3 * BLOCK)
    sliced = form(shape, double=double)
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), sliced.buffers(), strict=True))


def test_a_weight_longer_than_a_slice() -> None:
    made = form((200, 700), torch.bfloat16)
    assert made.packed.numel() * 2 > fourbit._SLICE
    assert torch.equal(made.packed, quantise_4bit(weight((200, 700)).bfloat16().flatten(), "nf4", plain=True)[0])


@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.float16])
def test_a_weight_is_rounded_to_the_form_s_dtype_first(given: torch.dtype) -> None:
    made, other = form((24, 96), torch.bfloat16), form((24, 96), torch.bfloat16)
    other.store(weight((24, 96), given))
    made.store(weight((24, 96), given).bfloat16())
    assert torch.equal(made.packed, other.packed) and torch.equal(made.absmax, other.absmax)


def test_a_transposed_weight_is_stored_as_it_reads() -> None:
    made = form((24, 96))
    made.store(weight((96, 24)).t())
    other = form((24, 96))
    other.store(weight((96, 24)).t().contiguous())
    assert torch.equal(made.packed, other.packed)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_with_the_dense_weight(dtype: torch.dtype, double: bool) -> None:
    made = form((24, 96), dtype, double=double)
    x, grad, bias = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in ((5, 96), (5, 24), (24,))
    )
    dense = made.dense().clone()
    assert torch.equal(made.multiply(x, bias), F.linear(x, dense, bias))
    assert torch.equal(made.multiply(x), F.linear(x, dense))
    assert torch.equal(made.multiply_back(grad), grad @ dense)


def test_two_forms_share_the_lent_memory_and_autograd_keeps_none_of_it() -> None:
    lent = Lent()
    one, other = (FourBit(24, 96, torch.float32, kind="nf4", double=False, scratch=lent) for _ in range(2))
    one.store(weight((24, 96)))
    other.store(-3 * weight((24, 96)))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1), requires_grad=True)
    first = one.multiply(x)
    assert not first.requires_grad and lent.calls == 1
    assert other.dense().data_ptr() == one.dense().data_ptr()
    assert torch.equal(one.multiply(x), first)


@pytest.mark.parametrize("double", [False, True])
def test_casting_a_model_does_not_round_the_statistics(double: bool) -> None:
    made = form((24, 96), double=double)
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    model = torch.nn.Sequential(made, torch.nn.Linear(2, 2))
    for move in (model.bfloat16, model.half, lambda: model.to("cpu", torch.float64), model.share_memory):
        move()
        for name, buffer in made.named_buffers():
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), (move, name)
    assert model[1].weight.dtype == torch.float64
    assert torch.equal(made.dense(), form((24, 96), double=double).dense())


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiplied in fp32, bf16 or fp16, not in torch.float64"):
        FourBit(2, 2, torch.float64, kind="nf4", double=False, scratch=Lent())


@pytest.fixture
def _no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """bitsandbytes as it is where its native library did not load."""
    import bitsandbytes.cextension as extension

    monkeypatch.setattr(extension, "lib", extension.ErrorHandlerMockBNBNativeLibrary("not loaded"))
    library.library_for.cache_clear()
    yield
    library.library_for.cache_clear()


@pytest.mark.parametrize("double", [False, True])
def test_without_the_library_the_bits_are_the_same(double: bool, request: pytest.FixtureRequest) -> None:
    expected = form((24, 96), torch.bfloat16, double=double)
    values = expected.dense().clone()
    request.getfixturevalue("_no_library")
    found = form((24, 96), torch.bfloat16, double=double)
    assert all(torch.equal(a, b) for a, b in zip(found.buffers(), expected.buffers(), strict=True))
    assert torch.equal(found.dense(), values)
    assert isinstance(found.scratch, Lent) and found.scratch.calls == 0


@pytest.mark.slow
def test_importing_bitsandbytes_says_nothing() -> None:
    code = "from lamina.ops import library; assert library.library_for('cpu') and not library.library_for('mps')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def parts(made: FourBit) -> dict[str, Any]:
    """What ``load_stored`` is given of a form's own state."""
    tensors = {name.removeprefix("w").lstrip(".") or "packed": t for name, t in made.state_tensors("w").items()}
    state = json.loads(bytes(tensors.pop(f"quant_state.bitsandbytes__{made.kind}").tolist()))
    return {"nested_absmax": None, "nested_quant_map": None, **tensors, "state": state}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 96), (7, 33)])
def test_what_is_stored_loads_again(shape: tuple[int, int], kind: Kind, double: bool) -> None:
    made = form(shape, torch.bfloat16, kind, double)
    other = FourBit(*shape, torch.bfloat16, kind=kind, double=double, scratch=Lent())
    other.load_stored(**parts(made))
    assert all(torch.equal(a, b) for a, b in zip(made.buffers(), other.buffers(), strict=True))


def test_bytes_stored_as_another_dtype_load_too() -> None:
    made = form((24, 96))
    other = FourBit(24, 96, torch.float32, kind="nf4", double=False, scratch=Lent())
    other.load_stored(**{**parts(made), "packed": made.packed.view(torch.bfloat16)[:, None]})
    assert torch.equal(made.packed, other.packed)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"state": {"blocksize": 128}}, "blocksize is 128, expected 64"),
        ({"state": {"nested_blocksize": 512}}, "nested_blocksize is 512, expected 256"),
        ({"state": {"nested_dtype": "float16"}}, "nested_dtype is float16, expected float32"),
        ({"state": {"nested_offset": None}}, "nested_offset is None, expected a number"),
        ({"state": {"quant_type": "fp4"}}, "quant_type is fp4, expected nf4"),
        ({"state": {"shape": [96, 24]}}, r"shape is \(96, 24\), expected \(24, 96\)"),
        ({"state": {"shape": None}}, r"shape is None, expected \(24, 96\)"),
        ({"packed": torch.zeros(7, 1, dtype=torch.uint8)}, "packed is 7 × uint8, expected 1152 × uint8"),
        ({"absmax": torch.zeros(36)}, "absmax is 36 × float32, expected 36 × uint8"),
        ({"nested_absmax": None}, "nested_absmax is absent, expected 1 × float32"),
        ({"nested_quant_map": None}, "nested_quant_map is absent, expected the values of dynamic"),
        ({"nested_quant_map": torch.linspace(-1, 1, 256)}, "nested_quant_map is 256 other values, expected the 256"),
        ({"quant_map": torch.linspace(-1, 1, 16)}, "quant_map is 16 other values, expected the 16 values of nf4"),
        ({"quant_map": torch.zeros(3)}, "quant_map is 3 other values, expected the 16 values of nf4"),
    ],
)
def test_stored_forms_that_do_not_fit_are_refused(change: dict[str, Any], fault: str) -> None:
    made = form((24, 96), double=True)
    before = [buffer.clone() for buffer in made.buffers()]
    given = parts(made)
    given["state"] |= change.pop("state", {})
    with pytest.raises(ValueError, match=fault):
        made.load_stored(**{**given, **change})
    assert all(torch.equal(a, b) for a, b in zip(made.buffers(), before, strict=True))


def test_single_and_double_do_not_load_each_other_and_all_faults_are_told() -> None:
    single, double = form((24, 96)), form((24, 96), double=True)
    with pytest.raises(ValueError, match="nested_blocksize is None, expected 256; .*absmax is 36 × float32.*is absent"):
        double.load_stored(**parts(single))
    with pytest.raises(ValueError, match="absmax is 36 × uint8.*; nested_absmax is 1 × float32, expected absent"):
        single.load_stored(**parts(double))
