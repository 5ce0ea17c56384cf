"""Products of int8 and FP8 weights on a GPU: int8 with the bits of the CPU, FP8 within fp32 of the emulation."""

import pytest
import torch
from low_precision import FP32, UNIT, emulated, made

from lamina.ops.fp8 import Fp8
from lamina.ops.int8 import Int8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = [(1, 64, 48), (17, 48, 64), (300, 256, 128), (5, 7, 9)]  # rows, inputs, outputs; the last fits no integer GEMM


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_int8_has_the_bits_of_the_cpu(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    weight, x, grad = torch.randn(outputs, inputs), torch.randn(rows, inputs), torch.randn(rows, outputs)
    bias = torch.randn(outputs).bfloat16()
    here, there = made(Int8, weight, torch.bfloat16), made(Int8, weight.cuda(), torch.bfloat16)
    x, grad = x.bfloat16(), grad.bfloat16()
    assert torch.equal(there.multiply(x.cuda(), bias.cuda()).cpu(), here.multiply(x, bias))
    assert torch.equal(there.multiply_back(grad.cuda()).cpu(), here.multiply_back(grad))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_fp8_is_the_emulation(rows: int, inputs: int, outputs: int) -> None:
    """n + 3 roundings in fp32, and one to bf16. A device that sums in fewer bits than fp32 fails here, and should."""
    torch.manual_seed(0)
    weight, x, grad = torch.randn(outputs, inputs), torch.randn(rows, inputs), torch.randn(rows, outputs)
    bias = torch.randn(outputs).bfloat16()
    here, there = made(Fp8, weight, torch.bfloat16), made(Fp8, weight.cuda(), torch.bfloat16)
    x, grad = x.bfloat16(), grad.bfloat16()
    checks = (
        (there.multiply(x.cuda(), bias.cuda()), emulated(here, x, bias=bias), inputs),
        (there.multiply_back(grad.cuda()), emulated(here, grad, back=True), outputs),
    )
    for out, (truth, magnitudes), terms in checks:
        fp32 = (terms + 3) * FP32 * (magnitudes + truth.abs())
        assert ((out.cpu().double() - truth).abs() <= fp32 + UNIT[out.dtype] * (truth.abs() + fp32)).all()
