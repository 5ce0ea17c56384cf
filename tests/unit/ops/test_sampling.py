"""A token is drawn with its probability, and never one that was ruled out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.ops.sampling import draw, warp


@given(seed=st.integers(0, 1000))
def test_evenly_spread_numbers_draw_each_token_in_proportion(seed: int) -> None:
    logits = torch.randn(7, generator=torch.Generator().manual_seed(seed)) * 3
    count = 5000
    drawn = draw(logits.expand(count, 7), (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    counts = torch.bincount(drawn, minlength=7)
    # An interval of length p holds p · count points of the grid, give or take one.
    assert (counts - logits.double().softmax(0) * count).abs().max() <= 1


def test_ruled_out_tokens_are_never_drawn() -> None:
    inf = torch.inf
    logits = torch.tensor([[-inf, 0.0, -inf, 1.0, -inf]])
    for uniform, token in ((0.0, 1), (0.2, 1), (0.3, 3), (1 - 2**-53, 3)):
        assert draw(logits, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@given(top_p=st.floats(0.01, 0.99), seed=st.integers(0, 100))
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, seed: int) -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed)).double()
    kept = warp(logits, 1.0, 0, top_p).isfinite()
    for row, probabilities in zip(kept, logits.softmax(1), strict=True):
        inside, outside = probabilities[row], probabilities[~row]
        assert inside.sum() >= top_p - 1e-12
        assert inside.sum() - inside.min() < top_p + 1e-12
        assert not len(outside) or outside.max() <= inside.min()


def test_top_k_of_more_than_there_are_keeps_all() -> None:
    logits = torch.randn(2, 5)
    assert torch.equal(warp(logits, 1.0, 9, 1.0), logits)
