"""A model run from its files, one layer in memory at a time: the same logits as of the whole model, in the memory of a layer.

All batches go through a layer before the next is read, so each weight is read once, however many batches there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina import native
from lamina.data.pack import Batch
from lamina.model.checkpoint import Stored
from lamina.model.decoder import Decoder, angles
from lamina.model.weights import read_module
from lamina.ops.attention import Packed


@torch.no_grad()
def streamed_logits(
    outline: Decoder,
    stored: Mapping[str, Stored],
    adapter: Mapping[str, Tensor],
    batches: Sequence[Batch],
    rows: Sequence[Tensor],
    device: torch.device,
) -> list[Tensor]:
    """Computes logits [S, V] of some rows of each batch, fp32 on the CPU.

    Args:
        outline: the model, perhaps adapted, on the ``meta`` device; it is there again afterwards.
        stored: where its weights are.
        adapter: A and B of its adapted linears by their name in the model.
        rows: indices [S] into the tokens of each batch.
    """
    native.own_memory(device)
    trunk, a = outline.model, outline.architecture
    loaded = _Loader(stored, adapter, device)
    with loaded(trunk.embed_tokens, "model.embed_tokens"):
        states = [trunk.embed_tokens(batch.tokens.to(device)) for batch in batches]
    turns = [
        angles(a.rope, a.head_width, batch.position.to(device), x.dtype)
        for batch, x in zip(batches, states, strict=True)
    ]
    for number, layer in enumerate(trunk.layers):
        with loaded(layer, f"model.layers.{number}"):
            for index, batch in enumerate(batches):
                states[index] = layer(states[index], *turns[index], Packed(batch.lengths))
    with loaded(trunk.norm, "model.norm"):
        states = [trunk.norm(x) for x in states]
    head, name = (trunk.embed_tokens, "model.embed_tokens") if outline.lm_head is None else (outline.lm_head, "lm_head")
    with loaded(head, name):
        return [
            F.linear(x[chosen.to(device)], outline.vocabulary).float().cpu()
            for x, chosen in zip(states, rows, strict=True)
        ]


class _Loader:
    """Holds the weights of a module for the time of a block."""

    def __init__(self, stored: Mapping[str, Stored], adapter: Mapping[str, Tensor], device: torch.device) -> None:
        self.stored, self.adapter, self.device = stored, adapter, device

    @contextmanager
    def __call__(self, module: nn.Module, name: str) -> Iterator[None]:
        module.to_empty(device=self.device)
        try:
            read_module(module, f"{name}.", self.stored, self.adapter)
            yield
        finally:
            module.to_empty(device="meta")
