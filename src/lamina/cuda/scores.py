"""Cross-entropy of a slice of logits: its losses, and softmax - onehot in place of the logits."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits of a row that a program holds at one time."""


@triton.jit
def _cross_entropy(logits, targets, losses, WIDTH: tl.constexpr, DIFFERENTIATE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target, at = tl.load(targets + row), tl.arange(0, BLOCK)
    logits += row * WIDTH
    chosen = tl.load(logits + target).to(tl.float32)  # before anything is written in its place
    highest, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        part = tl.load(logits + start + at, mask=start + at < WIDTH, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(part))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(part - higher))
        highest = higher
    tl.store(losses + row, highest - chosen + tl.log(total))
    if DIFFERENTIATE:
        for start in range(0, WIDTH, BLOCK):
            inside = start + at < WIDTH
            part = tl.load(logits + start + at, mask=inside, other=float("-inf")).to(tl.float32)
            softmax = tl.exp(part - highest) / total - tl.where(start + at == target, 1.0, 0.0)
            tl.store(logits + start + at, softmax.to(logits.dtype.element_ty), mask=inside)


def cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, *, differentiate: bool) -> None:
    """Writes the losses of the rows, fp32, and with ``differentiate`` the gradient in place of the logits.

    A target outside of the vocabulary is not noticed: that would wait for the device.
    """
    rows, width = logits.shape
    settings = {"WIDTH": width, "DIFFERENTIATE": differentiate, "BLOCK": BLOCK, "num_warps": 8}
    _cross_entropy[(rows,)](logits, targets, losses, **settings)
