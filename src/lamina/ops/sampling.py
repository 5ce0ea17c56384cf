"""From logits to a token: repetition penalty, temperature, top-k, top-p, in transformers' order and with its rules."""

import torch
from torch import Tensor

from lamina.ops.shapes import Bool, Float, Int


def penalise(logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"], penalty: float) -> Float[Tensor, "B V"]:
    """Divides the positive logits of tokens already seen by ``penalty``, multiplies their negative ones.

    Keskar et al. 2019 (arXiv:1909.05858), with the treatment of negative logits that has become usual.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def warp(logits: Float[Tensor, "B V"], temperature: float, top_k: int, top_p: float) -> Float[Tensor, "B V"]:
    """Divides by the temperature and sets the tokens that may not be drawn to -∞.

    Args:
        top_k: only the k most likely tokens may be drawn, and those as likely as the k-th; 0: all.
        top_p: of those, only the smallest set of the most likely ones whose probabilities sum to at least p
            (Holtzman et al. 2019, arXiv:1904.09751).
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
    if top_p < 1.0:
        ascending, order = _sort(logits)
        tail = ascending.softmax(1).cumsum(1) <= 1 - top_p
        tail[:, -1] = False  # the most likely token stays, however small p is
        logits = logits.masked_fill(tail.scatter(1, order, tail), -torch.inf)
    return logits


def _sort(logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.is_cuda or len(logits) == 1:
        values, order = logits.sort()
        return values, order
    # On a CPU, torch sorts several rows at once five times as slowly as one after the other (2.13; 32 rows of 2,048).
    rows = [row.sort() for row in logits]
    return torch.stack([row.values for row in rows]), torch.stack([row.indices for row in rows])


def draw(logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Draws a token of each row from softmax(logits): the first whose cumulative probability exceeds ``uniform``.

    Args:
        uniform: one number in [0, 1) for each row, in float64. Given from outside, so that a row's token depends on
            that row alone and not on its place in the batch.
    """
    cumulative = logits.double().softmax(1).cumsum(1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
