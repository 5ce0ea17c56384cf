"""Rotary positions (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Hugging Face checkpoints."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamina import cuda, native
from lamina.ops.shapes import Float


def rotate(
    x: Float[Tensor, "N heads h"], cos: Float[Tensor, "N half"], sin: Float[Tensor, "N half"]
) -> Float[Tensor, "N heads h"]:
    """Turns each pair (x_i, x_{i+h/2}) of a head by the angle of its token's position.

    ``out_i = x_i·cos - x_{i+h/2}·sin`` and ``out_{i+h/2} = x_{i+h/2}·cos + x_i·sin``; products and sums are rounded one by
    one, as transformers does, so that the bits are the same; in bf16 a kernel of our own rounds once, where there is one
    (``native``, ``cuda``).
    """
    if not torch.is_grad_enabled():
        return _turn(x, cos, sin)  # in generation, where every microsecond of a step counts
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call, no-any-return]


class _Rotate(torch.autograd.Function):
    """The backward of a rotation is the rotation back; autograd's own would keep three copies of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, back=True), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    half = x.shape[-1] // 2
    if half % native.LANES == 0 and native.takes(x, cos, sin):
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty_like(x)
        native.call("rotate", x, cos, sin, out, *x.shape, -1.0 if back else 1.0)
        return out
    if cuda.takes(x, cos, sin):
        from lamina.cuda import rows as kernels

        return kernels.rotate(x.contiguous(), cos.contiguous(), sin.contiguous(), -1.0 if back else 1.0)
    cos, sin = cos.unsqueeze(1), -sin.unsqueeze(1) if back else sin.unsqueeze(1)
    low, high = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.sub(low * cos, high * sin, out=out[..., :half])
    torch.add(high * cos, low * sin, out=out[..., half:])
    return out
