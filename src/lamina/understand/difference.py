"""How far two models answer from each other, on the same tokens."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.adapter import adapter_scale
from lamina.generation import evaluating
from lamina.model.decoder import Decoder
from lamina.ops.attention import Packed
from lamina.ops.loss import divergence

SAME_KL = 1e-3
"""Nats per token below which two models count as the same: a sampler needs some thousand tokens to tell them apart."""

SAME_CHOICE = 0.99
"""Share of equal most likely tokens from which on they do, of those where the most likely one leads clearly."""

CLEAR = 0.1
"""Nats by which the most likely token leads the next one clearly: nearer ones are ties, which rounding decides."""

_SLICE = 32  # tokens whose distributions are compared at one time


@dataclass(frozen=True)
class Difference:
    """The merged model against base + adapter, on the tokens of held-out rows that count."""

    tokens: int
    largest_logit_difference: float
    kl: float
    """Mean KL(base + adapter ‖ merged) in nats per token."""
    agreement: float
    """Share of tokens where both find the same token most likely."""
    clear_agreement: float
    """The same, of the tokens where it leads clearly; 1 where it nowhere does."""
    loss_adapter: float
    """Mean -log p of the data's tokens under base + adapter."""
    loss_merged: float

    @property
    def same(self) -> bool:
        """Whether the merged model answers as the adapter does."""
        return self.kl < SAME_KL and self.clear_agreement >= SAME_CHOICE

    def lines(self) -> list[str]:
        """The numbers, and what they mean."""
        before, after = _perplexity(self.loss_adapter), _perplexity(self.loss_merged)
        said = (
            f"merged against base + adapter on {self.tokens} held-out tokens: largest logit difference "
            f"{self.largest_logit_difference:.2e}, KL {self.kl:.2e} nats per token, same most likely token {self.agreement:.1%} "
            f"({self.clear_agreement:.1%} where it leads by {CLEAR} nats), perplexity {before:.4g} with the adapter and "
            f"{after:.4g} merged"
        )
        limits = f"KL below {SAME_KL:g} and the same token in {SAME_CHOICE:.0%} of the clear cases"
        if self.same:
            return [said, f"the merged model answers as the adapter does ({limits})"]
        return [said, f"the merged model does NOT answer as the adapter does (expected {limits})"]

    def as_json(self) -> dict[str, Any]:
        """The numbers and the verdict for machines."""
        before, after = _perplexity(self.loss_adapter), _perplexity(self.loss_merged)
        return asdict(self) | {"perplexity_adapter": before, "perplexity_merged": after, "same": self.same}


def compare(adapter: Tensor, merged: Tensor, targets: Tensor) -> Difference:
    """Compares the logits of two models, both [S, V] in fp32, at tokens of which the data's are ``targets`` [S]."""
    largest, kl, agree, agree_clearly, clear, losses = 0.0, 0.0, 0, 0, 0, [0.0, 0.0]
    for start in range(0, len(targets), _SLICE):
        rows = slice(start, start + _SLICE)
        before, after = adapter[rows], merged[rows]
        largest = max(largest, float((after - before).abs().max()))
        same, best = before.argmax(1) == after.argmax(1), before.topk(2, dim=1).values
        leads = best[:, 0] - best[:, 1] > CLEAR
        agree, agree_clearly, clear = (
            agree + int(same.sum()),
            agree_clearly + int((same & leads).sum()),
            clear + int(leads.sum()),
        )
        before, after = before.log_softmax(1), after.log_softmax(1)
        kl += float(divergence(before, after).sum())
        for side, scores in enumerate((before, after)):
            losses[side] += float(F.nll_loss(scores, targets[rows], reduction="sum"))
    count = len(targets)
    clearly = agree_clearly / clear if clear else 1.0
    return Difference(count, largest, kl / count, agree / count, clearly, losses[0] / count, losses[1] / count)


@torch.no_grad()
def difference_on_load(model: Decoder, tokens: Sequence[int]) -> float:
    """The largest difference of a logit that the adapter makes on these tokens: 0 is an adapter without effect."""
    device = model.vocabulary.device
    ids, position = torch.tensor(list(tokens), device=device), torch.arange(len(tokens), device=device)

    def logits() -> Tensor:
        return F.linear(model(ids, position, Packed([len(ids)])), model.vocabulary).float()

    with evaluating(model.modules()):
        adapted = logits()
        with adapter_scale(model, 0.0):
            return float((adapted - logits()).abs().max())


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
