"""Causal attention over packed examples: no token sees another example's.

A packed batch holds several examples one after the other, without padding. Here each example is attended by itself, in
one call of ``scaled_dot_product_attention``, so isolation does not depend on a mask that a kernel might ignore, and on a
CPU no work is spent on pairs of tokens that do not belong together. Rejected: one call with a block-diagonal mask
(quadratic in the packed length) and padding (the same, and wasted GEMMs).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lamina.ops.shapes import Float


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
    length = query.shape[0]
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))  # [1, heads, T, h]
    if window is None or length <= window:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        ago = torch.arange(length, device=query.device)
        ago = ago[:, None] - ago[None, :]
        out = scaled_dot_product_attention(q, k, v, attn_mask=(ago >= 0) & (ago < window), enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
