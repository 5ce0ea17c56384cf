"""The gate of the MLP: the bits of the formula, gradients by finite differences, what is kept."""

import pytest
import torch
from torch import Tensor

from lamina import native
from lamina.ops import swiglu as module
from lamina.ops.swiglu import plain, swiglu


def gradients(op: object, gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
    assert callable(op)
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    out = op(gate, up)
    return [out.detach(), *torch.autograd.grad(out, (gate, up), grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 352), (3, 70_000)])  # below a chunk, above it, rows beyond it
def test_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    ours, reference = gradients(swiglu, gate, up, grad), gradients(plain, gate, up, grad)
    assert torch.equal(swiglu(gate, up), ours[0]), "without gradients"
    if dtype == torch.bfloat16 and swiglu_is_a_kernel(gate):
        truth = gradients(plain, gate.double(), up.double(), grad.double())
        for one, true in zip(ours, truth, strict=True):
            # Rounded once, at the end: half an ε of each number, and what fp32 loses before that.
            torch.testing.assert_close(one.double(), true, rtol=2**-8 * 1.01, atol=1e-6)
        return
    assert torch.equal(ours[0], reference[0])
    for one, other in zip(ours[1:], reference[1:], strict=True):
        # The last numbers of a chunk, fewer than a register holds, go through another exponential: an ε or two.
        torch.testing.assert_close(one, other, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def swiglu_is_a_kernel(gate: Tensor) -> bool:
    return native.takes(gate) and gate.numel() % 16 == 0


@pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernels")
@pytest.mark.parametrize("value", [0.0, -0.0, 80.0, -80.0, 1e4, -1e4, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
def test_extreme_gates(value: float) -> None:
    """What the formula gives in fp32, which for an infinite gate is infinite or no number, in either direction."""
    gate, up, grad = (torch.full((1, 16), x, dtype=torch.bfloat16) for x in (value, 1.5, 1.0))
    ours = gradients(swiglu, gate, up, grad)
    reference = gradients(plain, gate.float(), up.float(), grad.float())
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2**-8, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [(True, False), (False, True)])
def test_one_of_the_two_learns_and_memory_in_another_order(dtype: torch.dtype, learns: tuple[bool, bool]) -> None:
    gate, up, grad = (torch.randn(32, 24).to(dtype).t() for _ in range(3))
    whole = gradients(swiglu, gate.contiguous(), up.contiguous(), grad.contiguous())[1:]
    leaves = [x.detach().requires_grad_(needed) for x, needed in zip((gate, up), learns, strict=True)]
    swiglu(*leaves).backward(grad)
    for leaf, needed, expected in zip(leaves, learns, whole, strict=True):
        assert (leaf.grad is not None) == needed
        assert leaf.grad is None or torch.allclose(leaf.grad, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 16, 100])
@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_gradients(chunk: int, learns: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", {"cpu": chunk})
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 8, dtype=torch.float64).requires_grad_(one) for one in learns)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_only_the_inputs_are_kept() -> None:
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: None):
        swiglu(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]
