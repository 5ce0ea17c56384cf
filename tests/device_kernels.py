"""The kernels for CUDA beside the formulas in fp64: by Triton's interpreter on a CPU, which is slow, and on a GPU, where there is one."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.cuda import eights, rows, scores
from lamina.ops import fp8, norm, rotary, swiglu

FP32 = 2.0**-24
ROUNDING = {"cuda": 2.0**-8, "cpu": 2.0**-7}
"""Relative error of one rounding to bf16; the interpreter cuts off."""

BF16 = torch.bfloat16


def numbers(device: str, *shape: int, spread: float = 1.0) -> Tensor:
    """Random numbers in bf16."""
    return (torch.randn(shape) * spread).to(device, BF16)


def close(out: Tensor, truth: Tensor, terms: int, size: Tensor | float = 1.0) -> None:
    """One rounding to bf16, and so many in fp32, each of at most ``size``."""
    bound = ROUNDING[out.device.type] * truth.abs() + terms * FP32 * size + 1e-30
    assert ((out.double() - truth).abs() <= bound).all()


def gradients(formula: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The formula's value and its gradients, in fp64."""
    wide = [x.double().requires_grad_() for x in inputs]
    out = formula(*wide)
    return (out.detach(), *torch.autograd.grad(out, wide, grad.double()))


def check_norm(device: str, count: int, width: int) -> None:
    """Sums of D squares, rounded at each of some 16 levels of a tree, and a few operations more."""
    torch.manual_seed(0)
    x, weight, grad = numbers(device, count, width), numbers(device, width), numbers(device, count, width)
    wide = weight.double()
    out, x_grad = gradients(lambda x: norm.plain(x, wide, 1e-5), [x], grad)
    close(rows.norm(x, weight, 1e-5), out, 32, out.abs())
    inverse = x.double().square().mean(-1, keepdim=True).rsqrt()
    parts = (
        (grad.double() * wide).abs() + (x.double() * inverse).abs() * (grad.double() * wide).abs().mean()
    ) * inverse
    close(rows.norm_back(x, weight, grad, 1e-5), x_grad, 64, parts * 4)


def check_gate(device: str, count: int, width: int) -> None:
    torch.manual_seed(0)
    gate, up, grad = (numbers(device, count, width, spread=3.0) for _ in range(3))
    out, *grads = gradients(swiglu.plain, [gate, up], grad)
    close(rows.gate(gate, up), out, 16, out.abs())
    size = (grad.double() * up.double()).abs() * (1 + gate.double().abs())
    for found, truth in zip(rows.gate_back(gate, up, grad), grads, strict=True):
        close(found, truth, 16, size + truth.abs())


def check_rotation(device: str, count: int, heads: int, width: int) -> None:
    torch.manual_seed(0)
    x, angle = numbers(device, count, heads, width), torch.randn(count, width // 2)
    cos, sin = angle.cos().to(device, BF16), angle.sin().to(device, BF16)
    size = x.double().abs() + x.double().roll(width // 2, -1).abs()
    for sign, back in ((1.0, False), (-1.0, True)):
        truth = rotary._turn(x.double(), cos.double(), sin.double(), back=back)
        close(rows.rotate(x, cos, sin, sign), truth, 4, size)


def check_cross_entropy(device: str, count: int, vocabulary: int) -> None:
    """The loss is fp32: a logarithm of a sum, less a logit. What follows the last row stays as it was."""
    torch.manual_seed(0)
    logits, targets = numbers(device, count, vocabulary, spread=4.0), torch.randint(vocabulary, (count,), device=device)
    truth, grad = gradients(
        lambda x: F.cross_entropy(x, targets, reduction="none"), [logits], torch.ones(count).to(device)
    )
    losses = torch.full((count,), float("nan"), device=device)
    kept = logits.clone()
    scores.cross_entropy(kept, targets, losses, differentiate=False)
    assert torch.equal(kept, logits)
    assert ((losses.double() - truth).abs() <= 64 * FP32 * logits.double().abs().amax(1)).all()
    scores.cross_entropy(logits, targets, losses, differentiate=True)
    close(logits, grad, 64 + int(logits.shape[1] ** 0.5), grad.abs() + kept.double().abs().amax() * grad.abs())


def check_rows_in_fp8(device: str, count: int, width: int) -> None:
    """The bits of the plain way. The interpreter loses a carry: what it should round up to a power of two is half of that."""
    torch.manual_seed(0)
    x, factors = numbers(device, count, width), torch.rand(width).to(device)
    x[0] = 0
    if count > 3:
        x[1, 0], x[2, -1], x[3] = float("inf"), float("nan"), 1e-40
    for given in (None, factors):
        codes, scales = eights.quantise_rows(x, given, fp8.SMALLEST, fp8.LARGEST)
        wide = x.cpu().float() if given is None else x.cpu().float() * given.cpu()
        expected, factor = fp8.quantise_rows(wide)
        assert torch.equal(scales.cpu().nan_to_num(-1.0), factor.nan_to_num(-1.0))
        whole = scales.isfinite().cpu().flatten()
        found, expected = codes.cpu().float()[whole], expected.float()[whole]
        carried = (expected != 0) & (torch.frexp(expected.abs()).mantissa == 0.5) & (device == "cpu")
        assert torch.equal(found[~carried], expected[~carried])


def check_transpose(device: str, count: int, width: int) -> None:
    given = torch.randint(0, 256, (count, width), dtype=torch.uint8, device=device)
    out = torch.zeros(width, count, dtype=torch.uint8, device=device)
    eights.transpose(given, out)
    assert torch.equal(out, given.t())
