"""What holds for every shape: of projections, packed lengths, windows, masks, and cuts of a step."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lamina.ops.attention import Packed, attend_causally
from lamina.ops.dropout import Dropout
from lamina.ops.frozen import Dense
from lamina.ops.lora import Projection, Update, plain, project
from lamina.ops.loss import IGNORED, cross_entropy_sum

seeds = st.integers(0, 2**31)
fast = settings(max_examples=40, deadline=None)


@fast
@given(
    tokens=st.integers(1, 70),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    rank=st.integers(1, 17),
    seed=seeds,
)
def test_adapted_projection_has_the_bits_of_the_formula(
    tokens: int, inputs: int, outputs: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight, dropout = torch.randn(tokens, inputs), torch.randn(outputs, inputs), Dropout(0.3, seed)
    bias, a, b = torch.randn(outputs), torch.randn(rank, inputs), torch.randn(outputs, rank)
    (out,) = project(x, Projection(Dense(weight), bias, Update(a, b, 1.7, dropout)))
    assert torch.equal(out, plain(x, dropout(x), weight, bias, a, b, 1.7))


@fast
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 25),
    groups=st.sampled_from([1, 2, 4]),
    seed=seeds,
)
def test_packed_attention_is_that_of_each_example_alone(
    lengths: list[int], window: int | None, groups: int, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(sum(lengths), heads, 8) for heads in (4, 4 // groups, 4 // groups))
    alone = [
        attend_causally(*parts, [len(parts[0])], window)
        for parts in zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    ]
    assert torch.equal(Packed(lengths)(0, q, k, v, window), torch.cat(alone))


def loss_and_gradient(
    hidden: Tensor, vocabulary: Tensor, targets: Tensor, cuts: list[int]
) -> tuple[float, int, Tensor]:
    """Sums over parts of a step."""
    leaf = hidden.clone().requires_grad_()
    total, count = 0.0, 0
    for h, t in zip(leaf.tensor_split(cuts), targets.tensor_split(cuts), strict=True):
        part, tokens = cross_entropy_sum(h, vocabulary, t)
        part.backward()
        total, count = total + part.item(), count + tokens
    assert leaf.grad is not None
    return total, count, leaf.grad


@fast
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4).map(sorted),
    seed=seeds,
)
def test_loss_is_that_of_torch_however_a_step_is_cut(mask: list[bool], cuts: list[int], seed: int) -> None:
    """In float64; 1e-12 is 4,500 ε for sums of at most 60 losses."""
    torch.manual_seed(seed)
    hidden, vocabulary = torch.randn(len(mask), 5).double(), torch.randn(11, 5).double()
    targets = torch.randint(11, (len(mask),)).where(torch.tensor(mask), IGNORED)
    total, count, gradient = loss_and_gradient(hidden, vocabulary, targets, cuts)
    leaf = hidden.clone().requires_grad_()
    expected = F.cross_entropy(leaf @ vocabulary.t(), targets, reduction="sum", ignore_index=IGNORED)
    expected.backward()
    assert count == sum(mask)
    assert abs(total - expected.item()) <= 1e-12 * max(1.0, abs(expected.item()))
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-12)
