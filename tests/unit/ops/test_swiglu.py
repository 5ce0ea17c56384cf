"""The gate of the MLP: the bits of the formula, gradients by finite differences, what is kept."""

import pytest
import torch
from torch import Tensor

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
    assert torch.equal(ours[0], reference[0])
    for one, other in zip(ours[1:], reference[1:], strict=True):
        # The last numbers of a chunk, fewer than a register holds, go through another exponential: an ε or two.
        torch.testing.assert_close(one, other, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert torch.equal(swiglu(gate, up), plain(gate, up))


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
