"""Dropout from a seed: what it zeroes, and that it is one linear map for one seed."""

import pytest
import torch

from lamina.ops.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_is_zeroed_and_the_rest_raised(share: float, dtype: torch.dtype) -> None:
    """Five standard deviations of a binomial distribution. What is kept is rounded once to bf16: 1/(1 - p) in bf16 would shift it all."""
    x = torch.randn(400, 500).to(dtype)
    out = Dropout(share, seed=1)(x)
    zeroed = (out == 0) & (x != 0)
    assert abs(zeroed.double().mean() - share) < 5 * (share * (1 - share) / x.numel()) ** 0.5
    rounding = torch.finfo(dtype).eps * (0.51 if dtype == torch.bfloat16 else 1)
    torch.testing.assert_close(out[~zeroed].double(), x[~zeroed].double() / (1 - share), rtol=rounding, atol=0)
    assert abs(zeroed.double().mean(0) - share).max() < 6 * (share * (1 - share) / 400) ** 0.5, "columns are alike"


def test_a_seed_is_one_linear_map() -> None:
    x, y = torch.randn(2, 30, 40, dtype=torch.float64)
    one, other = Dropout(0.3, seed=5), Dropout(0.3, seed=6)
    torch.testing.assert_close(one(x + 2 * y), one(x) + 2 * one(y))
    assert not torch.equal(one(x) == 0, other(x) == 0)
    strided = x.t().contiguous().t()
    assert torch.equal(one(strided), one(x))


def test_threads_change_no_number() -> None:
    before, x, found = torch.get_num_threads(), torch.randn(300, 500), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(Dropout(0.4, seed=2)(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_calls_are_drawn_by_the_global_generator() -> None:
    torch.manual_seed(3)
    first = [Dropout.drawn(0.1) for _ in range(3)]
    torch.manual_seed(3)
    assert [Dropout.drawn(0.1) for _ in range(3)] == first
    assert len({call.seed for call in first}) == 3
