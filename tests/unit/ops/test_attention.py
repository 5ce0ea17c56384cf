"""Attention over packed examples: each example alone, and windows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lamina import native
from lamina.ops.attention import Packed, attend_causally, attend_plainly

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernels")
LENGTHS = (1, 5, 12, 2, 30)


def heads(
    tokens: int, dtype: torch.dtype = torch.float32, queries: int = 4, keys: int = 2, width: int = 16
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
    torch.testing.assert_close(attend_causally(q, k, v, [12], window), by_hand(q, k, v, window), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("window", "dtype"), [(None, torch.float32), (4, torch.float32), (None, torch.bfloat16), (30, torch.bfloat16)]
)
def test_packed_is_separate(window: int | None, dtype: torch.dtype) -> None:
    packed = [tensor.requires_grad_() for tensor in heads(sum(LENGTHS), dtype)]
    out = Packed(LENGTHS)(0, *packed, window)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        alone = [tensor.detach()[rows].clone().requires_grad_() for tensor in packed]
        expected = attend_causally(*alone, [length], window)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_sees_a_later_one(dtype: torch.dtype) -> None:
    q, k, v = heads(60, dtype)
    before = attend_causally(q, k, v, [60])
    k[37:], v[37:] = 1e3, -1e3
    assert torch.equal(attend_causally(q, k, v, [60])[:37], before[:37])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, RuntimeError), (torch.bfloat16, ValueError)])
def test_lengths_that_do_not_cover_the_tokens_are_a_bug(dtype: torch.dtype, error: type[Exception]) -> None:
    with pytest.raises(error):
        Packed([3, 4])(0, *heads(8, dtype), None)


def gradients(
    op: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in inputs]
    out = op(*leaves)
    out.backward(upstream.to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def at_once(*inputs: Tensor) -> Tensor:
    return attend_causally(*inputs, [len(inputs[0])])


@needs_kernels
@pytest.mark.parametrize("width", [16, 48, 64, 128, 256])
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize(
    "tokens", [1, 17, 24, 25, 65, 300, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 513))]
)
def test_bf16_error_of_the_kernel_is_at_most_that_of_sdpa(tokens: int, queries: int, keys: int, width: int) -> None:
    """1.2: the rule of the house for two orders of rounding in the same precision.

    Of a handful of numbers the error is chance, so two tokens are looked at 32 times together. One token attends to itself
    alone: what should be zero, the gradients of query and key, is compared with nothing.
    """
    errors = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(32 if tokens <= 2 else 1):
        torch.manual_seed(tokens * width + seed)
        inputs = tuple(torch.randn(tokens, count, width).bfloat16() for count in (queries, keys, keys))
        upstream = torch.randn(tokens, queries, width).bfloat16()
        truth = gradients(attend_plainly, inputs, upstream, torch.float64)
        plain = gradients(attend_plainly, inputs, upstream, torch.bfloat16)
        ours = gradients(at_once, inputs, upstream, torch.bfloat16)
        for row, found in enumerate((ours, plain)):
            pairs = zip(found, truth, strict=True)
            errors[row] += torch.stack([(one.double() - other).square().sum() for one, other in pairs])
    measured = [0, 3] if tokens == 1 else [0, 1, 2, 3]
    assert (errors[0].sqrt() <= 1.2 * errors[1].sqrt())[measured].all(), errors.sqrt()


@needs_kernels
@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
def test_scores_far_apart(scale: float) -> None:
    """Probabilities of 0 and 1, and all alike: the exponential at its ends. Without upstream rounding the error is bf16's own."""
    q, k, v = heads(100, torch.bfloat16)
    q, k = (q * scale).bfloat16(), (k * scale).bfloat16()
    upstream = torch.randn_like(q)
    truth = gradients(attend_plainly, (q, k, v), upstream, torch.float64)
    ours = gradients(at_once, (q, k, v), upstream, torch.bfloat16)
    plain = gradients(attend_plainly, (q, k, v), upstream, torch.bfloat16)
    for one, other, true in zip(ours, plain, truth, strict=True):
        assert (one.double() - true).norm() <= 1.2 * (other.double() - true).norm() + 1e-3 * true.norm()


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "dtype", "width", "window", "by_kernel"),
    [
        (40, torch.bfloat16, 16, None, True),
        (40, torch.bfloat16, 16, 40, True),
        (40, torch.bfloat16, 16, 39, False),
        (40, torch.bfloat16, 8, None, False),
        (40, torch.bfloat16, 272, None, False),
        (40, torch.float16, 16, None, False),
        (40, torch.float32, 16, None, False),
    ],
)
def test_what_goes_to_the_kernel(
    tokens: int, dtype: torch.dtype, width: int, window: int | None, by_kernel: bool
) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in heads(tokens, dtype, width=width))
    out = attend_causally(q, k, v, [tokens], window)
    assert ("_Kernel" in str(out.grad_fn)) == by_kernel
    torch.testing.assert_close(out, attend_plainly(q, k, v, window), rtol=0.02, atol=0.02)


@needs_kernels
def test_gradients_of_packed_examples_are_separate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever one example holds, even NaN; memory that nobody has written holds NaN too."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    lengths = (17, 40, 33)
    rows = slice(17, 57)
    q, k, v = heads(sum(lengths), torch.bfloat16)
    upstream = torch.randn_like(q)
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
        assert other[rows].isnan().all()


@needs_kernels
def test_threads_change_no_bit() -> None:
    before, (q, k, v) = torch.get_num_threads(), heads(300, torch.bfloat16)
    lengths, upstream = [100, 17, 183], torch.randn_like(q)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                gradients(lambda *inputs: attend_causally(*inputs, lengths), (q, k, v), upstream, torch.bfloat16)
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for more in found[1:] for one, other in zip(found[0], more, strict=True))


@needs_kernels
@pytest.mark.parametrize("tokens", [40, 140])
def test_the_kernel_keeps_its_inputs_and_two_numbers_of_each_softmax(tokens: int) -> None:
    kept: list[Tensor] = []
    q, k, v = (tensor.requires_grad_() for tensor in heads(tokens, torch.bfloat16))
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        attend_causally(q, k, v, [tokens])
    *inputs, softmax = kept
    assert [x.data_ptr() for x in inputs] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    scores = torch.einsum("qhd,khd->qhk", q.double(), k.double().repeat_interleave(2, 1))
    scores.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[:, None], -torch.inf)
    highest = scores.amax(2)
    total = ((scores - highest[..., None]) / q.shape[2] ** 0.5).exp().sum(2)
    torch.testing.assert_close(softmax.double(), torch.stack([highest, 1 / total], 2), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_tensors_in_another_order_of_memory() -> None:
    q, k, v = heads(40, torch.bfloat16)
    upstream = torch.randn_like(q)
    strided = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    expected = gradients(at_once, (q, k, v), upstream, torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in strided]
    out = at_once(*leaves)
    out.backward(upstream.transpose(0, 1).contiguous().transpose(0, 1))
    for one, other in zip([out, *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert torch.equal(one, other)
    leaf = q.clone().requires_grad_()
    at_once(leaf, k, v).sum().backward()  # an expanded gradient: one number for all
    (again,) = torch.autograd.grad(at_once(leaf, k, v), leaf, torch.ones_like(q))
    assert torch.equal(leaf.grad, again)
