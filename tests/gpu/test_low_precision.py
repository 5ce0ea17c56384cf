"""Products of int8 and FP8 weights on a GPU: int8 with the bits of the CPU, FP8 as near to the exact sums as bf16 allows."""

import pytest
import torch
from low_precision import emulated, made

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


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [*SHAPES, (100, 4096, 256)])
def test_fp8_is_as_near_as_bf16_allows(rows: int, inputs: int, outputs: int) -> None:
    """To the exact sums of the same operands, where the result is rounded to bf16 once, at most 1.2 times as far.

    Hopper's FP8 instruction keeps 13 bits behind the point of its largest product and cuts the rest off; sums of four instructions are
    then added in fp32. By that arithmetic the ratio is 1.00, and 1.3 with fast accumulation over 4,096 products.
    """
    torch.manual_seed(0)
    weight, x, grad = torch.randn(outputs, inputs), torch.randn(rows, inputs), torch.randn(rows, outputs)
    bias = torch.randn(outputs).bfloat16()
    here, there = made(Fp8, weight, torch.bfloat16), made(Fp8, weight.cuda(), torch.bfloat16)
    x, grad = x.bfloat16(), grad.bfloat16()
    checks = (
        (there.multiply(x.cuda(), bias.cuda()), emulated(here, x, bias=bias)),
        (there.multiply_back(grad.cuda()), emulated(here, grad, back=True)),
    )
    for out, (truth, _) in checks:
        assert (out.cpu().double() - truth).norm() <= 1.2 * (truth.bfloat16().double() - truth).norm()
