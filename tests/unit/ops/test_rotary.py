"""Rotary positions: the bits of transformers, and a backward that turns back."""

import pytest
import torch
from torch import Tensor

from lamina import native
from lamina.model.architecture import Rope
from lamina.model.decoder import angles
from lamina.ops.rotary import rotate


def case(dtype: torch.dtype, tokens: int = 9, heads: int = 3, width: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    cos, sin = angles(Rope(10000.0), width, torch.arange(tokens) * 7, torch.float32)
    return torch.randn(tokens, heads, width, dtype=dtype), cos.to(dtype), sin.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, cos, sin = case(dtype)
    wide_cos, wide_sin = (torch.cat([half, half], dim=-1)[None] for half in (cos, sin))
    reference = x.clone().requires_grad_()
    expected, _ = apply_rotary_pos_emb(reference.transpose(0, 1)[None], x.transpose(0, 1)[None], wide_cos, wide_sin)
    expected = expected[0].transpose(0, 1)
    x.requires_grad_()
    out = rotate(x, cos, sin)
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    # the same two products and one sum per number; autograd may add them in the other order, which rounds alike
    assert torch.equal(x.grad, reference.grad)


def test_gradient_by_finite_differences() -> None:
    x, cos, sin = case(torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x.requires_grad_())


def test_lengths_are_kept_and_position_zero_stays() -> None:
    x, cos, sin = case(torch.float64)
    out = rotate(x, cos, sin)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[0], x[0])


def test_a_projection_in_its_own_layout_is_turned_too() -> None:
    """The q projection arrives as a view [N, H, h] of a larger tensor."""
    x, cos, sin = case(torch.float32)
    view = torch.cat([x, x], dim=1)[:, :3]
    assert not view.is_contiguous()
    assert torch.equal(rotate(view, cos, sin), rotate(x, cos, sin))


@pytest.mark.parametrize("width", [32, 64, 128])
def test_bf16_error_is_at_most_that_of_one_by_one_roundings(width: int) -> None:
    """Forward and back, where there is a kernel; cosines and inputs in another order of memory, and an expanded gradient."""
    x, cos, sin = case(torch.bfloat16, width=width)
    upstream = torch.randn(9, 3, width).bfloat16()
    found = {}
    for name, dtype, kernel in (
        ("truth", torch.float64, False),
        ("ours", torch.bfloat16, True),
        ("plain", torch.bfloat16, False),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if not kernel:
                patch.setattr(native, "takes", lambda *_: False)
            leaf = x.to(dtype).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
            out = rotate(leaf, cos.to(dtype).t().contiguous().t(), sin.to(dtype))
            out.backward(upstream.to(dtype).transpose(0, 1).contiguous().transpose(0, 1))
            found[name] = out.detach().double(), leaf.grad.double()
    for ours, plain, truth in zip(found["ours"], found["plain"], found["truth"], strict=True):
        assert (ours - truth).norm() <= 1.2 * (plain - truth).norm()
        assert (ours - truth).norm() <= 2**-8 * truth.norm()
