"""Attention over packed examples: each example alone, and windows."""

import pytest
import torch
from torch import Tensor

from lamina.ops.attention import Packed, attend_causally

LENGTHS = (1, 5, 12, 2, 30)


def heads(
    tokens: int, dtype: torch.dtype = torch.float32, queries: int = 4, keys: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    return tuple(torch.randn(tokens, count, 8, dtype=dtype) for count in (queries, keys, keys))  # type: ignore[return-value]


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """The definition, token by token."""
    group, out = q.shape[1] // k.shape[1], torch.empty_like(q)
    for token in range(len(q)):
        first = 0 if window is None else max(0, token - window + 1)
        for head in range(q.shape[1]):
            keys, values = k[first : token + 1, head // group], v[first : token + 1, head // group]
            out[token, head] = torch.softmax(keys @ q[token, head] / q.shape[2] ** 0.5, 0) @ values
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 11, 12, 13])
@pytest.mark.parametrize("keys", [1, 2, 4])
def test_definition(window: int | None, keys: int) -> None:
    q, k, v = heads(12, torch.float64, keys=keys)
    torch.testing.assert_close(attend_causally(q, k, v, window), by_hand(q, k, v, window), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_is_separate(window: int | None) -> None:
    packed = [tensor.requires_grad_() for tensor in heads(sum(LENGTHS))]
    out = Packed(LENGTHS)(0, *packed, window)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        alone = [tensor.detach()[rows].clone().requires_grad_() for tensor in packed]
        expected = attend_causally(*alone, window)
        expected.backward(upstream[rows])
        assert torch.equal(out[rows], expected)
        for one, other in zip(packed, alone, strict=True):
            assert one.grad is not None and torch.equal(one.grad[rows], other.grad)
        start += length


@pytest.mark.parametrize("value", [1e3, float("nan")])
@pytest.mark.parametrize("window", [None, 4])
def test_one_example_moves_no_other(window: int | None, value: float) -> None:
    q, k, v = heads(sum(LENGTHS))
    before = Packed(LENGTHS)(0, q, k, v, window)
    rows = slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))
    for tensor in (q, k, v):
        tensor[rows] = value
    after = Packed(LENGTHS)(0, q, k, v, window)
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[rows] = False
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[rows], before[rows])


def test_no_token_sees_a_later_one() -> None:
    q, k, v = heads(12)
    before = attend_causally(q, k, v)
    k[7:], v[7:] = 1e3, -1e3
    assert torch.equal(attend_causally(q, k, v)[:7], before[:7])


def test_lengths_that_do_not_cover_the_tokens_are_a_bug() -> None:
    with pytest.raises(RuntimeError, match="split"):
        Packed([3, 4])(0, *heads(8), None)
