"""Attention of packed examples on a GPU: near the truth, and no example sees another."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lamina.ops.attention import Packed, attend_causally, by_flash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = [1, 17, 300, 64]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(key_heads: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(sum(LENGTHS), count, width).bfloat16().cuda() for count in (8, key_heads, key_heads)]


def results(attend: Attend, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of q, k and v, in fp64."""
    given = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = attend(*given)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, given, grad))]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("key_heads", "width"), [(8, 128), (2, 64), (8, 40)])
def test_errors_are_those_of_torchs_attention(key_heads: int, width: int, window: int | None) -> None:
    """Beside the truth in fp64, no larger than 1.2 times those of SDPA in bf16, example by example."""
    inputs = heads(key_heads, width)
    assert by_flash(inputs[0])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_causally(q, k, v, LENGTHS, window)

    truth = results(plain, inputs, torch.float64)
    usual = results(plain, inputs, torch.bfloat16)
    ours = results(lambda q, k, v: Packed(LENGTHS)(0, q, k, v, window), inputs, torch.bfloat16)
    for found, other, exact in zip(ours, usual, truth, strict=True):
        assert (found - exact).norm() <= 1.2 * (other - exact).norm()


def test_no_example_sees_another() -> None:
    inputs = heads(2, 64)
    before = results(lambda q, k, v: Packed(LENGTHS)(0, q, k, v, None), inputs, torch.bfloat16)
    for x in inputs:
        x[18:318] = torch.nan
    after = results(lambda q, k, v: Packed(LENGTHS)(0, q, k, v, None), inputs, torch.bfloat16)
    for one, other in zip(before[:1], after[:1], strict=True):
        assert torch.equal(one[:18], other[:18]) and torch.equal(one[318:], other[318:])
        assert other[18:318].isnan().all()
    for one, other in zip(before[1:], after[1:], strict=True):  # sums of gradients may come in another order
        torch.testing.assert_close(one[:18], other[:18], rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(one[318:], other[318:], rtol=2**-7, atol=1e-3)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="found 383 tokens in all, expected 382"):
        Packed([*LENGTHS, 1])(0, *heads(8, 64), None)
