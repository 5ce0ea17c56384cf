"""Attention of new tokens over the keys and values of all that came before them.

The sequences of a batch are right-aligned: each starts at its own slot and all write their next key into the same one.
So a step is one copy and one call of ``scaled_dot_product_attention`` however different the lengths are, a sliding
window is a slice, and only the slots before a sequence's start need a mask. In bf16 on a CPU a kernel of our own reads each key and
value where it lies, where there is one (``native``); SDPA takes several times as long for sixteen sequences. Rejected:
left-aligned sequences (an indexed write, and a mask that differs for each length and window) and one call per sequence.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lamina import native
from lamina.ops.attention import attend_causally
from lamina.ops.shapes import Float

WIDEST = 256
"""The widest head of the kernel."""


class Cache:
    """The keys and values of a batch of sequences; called by the decoder, attends one new token of each of them.

    Args:
        lengths: tokens of each sequence's prompt.
        room: how many tokens may follow.
        layers, kv_heads, head_width, dtype, device: of the model.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        room: int,
        *,
        layers: int,
        kv_heads: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.used = max(lengths)
        self.starts = [self.used - length for length in lengths]
        shape = (layers, 2, len(lengths), kv_heads, self.used + room, head_width)
        # Zeros: a masked slot has weight 0, and 0 · NaN of unwritten memory would be NaN.
        self._store = torch.zeros(shape, dtype=dtype, device=device)
        starts = torch.tensor(self.starts, device=device)[:, None]
        before = torch.arange(shape[4], device=device) < starts  # [B, T]
        self._mask = torch.zeros(before.shape, dtype=dtype, device=device).masked_fill_(before, -torch.inf)
        self._view(len(lengths))

    def _view(self, rows: int) -> None:
        """Restricts the views of the memory to its first ``rows`` sequences, those still growing."""
        self._keys = [layer[0, :rows] for layer in self._store]  # each [B, K, T, h]
        self._values = [layer[1, :rows] for layer in self._store]
        self._bias = self._mask[:rows, None, None] if any(self.starts) else None  # [B, 1, 1, T]
        self._own_starts = torch.tensor(self.starts[:rows], device="cpu")  # for the kernel

    def prefill(self, rows: range) -> Callable[[int, Tensor, Tensor, Tensor, int | None], Tensor]:
        """Returns the attention of the packed prompts of ``rows``, which also stores their keys and values."""
        lengths = [self.used - self.starts[row] for row in rows]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
            for row, k, v in zip(rows, key.split(lengths), value.split(lengths), strict=True):
                self._keys[layer][row, :, self.starts[row] : self.used] = k.transpose(0, 1)
                self._values[layer][row, :, self.starts[row] : self.used] = v.transpose(0, 1)
            return attend_causally(query, key, value, lengths, window)

        return attend

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "B H h"],
        key: Float[Tensor, "B K h"],
        value: Float[Tensor, "B K h"],
        window: int | None,
    ) -> Float[Tensor, "B H h"]:
        """Attends the token in slot ``used`` of each sequence to itself and to those before it, at most ``window``."""
        keys, values, now = self._keys[layer], self._values[layer], self.used
        first = 0 if window is None else max(0, now + 1 - window)
        if key.shape[2] % native.LANES == 0 and key.shape[2] <= WIDEST and native.takes(query, key, value):
            return self._by_kernel(layer, query, key, value, first)
        keys[:, :, now] = key
        values[:, :, now] = value
        seen = slice(first, now + 1)
        bias = None if self._bias is None else self._bias[..., seen]
        # Query heads that share a key head stand side by side, so they pass as that head's query tokens.
        grouped = query.unflatten(1, (key.shape[1], -1))  # [B, K, H/K, h]
        out = scaled_dot_product_attention(grouped, keys[:, :, seen], values[:, :, seen], attn_mask=bias)
        return out.flatten(1, 2)

    def _by_kernel(self, layer: int, query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        keys, values, now = self._keys[layer], self._values[layer], self.used
        out = torch.empty_like(query)
        memory = torch.empty(torch.get_num_threads() * native.ask("cached_memory", now + 1), device="cpu")
        native.call(
            "cached_attention",
            query,
            key,
            value,
            ctypes.c_void_p(keys.data_ptr()),
            ctypes.c_void_p(values.data_ptr()),
            self._own_starts,
            out,
            len(query),
            query.shape[1],
            *key.shape[1:],
            *keys.stride()[:2],
            first,
            now,
            memory,
        )
        return out

    def advance(self) -> None:
        """Moves on to the next slot, once the token of the present one has passed all layers."""
        self.used += 1

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drops all sequences but ``rows`` and returns which old row now stands in each place.

        Sequences from the end move into the gaps, so that dropping one copies at most one.
        """
        kept, count = set(rows), len(rows)
        movers = iter(row for row in sorted(kept) if row >= count)
        order = [row if row in kept else next(movers) for row in range(count)]
        for place, row in enumerate(order):
            if place != row:
                self._store[:, :, place, :, : self.used] = self._store[:, :, row, :, : self.used]
                self._mask[place] = self._mask[row]
        self.starts = [self.starts[row] for row in order]
        self._view(count)
        return order
