"""The gate of the MLP, silu(gate)·up (Shazeer 2020, arXiv:2002.05202), keeping its two inputs only.

Autograd's own graph keeps silu(gate) too, as wide as the MLP: at Llama-2-7B 22 kB a token and layer, a fifth of what a layer
keeps. Here it is computed again in the backward pass, some rows at a time: a tenth of a per cent of a step. In bf16 on a CPU a kernel
of our own makes one pass of either direction, where there is one (``native``; on CUDA ``cuda``).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lamina import cuda, native
from lamina.ops.shapes import Float

CHUNK = {"cpu": 2**16}
"""Numbers whose gradient is computed at one time, by device; on all others the whole."""


def plain(gate: Float[Tensor, "N F"], up: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
    """The formula."""
    return F.silu(gate) * up


def swiglu(gate: Float[Tensor, "N F"], up: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
    """Computes ``plain``: in the same bits, or in bf16 on a CPU rounded once, at the end."""
    if not torch.is_grad_enabled():
        return _forward(gate, up)
    return _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call, no-any-return]


def _by_kernel(*tensors: Tensor) -> bool:
    return tensors[0].numel() % native.LANES == 0 and native.takes(*tensors)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    if cuda.takes(gate, up):
        from lamina.cuda import rows as kernels

        return kernels.gate(gate.contiguous(), up.contiguous())
    if not _by_kernel(gate, up):
        return F.silu(gate).mul_(up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    native.call("gate", gate, up, out, out.numel())
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        if cuda.takes(gate, up, grad):
            from lamina.cuda import rows as kernels

            return kernels.gate_back(gate.contiguous(), up.contiguous(), grad.contiguous())
        gate_grad, up_grad = (
            torch.empty_like(gate, memory_format=torch.contiguous_format) if needed else None
            for needed in ctx.needs_input_grad
        )
        if _by_kernel(gate, up, grad):
            gate, up, grad = (x.contiguous() for x in (gate, up, grad))
            native.call("gate_back", gate, up, grad, gate_grad, up_grad, grad.numel())
            return gate_grad, up_grad
        rows = max(1, CHUNK.get(gate.device.type, gate.numel()) // gate.shape[1])
        for start in range(0, len(gate), rows):
            part = slice(start, start + rows)
            if up_grad is not None:
                torch.mul(grad[part], F.silu(gate[part]), out=up_grad[part])
            if gate_grad is not None:
                silu_grad = torch.ops.aten.silu_backward.grad_input
                silu_grad(grad[part] * up[part], gate[part], grad_input=gate_grad[part])
        return gate_grad, up_grad
