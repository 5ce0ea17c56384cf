"""Attention over packed examples: each example alone, and windows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lamina.ops import attention
from lamina.ops.attention import Packed, attend_causally, attend_in_blocks, attend_plainly

LENGTHS = (1, 5, 12, 2, 30)


def heads(
    tokens: int, dtype: torch.dtype = torch.float32, queries: int = 4, keys: int = 2, width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    return tuple(torch.randn(tokens, count, width, dtype=dtype) for count in (queries, keys, keys))  # type: ignore[return-value]


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


def gradients(
    op: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in inputs]
    out = op(*leaves)
    out.backward(upstream.to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("held", [1, 2**20])  # one key head at a time, and all
@pytest.mark.parametrize("keys", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 4, 11])
def test_blocked_gradient_by_finite_differences(
    monkeypatch: pytest.MonkeyPatch, tokens: int, keys: int, held: int
) -> None:
    """Every input costs two forward and one backward pass, so heads are two numbers wide; blocks cut tokens and heads."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    monkeypatch.setattr(attention, "HELD", held)
    inputs = [tensor.requires_grad_() for tensor in heads(tokens, torch.float64, keys=keys, width=2)]
    assert torch.autograd.gradcheck(attend_in_blocks, inputs)


@pytest.mark.parametrize("width", [8, 16, 64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 17, 63, 64, 65, 300, 513])
def test_blocked_bf16_error_is_at_most_that_of_sdpa(tokens: int, queries: int, keys: int, width: int) -> None:
    """1.2: the rule of the house for two orders of rounding in the same precision.

    A gradient of a handful of numbers has an error of chance, so two tokens are looked at 32 times together.
    """
    errors = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(32 if tokens == 2 else 1):
        torch.manual_seed(tokens * width + seed)
        inputs = tuple(torch.randn(tokens, count, width).bfloat16() for count in (queries, keys, keys))
        upstream = torch.randn(tokens, queries, width).bfloat16()
        truth = gradients(attend_plainly, inputs, upstream, torch.float64)
        plain = gradients(attend_plainly, inputs, upstream, torch.bfloat16)
        ours = gradients(attend_in_blocks, inputs, upstream, torch.bfloat16)
        assert torch.equal(ours[0], plain[0])
        for row, found in enumerate((ours, plain)):
            pairs = zip(found[1:], truth[1:], strict=True)
            errors[row] += torch.stack([(one.double() - other).square().sum() for one, other in pairs])
    assert (errors[0].sqrt() <= 1.2 * errors[1].sqrt()).all()


@pytest.mark.parametrize(
    ("tokens", "dtype", "window", "blocked"),
    [
        (40, torch.bfloat16, None, True),
        (40, torch.bfloat16, 40, True),
        (40, torch.bfloat16, 39, False),
        (15, torch.bfloat16, None, False),
        (768, torch.bfloat16, None, False),
        (40, torch.float16, None, False),
        (40, torch.float32, None, False),
    ],
)
def test_backward_is_blocked_in_bf16_only(tokens: int, dtype: torch.dtype, window: int | None, blocked: bool) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in heads(tokens, dtype))
    upstream = torch.randn(tokens, 4, 8).to(dtype)
    chosen = gradients(lambda *inputs: attend_causally(*inputs, window), (q, k, v), upstream, dtype)
    plain = gradients(lambda *inputs: attend_plainly(*inputs, window), (q, k, v), upstream, dtype)
    assert torch.equal(chosen[0], plain[0])
    assert all(torch.equal(one, other) for one, other in zip(chosen, plain, strict=True)) != blocked


def test_blocked_gradients_of_packed_examples_are_separate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever one example holds, even NaN; memory that nobody has written holds NaN too."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    lengths = (17, 40, 33)
    rows = slice(17, 57)
    q, k, v = heads(sum(lengths), torch.bfloat16)
    upstream = torch.randn(sum(lengths), 4, 8).bfloat16()
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for value in (1.0, torch.nan):
            inputs = tuple(
                tensor.clone().index_fill_(0, torch.arange(rows.start, rows.stop), value) for tensor in (q, k, v)
            )
            found.append(gradients(lambda *inputs: Packed(lengths)(0, *inputs, None), inputs, upstream, torch.bfloat16))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*found, strict=True):
        others = torch.ones(sum(lengths), dtype=torch.bool)
        others[rows] = False
        assert one.isfinite().all()
        assert torch.equal(one[others], other[others])


@pytest.mark.parametrize("tokens", [40, 140])
def test_blocked_forward_keeps_only_its_inputs(tokens: int) -> None:
    kept = []
    q, k, v = (tensor.requires_grad_() for tensor in heads(tokens, torch.bfloat16))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: None):
        attend_causally(q, k, v)
    assert kept == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
