"""A model run from its files, one layer in memory at a time: the same logits as of the whole model, in the memory of a layer.

All batches go through a layer before the next is read, so each weight is read once, however many batches there are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.data.pack import Batch
from lamina.model.checkpoint import Stored
from lamina.model.decoder import Decoder, angles
from lamina.ops.attention import Packed

Fill = Callable[[str, Tensor], None]
"""Writes the weight of a name into place."""


def weights_of(stored: Mapping[str, Stored], adapter: Mapping[str, Tensor]) -> Fill:
    """Fills from a checkpoint, and A and B of an adapted linear from ``adapter``."""

    def fill(name: str, out: Tensor) -> None:
        if name in adapter:
            out.copy_(adapter[name])
        else:
            stored[name.replace(".base.", ".")].read_into(out)  # what an adapted linear holds as its base

    return fill


@torch.no_grad()
def streamed_logits(
    outline: Decoder, fill: Fill, batches: Sequence[Batch], rows: Sequence[Tensor], device: torch.device
) -> list[Tensor]:
    """Computes logits [S, V] of some rows of each batch, fp32 on the CPU.

    Args:
        outline: the model, perhaps adapted, on the ``meta`` device; it is there again afterwards.
        rows: indices [S] into the tokens of each batch.
    """
    trunk, a = outline.model, outline.architecture
    loaded = _Loader(fill, device)
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

    def __init__(self, fill: Fill, device: torch.device) -> None:
        self.fill, self.device = fill, device

    @contextmanager
    def __call__(self, module: nn.Module, name: str) -> Iterator[None]:
        module.to_empty(device=self.device)
        try:
            for key, parameter in module.named_parameters():
                self.fill(f"{name}.{key}", parameter.data)
            yield
        finally:
            module.to_empty(device="meta")
