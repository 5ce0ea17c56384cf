"""Causal attention over packed examples: no token sees another example's.

A packed batch holds several examples one after the other, without padding. Here each example is attended by itself, in
one call of ``scaled_dot_product_attention``, so isolation does not depend on a mask that a kernel might ignore, and on a
CPU no work is spent on pairs of tokens that do not belong together. Rejected: one call with a block-diagonal mask
(quadratic in the packed length) and padding (the same, and wasted GEMMs).

In half precision on CUDA one call of FlashAttention-2 (Dao 2023, arXiv:2307.08691) attends all examples, whose beginnings it is told.

In bf16 on a CPU all examples go to one kernel of our own, forward and backward, where there is one (``native``): at 512 tokens and two
cores it is three times as fast as SDPA's, it keeps q, k, v and two numbers of each softmax, and its errors are no larger.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from lamina import native
from lamina.ops.shapes import Float


class Packed:
    """Attends each of the examples that lie packed one after the other.

    Args:
        lengths: tokens of each example; their sum is the number of packed tokens N.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._starts: Tensor | None = None  # on the device, for all layers

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "N H h"],
        key: Float[Tensor, "N K h"],
        value: Float[Tensor, "N K h"],
        window: int | None,
    ) -> Float[Tensor, "N H h"]:
        """Softmax(q·kᵀ/√h)·v within each example, causal; with ``window``, over the last ``window`` tokens only."""
        if not by_flash(query):
            return attend_causally(query, key, value, self.lengths, window)
        if sum(self.lengths) != len(key):
            raise ValueError(f"lengths: found {sum(self.lengths)} tokens in all, expected {len(key)}")
        if self._starts is None:
            self._starts = (
                torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32).to(query.device, non_blocking=True)
            )
        return _Flash.apply(query, key, value, self._starts, max(self.lengths), window)  # type: ignore[no-untyped-call, no-any-return]


def attend_causally(
    query: Float[Tensor, "N H h"],
    key: Float[Tensor, "N K h"],
    value: Float[Tensor, "N K h"],
    lengths: Sequence[int],
    window: int | None = None,
) -> Float[Tensor, "N H h"]:
    """Attends the examples of so many tokens each: token t of one to its tokens max(0, t - window + 1) … t."""
    if native.takes(query, key, value) and by_kernel(query.shape[2], lengths, window):
        return _Kernel.apply(query, key, value, lengths)  # type: ignore[no-untyped-call, no-any-return]
    parts = zip(*(tensor.split(list(lengths)) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend_plainly(q, k, v, window) for q, k, v in parts])


def by_flash(query: Float[Tensor, "N H h"]) -> bool:
    """Whether FlashAttention-2 attends heads like these: in half precision on NVIDIA's devices from Ampere on."""
    width, half = query.shape[2], query.dtype in (torch.bfloat16, torch.float16)
    if not (query.is_cuda and half and width % 8 == 0 and width <= 256 and torch.version.cuda):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def by_kernel(width: int, lengths: Sequence[int], window: int | None) -> bool:
    """Whether the kernel computes with heads of this width, and sees no token beyond the window."""
    return width % native.LANES == 0 and width <= 256 and (window is None or max(lengths) <= window)


def attend_plainly(
    query: Float[Tensor, "T H h"], key: Float[Tensor, "T K h"], value: Float[Tensor, "T K h"], window: int | None = None
) -> Float[Tensor, "T H h"]:
    """Computes ``attend_causally`` for one example by SDPA: on every device, in every precision."""
    length = query.shape[0]
    if query.is_cuda and key.shape[1] < query.shape[1]:  # where SDPA would keep all scores of grouped heads
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))  # [1, heads, T, h]
    if window is None or length <= window:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        ago = torch.arange(length, device=query.device)
        ago = ago[:, None] - ago[None, :]
        out = scaled_dot_product_attention(q, k, v, attn_mask=(ago >= 0) & (ago < window), enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


class _Flash(torch.autograd.Function):
    """torch's own ops, which ``torch.nn.attention.varlen`` wraps in another way in every release."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, window: int | None
    ) -> Tensor:
        ctx.sizes = (starts, starts, longest, longest, 0.0, True)  # no dropout, causal
        ctx.sides = {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
        out, normaliser, *state, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *ctx.sizes, return_debug_mask=False, **ctx.sides
        )
        ctx.save_for_backward(query, key, value, out, normaliser, *state)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, state, unused = ctx.saved_tensors
        gradients = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), *kept, *ctx.sizes, state, unused, **ctx.sides
        )
        return (*gradients, None, None, None)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))
        out, kept = torch.empty_like(query), query.new_empty((*query.shape[:2], 2), dtype=torch.float32)
        _call("attention", lengths, key, query, key, value, out, kept)
        ctx.save_for_backward(query, key, value, kept)
        ctx.lengths = lengths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, kept = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        _call("attention_back", ctx.lengths, key, query, key, value, kept, grad.contiguous(), *gradients)
        return (*gradients, None)


def _call(name: str, lengths: Sequence[int], key: Tensor, *tensors: Tensor) -> None:
    """Calls a kernel over all examples; its working memory is a tensor, so that it is seen and refused as tensors are."""
    starts = torch.tensor([0, *lengths], device="cpu").cumsum(0)
    if starts[-1] != len(key):
        raise ValueError(f"lengths: found {starts[-1]} tokens in all, expected {len(key)}")
    size = working_memory(lengths, key.shape[1], key.shape[2], name)
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    sizes = (len(lengths), tensors[0].shape[1], *key.shape[1:])
    native.call(name, *tensors, starts, *sizes, memory, threads=_threads(lengths, key.shape[1]))


def _threads(lengths: Sequence[int], key_heads: int) -> int:
    """A thread takes one key head of one example at a time."""
    return min(torch.get_num_threads(), len(lengths) * key_heads)


def working_memory(lengths: Sequence[int], key_heads: int, width: int, name: str = "attention_back") -> int:
    """Bytes that a kernel needs beside its operands: each thread keeps one key head of one example, and a few queries' scores."""
    return _threads(lengths, key_heads) * 4 * native.ask(f"{name}_memory", max(lengths), width)
