"""The difference of two models, against its definition; its verdict; and what an adapter does when it is loaded."""

import math

import pytest
import torch
from models import logits, some_tokens, tiny
from torch import nn

from lamina.adapter import LoRA, adapted, adapter_scale, attach
from lamina.understand.difference import Difference, compare, difference_on_load


def test_the_numbers_are_the_definitions() -> None:
    torch.manual_seed(0)
    before, targets = torch.randn(75, 40), torch.randint(40, (75,))  # more than two slices of tokens
    after = before + 0.3 * torch.randn(75, 40)
    found = compare(before, after, targets)
    p, q = before.double().softmax(1), after.double().softmax(1)
    rows = torch.arange(75)
    assert found.tokens == 75
    assert found.largest_logit_difference == float((after - before).abs().max())
    assert found.agreement == float((p.argmax(1) == q.argmax(1)).double().mean()) < 1
    # Sums of 75·40 fp32 terms: 3000 · 2^-24 = 2e-4 at the very worst.
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=2e-4)
    assert found.loss_adapter == pytest.approx(-float(p[rows, targets].log().mean()), rel=2e-4)
    assert found.loss_merged == pytest.approx(-float(q[rows, targets].log().mean()), rel=2e-4)
    assert found.as_json()["perplexity_merged"] == math.exp(found.loss_merged)


def test_equal_models_are_the_same() -> None:
    scores = torch.randn(10, 8)
    found = compare(scores, scores.clone(), torch.zeros(10, dtype=torch.int64))
    assert (found.kl, found.agreement, found.largest_logit_difference) == (0, 1, 0)
    assert found.loss_adapter == found.loss_merged
    assert found.lines()[1] == (
        "the merged model answers as the adapter does (KL below 0.001 and the same token in 99% of the clear cases)"
    )


@pytest.mark.parametrize(
    ("kl", "agreement", "same"), [(9e-4, 0.99, True), (1e-3, 1.0, False), (0.0, 0.98, False), (math.nan, 1.0, False)]
)
def test_the_verdict(kl: float, agreement: float, same: bool) -> None:
    found = Difference(100, 0.1, kl, 0.5, agreement, 2.0, 800.0)
    assert found.as_json()["same"] == same
    assert found.as_json()["perplexity_merged"] == math.inf
    said = "\n".join(found.lines())
    assert ("does NOT answer as the adapter does" in said) == (not same)
    assert "perplexity 7.389 with the adapter" in said


def test_near_ties_do_not_decide() -> None:
    """Two tokens a hundredth of a nat apart may change places; two that are a nat apart may not."""
    adapter = torch.tensor([[2.0, 1.99, 0.0], [2.0, 1.0, 0.0]])
    merged = torch.tensor([[1.99, 2.0, 0.0], [2.0, 1.0, 0.0]])
    found = compare(adapter, merged, torch.tensor([0, 0]))
    assert (found.agreement, found.clear_agreement, found.same) == (0.5, 1.0, True)
    swapped = compare(
        adapter, merged.flip(0)[[1, 0]][:, [0, 1, 2]].index_select(1, torch.tensor([1, 0, 2])), torch.tensor([0, 0])
    )
    assert swapped.clear_agreement == 0.0 and not swapped.same


def test_what_an_adapter_does_on_load() -> None:
    model, tokens = tiny(), some_tokens([7])
    attach(model, LoRA(rank=4, dropout=0.5))
    model.train()
    assert difference_on_load(model, tokens.tolist()) == 0, "every B is zero"
    for module in adapted(model).values():
        nn.init.normal_(module.b, std=0.1)
    found = difference_on_load(model, tokens.tolist())
    assert model.training, "left as it was"
    model.eval()
    with torch.no_grad():
        with adapter_scale(model, 0.0):
            base = logits(model, tokens)
        assert found == float((logits(model, tokens) - base).abs().max()) > 0
