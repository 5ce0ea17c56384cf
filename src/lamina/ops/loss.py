"""Cross-entropy from hidden states, over supervised rows only, without ever keeping the logits.

For a vocabulary of 32,000 the logits of one token take as much memory as twenty of its hidden states. The head is frozen
here, so the only gradient is the one to the hidden states; it is computed in the forward pass, slice by slice, while the
slice's logits are at hand. Two GEMMs per supervised row, none for the others, and no logits kept: the same cost as
training and as evaluation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.ops.shapes import Bool, Float, Int

IGNORED = -100
"""The target of a token that carries no loss, as in torch's own cross-entropy."""

SLICE = 512
"""Supervised rows whose logits exist at one time: at V = 32,000 about 66 MB in fp32."""


def cross_entropy_sum(
    hidden: Float[Tensor, "N D"], vocabulary: Float[Tensor, "V D"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, ""], int]:
    """Computes Σ -log softmax(vocabulary·h)[target] over the rows with a target, in fp32, and the number of those rows.

    The sum is not divided: the caller divides once, by the tokens of the whole optimiser step. The gradient goes to
    ``hidden`` only; ``vocabulary`` is frozen.
    """
    supervised = (targets != IGNORED).nonzero().squeeze(1)
    total: Tensor = _CrossEntropySum.apply(hidden[supervised], vocabulary, targets[supervised])  # type: ignore[no-untyped-call]
    return total, len(supervised)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, vocabulary: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), SLICE):
            rows = slice(start, start + SLICE)
            logits = F.linear(hidden[rows], vocabulary).to(wide)
            normaliser = logits.logsumexp(1, keepdim=True)
            total += (normaliser - logits.gather(1, targets[rows, None])).sum()
            if gradient is not None:
                softmax = logits.sub_(normaliser).exp_()  # [slice, V]; d loss / d logits = softmax - onehot
                softmax.scatter_add_(1, targets[rows, None], softmax.new_full((1, 1), -1.0).expand(len(softmax), 1))
                torch.mm(softmax.to(hidden.dtype), vocabulary, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


@torch.no_grad()
def token_scores(
    hidden: Float[Tensor, "N D"], vocabulary: Float[Tensor, "V D"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " S"], Bool[Tensor, " S"]]:
    """Scores each of the S supervised rows: -log p(target) in fp32, and whether the target is the most likely token."""
    supervised = (targets != IGNORED).nonzero().squeeze(1)
    losses = hidden.new_empty(len(supervised), dtype=torch.float32)
    correct = torch.empty_like(losses, dtype=torch.bool)
    for start in range(0, len(supervised), SLICE):
        rows = supervised[start : start + SLICE]
        logits = F.linear(hidden[rows], vocabulary).float()
        losses[start : start + SLICE] = F.cross_entropy(logits, targets[rows], reduction="none")
        correct[start : start + SLICE] = logits.argmax(1) == targets[rows]
    return losses, correct
