"""A weight in 4 bit on a GPU: bitsandbytes' own bytes and values there, and those of the CPU but for ties."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.ops import fourbit
from lamina.ops.blockwise import Kind
from lamina.ops.fourbit import FourBit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = [(7, 33), (24, 96), (512, 1024)]


def lent(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(numel, dtype=dtype, device=device)


def form(weight: Tensor, dtype: torch.dtype, kind: Kind, double: bool, device: str) -> FourBit:
    made = FourBit(*weight.shape, dtype, kind=kind, double=double, scratch=lent).to(device)
    made.store(weight)
    return made


def weight(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_and_values_are_bitsandbytes_own(
    shape: tuple[int, int], dtype: torch.dtype, double: bool, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight(shape).to("cuda", dtype), compress_statistics=double, quant_type=kind)
    for size in (2**24, 64 * 50):
        monkeypatch.setattr(fourbit, "_SLICE_ELSEWHERE", size)
        made = form(weight(shape), dtype, kind, double, "cuda")
        assert torch.equal(made.packed, packed.flatten()) and torch.equal(made.absmax, state.absmax)
        assert torch.equal(made.dense(), dequantize_4bit(packed, state))


@pytest.mark.parametrize("double", [False, True])
def test_a_form_moves_to_the_device_as_it_is(double: bool) -> None:
    made = form(weight((24, 96)), torch.float32, "nf4", double, "cpu")
    expected = made.dense().clone()
    assert torch.equal(made.to("cuda").dense().cpu(), expected)


def test_products_are_those_with_the_dense_weight() -> None:
    made = form(weight((24, 96)), torch.bfloat16, "nf4", True, "cuda")
    x, grad = (torch.randn(5, width, device="cuda", dtype=torch.bfloat16) for width in (96, 24))
    assert torch.equal(made.multiply(x), F.linear(x, made.dense()))
    assert torch.equal(made.multiply_back(grad), grad @ made.dense())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bytes_are_those_of_the_cpu_but_for_ties(kind: Kind) -> None:
    """Bounds are up to 4e-7 apart, of a range of 2 that random numbers fill: some in a million may lie between."""
    one, other = (form(weight((512, 1024)), torch.float32, kind, False, device) for device in ("cpu", "cuda"))
    assert torch.equal(one.absmax, other.absmax.cpu())
    assert (one.dense() != other.dense().cpu()).sum() <= 10
