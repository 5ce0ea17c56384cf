"""Causal attention over packed examples: no token sees another example's.

A packed batch holds several examples one after the other, without padding. Here each example is attended by itself, in
one call of ``scaled_dot_product_attention``, so isolation does not depend on a mask that a kernel might ignore, and on a
CPU no work is spent on pairs of tokens that do not belong together. Rejected: one call with a block-diagonal mask
(quadratic in the packed length) and padding (the same, and wasted GEMMs).

On a CPU in bf16 the backward pass of examples of fewer than 768 tokens is our own, made of GEMMs over blocks of queries.
SDPA's takes blocks of 64 or 32 queries there, computes all of its products in fp32, at half the rate of bf16, and adds up the
gradients in bf16. Ours computes in fp32 what a rounding would be multiplied in, the scores and the gradient of the
probabilities, and the other three products in bf16; its errors are smaller than SDPA's. The forward pass is SDPA's. Rejected: a
forward pass of our own (1.2 times SDPA's error, and not much faster), and more products in bf16 (1.3 to 3 times its error).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lamina.ops.shapes import Float

BLOCK = 64
"""Queries whose probabilities exist at one time in the backward pass; every block sees the keys up to its end."""

HELD = 2**19
"""Scores that exist at one time, if a block of one key head has no more: 5 MB in all, which a last-level cache holds."""

BLOCKED = range(16, 768)
"""Lengths for which the blocked backward pass is used: from 768 tokens on SDPA takes blocks of 256, and is as fast."""


class Packed:
    """Attends each of the examples that lie packed one after the other.

    Args:
        lengths: tokens of each example; their sum is the number of packed tokens N.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "N H h"],
        key: Float[Tensor, "N K h"],
        value: Float[Tensor, "N K h"],
        window: int | None,
    ) -> Float[Tensor, "N H h"]:
        """Softmax(q·kᵀ/√h)·v within each example, causal; with ``window``, over the last ``window`` tokens only."""
        parts = zip(*(tensor.split(self.lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([attend_causally(q, k, v, window) for q, k, v in parts])


def attend_causally(
    query: Float[Tensor, "T H h"], key: Float[Tensor, "T K h"], value: Float[Tensor, "T K h"], window: int | None = None
) -> Float[Tensor, "T H h"]:
    """Attends one example: token t to tokens max(0, t - window + 1) … t."""
    if in_blocks(query.shape[0], window, query.device.type, query.dtype):
        return attend_in_blocks(query, key, value)
    return attend_plainly(query, key, value, window)


def in_blocks(length: int, window: int | None, device: str, dtype: torch.dtype) -> bool:
    """Whether an example is attended by ``attend_in_blocks``."""
    return device == "cpu" and dtype == torch.bfloat16 and length in BLOCKED and (window is None or length <= window)


def attend_plainly(
    query: Float[Tensor, "T H h"], key: Float[Tensor, "T K h"], value: Float[Tensor, "T K h"], window: int | None = None
) -> Float[Tensor, "T H h"]:
    """Computes ``attend_causally`` by SDPA, forward and backward: on every device, in every precision."""
    length = query.shape[0]
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))  # [1, heads, T, h]
    if window is None or length <= window:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        ago = torch.arange(length, device=query.device)
        ago = ago[:, None] - ago[None, :]
        out = scaled_dot_product_attention(q, k, v, attn_mask=(ago >= 0) & (ago < window), enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def attend_in_blocks(
    query: Float[Tensor, "T H h"], key: Float[Tensor, "T K h"], value: Float[Tensor, "T K h"]
) -> Float[Tensor, "T H h"]:
    """Computes ``attend_plainly`` without a window: the same bits, and a backward pass from GEMMs.

    Keeps q, k and v; SDPA keeps the output and a logsumexp per head and token too.
    """
    return _InBlocks.apply(query, key, value)  # type: ignore[no-untyped-call, no-any-return]


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return attend_plainly(query, key, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
        for q, k, v, g, *places in _groups(key.shape[1], query, key, value, grad, *gradients):
            parts = _gradients(q.contiguous(), k.squeeze(1).contiguous(), v.squeeze(1).contiguous(), g.contiguous())
            for place, part in zip(places, parts, strict=True):
                place.copy_(part.view(place.shape))
        return gradients


def _groups(key_heads: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views [k, G, T, h] of a few key heads and of the G query heads that read each; G = 1 for keys and values."""
    length, heads = tensors[0].shape[:2]
    few = max(1, HELD // (heads // key_heads * min(BLOCK, length) * length))
    return zip(*(x.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3).split(few) for x in tensors), strict=True)


def _gradients(
    query: Float[Tensor, "k G T h"],
    key: Float[Tensor, "k T h"],
    value: Float[Tensor, "k T h"],
    grad: Float[Tensor, "k G T h"],
) -> tuple[Float[Tensor, "k G T h"], Float[Tensor, "k T h"], Float[Tensor, "k T h"]]:
    """The gradients of query, key and value of a few heads, block by block of the queries, the last one first."""
    wide = torch.promote_types(query.dtype, torch.float32)
    length, width = key.shape[1:]
    scale = width**-0.5
    wide_key, wide_value = (x.to(wide).transpose(1, 2) for x in (key, value))
    query_grad, key_grad, value_grad = (torch.empty_like(x) for x in (query, key, value))
    later = wide_key.new_full((min(BLOCK, length),) * 2, -torch.inf).triu_(1)
    size = query[..., 0].numel() // length * len(later) * length
    memory = [query.new_empty(size, dtype=dtype) for dtype in (wide, wide, query.dtype)]
    for start in reversed(range(0, length, BLOCK)):
        end = min(start + BLOCK, length)
        q, g = (x[:, :, start:end].flatten(1, 2) for x in (query, grad))
        shape = (*q.shape[:2], end)  # [k, G·block, end]
        beta = 0 if end == length else 1  # the first block here sees all keys: what it writes, the others add to
        probabilities, pulled, narrow = (x[: q[..., 0].numel() * end].view(shape) for x in memory)
        torch.bmm(q.to(wide) * scale, wide_key[:, :, :end], out=probabilities)  # the scores, as yet
        probabilities.unflatten(1, (-1, end - start))[..., start:].add_(later[: end - start, : end - start])
        torch.softmax(probabilities, -1, out=probabilities)
        value_grad[:, :end].baddbmm_(narrow.copy_(probabilities).transpose(1, 2), g, beta=beta)
        torch.bmm(
            g.to(wide) * scale, wide_value[:, :, :end], out=pulled
        )  # to p·(dp - Σ p·dp), the gradient of the scores
        torch.ops.aten._softmax_backward_data.out(pulled, probabilities, -1, wide, grad_input=pulled)
        key_grad[:, :end].baddbmm_(narrow.copy_(pulled).transpose(1, 2), q, beta=beta)
        query_grad[:, :, start:end] = (narrow @ key[:, :end]).view(*query.shape[:2], -1, width)
    return query_grad, key_grad, value_grad


def working_memory(length: int, heads: int, key_heads: int, width: int, itemsize: int) -> int:
    """Bytes that the blocked backward pass of one example needs beside what is kept and the gradients of all.

    Of a few heads: copies and gradients, and keys and values in fp32. Of a block of queries: scores twice in fp32 and once
    narrow, and where several heads read one key, copies. Last, the rows in fp32 twice, or a gradient that is added to.
    """
    group, block, wide = heads // key_heads, min(BLOCK, length), 4
    few = min(key_heads, max(1, HELD // (group * block * length)))
    queries, keys, rows = few * group * length * width, few * length * width, few * group * block
    whole = queries * 3 * itemsize + keys * (2 * wide + 4 * itemsize)
    held = rows * (length * (2 * wide + itemsize) + width * 2 * itemsize * (group > 1))
    return whole + held + max(rows * width * 2 * wide, keys * itemsize)
