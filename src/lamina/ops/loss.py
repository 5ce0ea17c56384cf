"""Cross-entropy from hidden states, over supervised tokens only, without ever keeping the logits.

For a vocabulary of 32,000 the logits of one token take as much memory as twenty of its hidden states. The head is frozen
here, so the only gradient is the one to the hidden states; it is computed in the forward pass, slice by slice, while the
slice's logits are at hand. Two matrix products over the supervised tokens, none over the others, and no logits kept: the same cost as
training and as evaluation.

A slice's logits stay in the hidden states' precision, are widened and normalised a few tokens at a time, and are then overwritten by
their own gradient. So no slice exists in fp32, and the elementwise passes run over memory that a CPU's cache holds. Rejected for torch:
exp(logit - logsumexp), a second exponential, which takes twice the time of a softmax and two maxima. In bf16 on a CPU a kernel of our
own does all of it token by token, where there is one (``native``; on CUDA ``cuda``); there a second exponential is cheaper than memory
for the first.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import cuda, native
from lamina.ops.products import product
from lamina.ops.shapes import Bool, Float, Int

IGNORED = -100
"""The target of a token that carries no loss, as in torch's own cross-entropy."""

SLICE = 512
"""Supervised tokens whose logits exist at one time: at V = 32,000 about 33 MB in bf16, 66 MB in fp32."""

WIDE_SLICE = 2048
"""The same on CUDA in training, where a product of so few tokens leaves most of the device idle."""

CHUNK = {"cpu": 16}
"""Tokens that are normalised at one time, by device: two fp32 copies at V = 32,000 are 4 MB, which a CPU's caches hold."""

WIDE_CHUNK = 128
"""The same on all other devices, where few large kernels are faster; their copies are still no more than the slice's logits."""


def cross_entropy_sum(
    hidden: Float[Tensor, "N D"], vocabulary: Float[Tensor, "V D"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, ""], int]:
    """Computes Σ -log softmax(vocabulary·h)[target] over the tokens with a target, in fp32, and the number of those tokens.

    The sum is not divided: the caller divides once, by the tokens of the whole optimiser step. The gradient goes to
    ``hidden`` only; ``vocabulary`` is frozen. Targets that lie on the CPU are counted without waiting for another device.
    """
    supervised = (targets != IGNORED).nonzero().squeeze(1)
    if len(supervised) < len(targets):
        hidden, targets = hidden[supervised.to(hidden.device, non_blocking=True)], targets[supervised]
    targets = targets.to(hidden.device, non_blocking=True)
    total: Tensor = _CrossEntropySum.apply(hidden, vocabulary, targets)  # type: ignore[no-untyped-call]
    return total, len(supervised)


def slice_rows(device: str) -> int:
    """Supervised tokens whose logits exist at one time in training, by kind of device."""
    return WIDE_SLICE if device == "cuda" else SLICE


class _CrossEntropySum(torch.autograd.Function):
    """∂(-log p(target))/∂h = (p - onehot(target))·vocabulary, made in the forward pass; backward multiplies it by what arrives."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, vocabulary: Tensor, targets: Tensor) -> Tensor:
        losses = hidden.new_empty(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = slice_rows(hidden.device.type)
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            _slice(hidden[rows], vocabulary, targets[rows], losses[rows], None if gradient is None else gradient[rows])
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def _slice(hidden: Tensor, vocabulary: Tensor, targets: Tensor, losses: Tensor, gradient: Tensor | None) -> None:
    """Writes the losses of a slice of rows, and their gradient; its logits are gone before the next slice has any."""
    logits = product((hidden, vocabulary.t()))
    if native.takes(logits):
        targets = targets.contiguous()
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
            raise IndexError(f"targets: found {targets.min()} … {targets.max()}, expected 0 … {logits.shape[1] - 1}")
        native.call("cross_entropy", logits, targets, losses, *logits.shape, int(gradient is not None))
    elif cuda.takes(logits):
        from lamina.cuda import scores

        scores.cross_entropy(logits, targets.contiguous(), losses, differentiate=gradient is not None)
    else:
        for part, target, loss in _chunks(logits, targets, losses):
            _normalise(part, target[:, None], loss, differentiate=gradient is not None)
    if gradient is not None:
        product((logits, vocabulary), out=gradient)


def _chunks(*slices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each of the tensors, in turn."""
    return zip(*(tensor.split(CHUNK.get(tensor.device.type, WIDE_CHUNK)) for tensor in slices), strict=True)


def _normalise(
    logits: Float[Tensor, "S V"], targets: Int[Tensor, "S 1"], losses: Float[Tensor, " S"], *, differentiate: bool
) -> None:
    """Writes the rows' losses and, with ``differentiate``, softmax - onehot in place of the logits.

    The normaliser log Σ exp(logit) is the largest logit less the logarithm of its probability, which is at least 1/V.
    """
    wide = logits.to(losses.dtype)
    highest, chosen = wide.amax(1), wide.gather(1, targets).squeeze(1)
    softmax = wide.softmax(1)
    torch.sub(highest - softmax.amax(1).log(), chosen, out=losses)
    if differentiate:
        softmax.scatter_add_(1, targets, softmax.new_full((1, 1), -1.0).expand(len(softmax), 1))
        logits.copy_(softmax)


@torch.no_grad()
def token_scores(
    hidden: Float[Tensor, "N D"], vocabulary: Float[Tensor, "V D"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " S"], Bool[Tensor, " S"]]:
    """Scores each of the S supervised rows: -log p(target) in fp32, and whether the target is the most likely token."""
    supervised = (targets != IGNORED).nonzero().squeeze(1)
    losses = hidden.new_empty(len(supervised), dtype=torch.float32)
    correct = torch.empty_like(losses, dtype=torch.bool)
    for start in range(0, len(supervised), SLICE):
        rows, now = supervised[start : start + SLICE], slice(start, start + SLICE)
        logits = product((hidden[rows], vocabulary.t()))
        for part, target, loss, hit in _chunks(logits, targets[rows], losses[now], correct[now]):
            _score(part.float(), target, loss, hit)
    return losses, correct


@torch.no_grad()
def paired_scores(
    before: Float[Tensor, "N D"],
    after: Float[Tensor, "N D"],
    vocabulary: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
) -> tuple[Float[Tensor, "2 S"], Bool[Tensor, "2 S"], Float[Tensor, " S"]]:
    """Scores the S supervised rows under two models that share a vocabulary, and tells how far their predictions are apart.

    Losses and hits are those of ``token_scores``, bit by bit, because the same products are taken of the same slices. No
    more than a slice of both models' logits exists at one time.

    Returns:
        Losses and hits, ``before`` first, and KL(before‖after) in nats.
    """
    supervised = (targets != IGNORED).nonzero().squeeze(1)
    losses = before.new_empty((2, len(supervised)), dtype=torch.float32)
    correct, apart = torch.empty_like(losses, dtype=torch.bool), torch.empty_like(losses[0])
    for start in range(0, len(supervised), SLICE):
        rows, now = supervised[start : start + SLICE], slice(start, start + SLICE)
        logits = [product((hidden[rows], vocabulary.t())) for hidden in (before, after)]
        slices = (*logits, targets[rows], *losses[:, now], *correct[:, now], apart[now])
        for p, q, target, loss_p, loss_q, hit_p, hit_q, kl in _chunks(*slices):
            kl.copy_(divergence(_score(p.float(), target, loss_p, hit_p), _score(q.float(), target, loss_q, hit_q)))
    return losses, correct, apart


def divergence(before: Float[Tensor, "S V"], after: Float[Tensor, "S V"]) -> Float[Tensor, " S"]:
    """Computes KL(before‖after) = Σ p·(log p - log q) of each row, in nats, from log-probabilities."""
    return F.kl_div(after, before, log_target=True, reduction="none").sum(1)


def _score(logits: Float[Tensor, "S V"], targets: Int[Tensor, " S"], losses: Tensor, correct: Tensor) -> Tensor:
    """Writes the rows' losses and hits, and returns their log-probabilities."""
    torch.eq(logits.argmax(1), targets, out=correct)
    scores = logits.log_softmax(1)
    losses.copy_(F.nll_loss(scores, targets, reduction="none"))
    return scores
