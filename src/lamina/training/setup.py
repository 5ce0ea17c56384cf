"""What of a run decides its memory: the model, the adapter, and the micro-batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lamina import cuda, native
from lamina.model.architecture import Architecture
from lamina.model.quantised import Base
from lamina.ops import products
from lamina.training.optimizer import Kind

SCRATCHPAD = 145_000
"""Bytes that oneDNN allocates for each thread while it computes a product in bf16 on a CPU: 140 to 200 kB, hardly depending on the
product's size."""

FLOAT, INDEX = 4, 8
"""Bytes of a number in fp32, in which masters, moments and reductions are kept, and of an index."""


@dataclass(frozen=True)
class Setup:
    """What of a run decides its memory, beside the data.

    Args:
        ranks: rank of each adapted linear by its path, as ``model.layers.0.self_attn.q_proj``.
        itemsize: bytes of a number in the computation, 2 for bf16 and 4 for fp32.
        base: the form of the frozen linears of the layers; None is the computation's dtype.
        double: whether the scales of 4-bit blocks are quantised too.
        dropout: whether the adapters' inputs are dropped at random.
        runtime: what the process takes beside tensors.
        ledger: whether A and B are copied around the optimiser's step, to see how far it moves them.
    """

    architecture: Architecture
    ranks: Mapping[str, int]
    itemsize: int = 2
    base: Base | None = None
    double: bool = True
    optimizer: Kind = "adamw"
    dropout: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    runtime: int = 0
    ledger: bool = False

    def product(self, rows: int, columns: int, terms: int, turned: bool = False, along: bool = False) -> int:
        """What a product of the computation's dtype takes for its own use while it lasts: of factors of which one is a transpose
        (``turned``), or which both lie along the sum (``along``)."""
        if self.device != "cpu" or self.itemsize == FLOAT:
            return 0
        if products.faster(rows, columns):
            return products.working_memory(rows, columns, terms + terms % 2, turned)
        if along and min(rows, columns) < products.FEW and products.few_here():
            return 0
        return SCRATCHPAD * torch.get_num_threads()

    def by_kernels(self, width: int) -> bool:
        """Whether rows of this width go to kernels of our own."""
        dtype = torch.float32 if self.itemsize == FLOAT else torch.bfloat16
        here = width % native.LANES == 0 and native.available(self.device, dtype)
        return here or cuda.available(self.device, dtype)


@dataclass(frozen=True)
class Portion:
    """A micro-batch, and how it is computed.

    Args:
        lengths: tokens of each of its examples; their sum is N.
        supervised: how many of the tokens have a target.
        checkpointed: layers, from the first, that keep only their input.
        accumulated: whether it follows another one in its step, so that the gradients of all layers are there already.
        offload: whether inputs of checkpointed layers are kept in the host's memory.
    """

    lengths: tuple[int, ...]
    supervised: int
    checkpointed: int = 0
    accumulated: bool = False
    offload: bool = False

    @property
    def tokens(self) -> int:
        """N."""
        return sum(self.lengths)


def shapes(a: Architecture) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linears of a layer, by the end of their path, in the order in which they are computed."""
    query, key = a.heads * a.head_width, a.kv_heads * a.head_width
    return {
        "self_attn.q_proj": (query, a.width),
        "self_attn.k_proj": (key, a.width),
        "self_attn.v_proj": (key, a.width),
        "self_attn.o_proj": (a.width, query),
        "mlp.gate_proj": (a.mlp_width, a.width),
        "mlp.up_proj": (a.mlp_width, a.width),
        "mlp.down_proj": (a.width, a.mlp_width),
    }
