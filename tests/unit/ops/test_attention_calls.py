"""FlashAttention's call, without a GPU: torch's ops on tensors that have a shape and no memory."""

import pytest
import torch

from lamina.ops.attention import _Flash


@pytest.mark.parametrize("window", [None, 4])
def test_torch_takes_the_call_and_gives_gradients_of_the_inputs_shapes(window: int | None) -> None:
    query, *others = (
        torch.empty(10, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (8, 2, 2)
    )
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    out = _Flash.apply(query, *others, starts, 6, window)
    assert out.shape == query.shape
    out.sum().backward()
    for x in (query, *others):
        assert x.grad.shape == x.shape and x.grad.dtype == x.dtype
