"""The norm in chunks: the bits of torch's own, gradients by finite differences, errors in bf16."""

import pytest
import torch
from models import error
from torch import Tensor

from lamina.ops import norm
from lamina.ops.norm import plain, rms_norm

EPS = 1e-5
SHAPES = [
    (1, 1),
    (5, 7),
    (3, 4, 8),
    (1000, 96),
    (1031, 64),
    (3, 70_000),
]  # below, at and above a chunk, and rows beyond it


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, and the gradient of the output."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(shape) * 3, 1 + 0.1 * torch.randn(shape[-1]), torch.randn(shape)
    return x.to(dtype), weight.to(dtype), grad.to(dtype)


def gradient(op: object, x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    assert callable(op)
    x = x.detach().requires_grad_()
    op(x, weight, EPS).backward(grad)
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The kernel sums a row in another order, so that now and then a rounding to bf16 falls to the other side."""
    x, weight, _ = operands(shape, dtype)
    ours, torchs = rms_norm(x, weight, EPS), plain(x, weight, EPS)
    if dtype == torch.bfloat16:
        torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=0)
        assert (ours == torchs).float().mean() > 0.99
    else:
        assert torch.equal(ours, torchs)
    assert torch.equal(rms_norm(x.requires_grad_(), weight, EPS), ours)


def test_an_input_in_another_order_of_memory() -> None:
    x, weight, _ = operands((300, 400, 16), torch.bfloat16)
    x = x.transpose(0, 1)
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm(x.contiguous(), weight, EPS))
    grad = torch.randn(400, 300, 16).bfloat16()
    expected = gradient(rms_norm, x.contiguous(), weight, grad)
    turned = grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(gradient(rms_norm, x, weight.repeat_interleave(2)[::2], turned), expected)


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "CHUNK", chunk)
    x, weight, _ = operands((5, 8), torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPS), x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[3:])
def test_error_is_at_most_that_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """1.2: the rule of the house for two orders of rounding, over enough numbers for errors to be alike."""
    x, weight, grad = operands(shape, dtype)
    truth = gradient(plain, x.double(), weight.double(), grad.double())
    ours, reference = (error(gradient(op, x, weight, grad), truth) for op in (rms_norm, plain))
    assert ours <= 1.2 * reference


def test_only_x_is_kept() -> None:
    x, weight, _ = operands((1000, 96), torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        rms_norm(x.requires_grad_(), weight, EPS)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), weight.data_ptr()]


def test_a_weight_that_learns_gets_its_gradient() -> None:
    x, weight, grad = operands((5, 8), torch.float32)
    rms_norm(x, weight.requires_grad_(), EPS).backward(grad)
    assert weight.grad is not None and weight.grad.any()
