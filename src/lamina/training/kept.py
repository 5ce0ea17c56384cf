"""What a layer keeps for its backward pass, tensor by tensor, from shapes alone.

The functions mirror the operations of ``model/decoder.py`` and ``ops``, one each; where an operation comes to keep something
else, it is said here once, and the tests of the plan, which compare with torch's own record of its allocations, fail until it
is. A tensor that several operations keep counts once. Below the lowest adapter nothing needs a gradient, and nothing is kept.

Letters as everywhere: ``N`` packed tokens, ``D`` width, ``F`` MLP width, ``V`` vocabulary, ``R`` rank. Results are bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lamina import cuda, native
from lamina.model.architecture import Architecture
from lamina.model.quantised import Base
from lamina.ops import products
from lamina.ops.attention import by_kernel, working_memory
from lamina.ops.loss import CHUNK, WIDE_CHUNK, slice_rows
from lamina.ops.norm import CHUNK as NORM_CHUNK
from lamina.ops.swiglu import CHUNK as GATE_CHUNK
from lamina.training.optimizer import Kind

SCRATCHPAD = 145_000
"""Bytes that oneDNN allocates for each thread while it computes a product in bf16 on a CPU: 140 to 200 kB, hardly depending on the
product's size."""

QKV, GATE_UP = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]
"""Linears that read the same input."""

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


class Layer:
    """One layer of a run.

    Args:
        entering: whether its input needs a gradient, that is, whether an adapter lies below.

    Attributes:
        n, after: tokens, and those of them for which what follows attention is computed: in the last layer, the supervised ones.
        leaving: whether its output needs a gradient; where it does not, nothing is kept.
        attention, norm, mlp: what its first half keeps, the norm after it, and the rest.
        forward, backward: what the MLP needs beside in either direction, at most.
        mixing_forward: what attention needs beside what is kept: the kernel, or making the masks of examples longer than the window.
        output: what of the first half o_proj keeps, which is gone when attention's backward pass comes.
        mixing: what that pass needs beside what is kept.
        qk_norms: what is kept when the gradients of the norms of queries and keys are computed, and what they need beside.
        down_trainable, mlp_trainable, trainable: numbers of A and B, in down_proj, in the MLP and in all.
    """

    def __init__(self, setup: Setup, portion: Portion, index: int, entering: bool) -> None:
        self.setup, self.n, self.e = setup, portion.tokens, setup.itemsize
        self.after = portion.supervised if index + 1 == setup.architecture.layers else self.n
        self.shapes = shapes(setup.architecture)
        paths = {name: f"model.layers.{index}.{name}" for name in self.shapes}
        self.ranks = {name: setup.ranks[path] for name, path in paths.items() if path in setup.ranks}
        self.entering = entering
        self.middle = entering or any(name.startswith("self_attn") for name in self.ranks)
        self.leaving = self.middle or bool(self.ranks)
        self.qk_norms = 0, 0
        window = setup.architecture.windows[index]
        masked = [length for length in portion.lengths if window is not None and length > window]
        width = setup.architecture.head_width
        kernel = setup.device == "cpu" and setup.by_kernels(width) and by_kernel(width, portion.lengths, window)
        self.plainly = self.n * (not kernel)  # tokens that SDPA or FlashAttention attends
        self.mixing = (
            self._mixing(portion.lengths, kernel) if self.leaving and (kernel or setup.device == "cuda") else 0
        )
        self.attention = self._attention(sum(length * length for length in masked))
        # The kernel's memory, or a mask: distances as indices, and a bool of each.
        mask = max(masked, default=0) ** 2 * (INDEX + 1)
        self.mixing_forward = (
            working_memory(portion.lengths, setup.architecture.kv_heads, width, "attention") if kernel else mask
        )
        self.norm = norm_kept(setup, self.after, setup.architecture.width) if self.middle else 0
        self.mlp, self.forward, self.backward = self._mlp()
        self.trainable = sum(self._trainable(name) for name in self.ranks)
        self.mlp_trainable = sum(self._trainable(name) for name in self.ranks if name.startswith("mlp"))
        self.down_trainable = sum(self._trainable(name) for name in self.ranks if name == "mlp.down_proj")

    @property
    def kept(self) -> int:
        """All that the layer keeps."""
        return self.attention + self.norm + self.mlp

    def siblings(self, names: list[str], tokens: int, needs: bool) -> tuple[int, int]:
        """When projections of the same input of so many tokens go back, as one op: what they keep, and what they need beside, which is
        the gradients of their outputs, of x·Aᵀ and of the input; zeros, where none of them has a gradient."""
        ranks = {name: self.ranks[name] for name in names if name in self.ranks}
        if not (ranks or needs):
            return 0, 0
        width, inner = self.shapes[names[0]][1], sum(ranks.values())
        outputs = sum(self.shapes[name][0] for name in names)
        # Gradients of A first, each by itself with dropout and in fp32, of what is read through dropout; and of B.
        rows = list(ranks.values()) if self.setup.dropout or self.e == FLOAT else [inner] * bool(ranks)
        stream, dropping = tokens * width * self.e, bool(ranks) * self._dropping(tokens * width)
        of_a = [self.setup.product(rank, width, tokens, turned=True) for rank in rows]
        of_b = [self.setup.product(self.shapes[name][0], rank, tokens, turned=True) for name, rank in ranks.items()]
        beside = max([stream * min(dropping, 1) + max(of_a, default=0), *of_b])
        if needs:
            # Then that of x: one stored weight's is added to the others', and an adapter's that goes through dropout to them all.
            product = self.setup.product(tokens, width, outputs + inner * (not dropping))
            beside = max(beside, stream * (1 + (self.setup.base is not None)) + product, stream * (1 + dropping))
        return self._read(names, tokens), tokens * (outputs + inner) * self.e + beside

    def _dropping(self, numbers: int) -> int:
        """How many tensors of these numbers there are while a gradient goes back through dropout: it, and what torch makes of it."""
        return self.setup.dropout * (1 if self.setup.by_kernels(numbers) and self.setup.device == "cpu" else 2)

    def products(self) -> tuple[int, int]:
        """What any product of the MLP takes for its own use, forward and backward."""
        forward, backward = [0], [0]
        for name, (outputs, inputs) in self.shapes.items():
            if name.startswith("mlp"):
                rank, tokens = self.ranks.get(name, 0), self.after
                forward.append(self.setup.product(tokens, outputs, inputs + rank, along=rank > 0))
                backward.append(self.setup.product(tokens, inputs, outputs + rank))
                if rank:
                    backward.append(self.setup.product(outputs, rank, tokens, turned=True))
                    backward.append(self.setup.product(rank, inputs, tokens, turned=True))
        return max(forward), max(backward)

    def _attention(self, masked: int) -> int:
        a, n, e = self.setup.architecture, self.n, self.e
        needs = [self.entering or name in self.ranks for name in QKV]
        kept = norm_kept(self.setup, n, a.width) if self.entering else 0
        kept += self._read(QKV, n)
        if a.qk_norm:
            query, key = n * a.heads * needs[0], n * a.kv_heads * needs[1]
            of_key = norm_kept(self.setup, key, a.head_width)
            kept += norm_kept(self.setup, query, a.head_width) + of_key
            # That of the keys comes first, while the gradient of the queries waits, then theirs; that of the values waits for both.
            first = norm_working(self.setup, key, a.head_width) + query * a.head_width * e
            then = norm_working(self.setup, query, a.head_width) + key * a.head_width * e - of_key
            self.qk_norms = kept, max(first, then) + n * a.kv_heads * a.head_width * e
        if any(needs):
            kept += n * (a.heads + 2 * a.kv_heads) * a.head_width * e  # q and k as they were rotated, v
            kept += self.plainly * a.heads * (a.head_width * e + FLOAT)  # SDPA's output, log Σ exp of each row
            kept += (n - self.plainly) * a.heads * 2 * FLOAT  # the kernel's highest score and 1/Σ of each row
            if self.setup.device == "cuda" and e == FLOAT and a.kv_heads < a.heads:
                kept += 2 * n * (a.heads - a.kv_heads) * a.head_width * e  # k and v are repeated for every head
            kept += masked * e
        self.output = self._read(["self_attn.o_proj"], self.after)
        return kept + self.output

    def _mixing(self, lengths: tuple[int, ...], kernel: bool) -> int:
        """Gradients of the output of attention and of q, k and v, and what the kernel needs for the longest example; FlashAttention sums
        the gradient of q in fp32, in blocks of 128, and gives every query head key gradients of its own."""
        a = self.setup.architecture
        gradients = self.n * (2 * a.heads + 2 * a.kv_heads) * a.head_width * self.e
        if not kernel:
            expanded = 2 * self.n * a.heads * a.head_width * self.e * (a.kv_heads < a.heads)
            return gradients + expanded + (self.n + 128 * len(lengths)) * a.heads * (a.head_width + 1) * FLOAT
        return gradients + working_memory(lengths, a.kv_heads, a.head_width)

    def _mlp(self) -> tuple[int, int, int]:
        numbers = self.after * self.setup.architecture.mlp_width
        stream, inner = self.after * self.setup.architecture.width * self.e, numbers * self.e
        gate, up = (self.middle or f"mlp.{name}_proj" in self.ranks for name in ("gate", "up"))
        product, down = gate or up, "mlp.down_proj" in self.ranks
        kept = inner * 2 * product + self._read(GATE_UP, self.after)
        kept += self._read(["mlp.down_proj"], self.after)
        # Forward: both factors and the product, then the product and the output; beside them the residual stream, which the
        # norm keeps where it keeps anything, and the MLP's input.
        entry = stream * (not set(GATE_UP) & self.ranks.keys())
        unkept = inner * (not down)
        dropping = inner * down * self.setup.dropout  # what down_proj's adapter reads
        forward = stream * (not self.middle) + entry + unkept + max(inner * 2 * (not product), stream, dropping)
        # Backward: the gradients of the product and of both factors, what down_proj kept is gone; or, before it goes, with dropout
        # the product's gradient and that through the adapter.
        few = min(numbers, GATE_CHUNK.get(self.setup.device, numbers)) * self.e * (not self.setup.by_kernels(numbers))
        both = inner * (product * (not down) + gate + up) + few * product
        through = inner * down * (1 + self._dropping(numbers)) * self.setup.dropout * product
        return kept, forward, max(both, through)

    def _read(self, names: list[str], tokens: int) -> int:
        """What the adapted ones of some linears keep that read the same input of so many tokens: x once, x·Aᵀ, A and B as they are used."""
        ranks = {name: self.ranks[name] for name in names if name in self.ranks}
        if not ranks:
            return 0
        own = 0 if self.e == FLOAT else self.e  # in fp32 the masters themselves are used
        kept = sum(tokens * rank * self.e + self._trainable(name) * own for name, rank in ranks.items())
        x = tokens * self.shapes[names[0]][1]
        return kept + x * self.e

    def _trainable(self, name: str) -> int:
        return self.ranks[name] * sum(self.shapes[name])


def norm_kept(setup: Setup, rows: int, width: int) -> int:
    """A norm's input; torch's own kernel on CUDA keeps one number a row too."""
    own = setup.device == "cpu" or setup.by_kernels(width)
    return rows * (width * setup.itemsize + FLOAT * (not own))


def norm_working(setup: Setup, rows: int, width: int) -> int:
    """What the backward pass of a norm needs beside what is kept: both gradients, and three fp32 tensors of a few rows on a CPU
    where torch computes it."""
    few = min(rows * width, NORM_CHUNK) * 3 * FLOAT if setup.device == "cpu" and not setup.by_kernels(width) else 0
    return 2 * rows * width * setup.itemsize + few


def loss_slices(setup: Setup, supervised: int) -> int:
    """The logits of a slice of rows in the computation's dtype, and for torch a few of them in fp32 with their softmax."""
    few = min(supervised, CHUNK.get(setup.device, WIDE_CHUNK))
    wide = few * FLOAT * (1 if setup.itemsize == FLOAT else 2) * (not setup.by_kernels(native.LANES))
    return (min(supervised, slice_rows(setup.device)) * setup.itemsize + wide) * setup.architecture.vocabulary


def loss_rows(setup: Setup, supervised: int) -> int:
    """The supervised rows, copied, the gradient and the loss of each, and which and what they are."""
    return 2 * supervised * setup.architecture.width * setup.itemsize + supervised * (2 * INDEX + FLOAT)
