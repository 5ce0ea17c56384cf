"""What a layer keeps for its backward pass, tensor by tensor, from shapes alone.

The functions mirror the operations of ``model/decoder.py`` and ``ops``, one each; where an operation comes to keep something
else, it is said here once, and the tests of the plan, which compare with torch's own record of its allocations, fail until it
is. A tensor that several operations keep counts once. Below the lowest adapter nothing needs a gradient, and nothing is kept.

Letters as everywhere: ``N`` packed tokens, ``D`` width, ``F`` MLP width, ``V`` vocabulary, ``R`` rank. Results are bytes.
"""

import torch

from lamina import native
from lamina.ops.attention import by_kernel, working_memory
from lamina.ops.loss import CHUNK, WIDE_CHUNK, slice_rows
from lamina.ops.norm import CHUNK as NORM_CHUNK
from lamina.ops.swiglu import CHUNK as GATE_CHUNK
from lamina.training.setup import FLOAT, INDEX, Portion, Setup, shapes

QKV, GATE_UP = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]
"""Linears that read the same input."""


class Layer:
    """One layer of a run.

    Args:
        entering: whether its input needs a gradient, that is, whether an adapter lies below.

    Attributes:
        n, after: tokens, and those of them for which what follows attention is computed: in the last layer, the supervised ones.
        leaving: whether its output needs a gradient; where it does not, nothing is kept.
        mixed: whether attention's queries, keys or values have a gradient.
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
        self.attention = self._attention(sum(length * length for length in masked))
        if self.mixed and setup.device == "cpu" and not kernel:
            self.mixing = self._mixing_plainly(portion.lengths)
        else:
            self.mixing = self._mixing(portion.lengths, kernel) if self.mixed else 0
        # The kernel's memory, or a mask: distances as indices, and a bool of each.
        mask, kv_heads = max(masked, default=0) ** 2 * (INDEX + 1), setup.architecture.kv_heads
        forward = working_memory(portion.lengths, kv_heads, width, "attention") if kernel else mask
        self.mixing_forward = forward if self.mixed else self._passing(forward)
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
        self.mixed = any(needs)
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
        flash = self.setup.device == "cuda" and e < FLOAT and a.head_width % 8 == 0  # see attention.by_flash
        if flash and self.output and any(needs) and self.after == n:
            self.output -= n * a.heads * a.head_width * e  # of the two that keep this tensor it is counted above
        return kept + self.output

    def _passing(self, mixing: int) -> int:
        """What attention needs that keeps nothing, beside what o_proj keeps: its input, q, k and v, and their mix while it is made
        (``mixing``) or projected; where fewer rows go on, of the residual stream and of the mix they are copied."""
        (query, width), (key, _) = self.shapes["self_attn.q_proj"], self.shapes["self_attn.k_proj"]
        fewer, adapted = self.after < self.n, "self_attn.o_proj" in self.ranks
        making = self.plainly * query * self.e + mixing - self.output
        # Beside o_proj's output: in fp32 the terms of the sum that it is, in bf16 its operands as one.
        parts = adapted * (2 if self.e == FLOAT else 1)
        projecting = self.after * (query * (fewer - adapted) + width * (1 + parts)) * self.e
        both = self.n * (width + 2 * query + 2 * key) + self.after * width * fewer
        return both * self.e + max(making, projecting)

    def _mixing(self, lengths: tuple[int, ...], kernel: bool) -> int:
        """Gradients of the output of attention and of q, k and v, and what the kernel needs for the longest example; FlashAttention sums
        the gradient of q in fp32, in blocks of 128, and gives every query head key gradients of its own."""
        a = self.setup.architecture
        gradients = self.n * (2 * a.heads + 2 * a.kv_heads) * a.head_width * self.e
        if not kernel:
            expanded = 2 * self.n * a.heads * a.head_width * self.e * (a.kv_heads < a.heads)
            return gradients + expanded + (self.n + 128 * len(lengths)) * a.heads * (a.head_width + 1) * FLOAT
        return gradients + working_memory(lengths, a.kv_heads, a.head_width)

    def _mixing_plainly(self, lengths: tuple[int, ...]) -> int:
        """The same of torch's SDPA on a CPU, example by example, the last one first: each gives its gradients and frees its output. Each
        thread computes scores and their gradients in blocks of q and of k (torch's aten/src/ATen/native/cpu/FlashAttentionKernel.cpp)."""
        a = self.setup.architecture
        mixed = a.heads * a.head_width * self.e
        gradients = [heads * a.head_width * self.e for heads in (a.heads, a.kv_heads, a.kv_heads)]
        wanted = sum(size for size, name in zip(gradients, QKV, strict=True) if self.entering or name in self.ranks)
        freed = mixed + a.heads * FLOAT
        done = most = 0
        for length in reversed(lengths):
            block = (256 if length >= 768 else 64 if length >= 192 else 32) * min(length, 512)
            scores = torch.get_num_threads() * 2 * block * (FLOAT + self.e * (self.e < FLOAT))
            most = max(most, self.n * mixed + length * sum(gradients) + done * (wanted - freed) + scores)
            done += length
        return most

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
    """The supervised rows, the gradient and the loss of each, and which and what they are."""
    return 2 * supervised * setup.architecture.width * setup.itemsize + supervised * (2 * INDEX + FLOAT)
