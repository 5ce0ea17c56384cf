"""The memory of a training run, item by item, known before anything large is loaded.

The peak is the largest of a few moments of a step, and a moment is a sum of what is alive then, so every number of the plan
can be traced to a tensor (``kept.py``). Rejected: factors fitted to measurements, which are right only where they were
measured; and running the model on the ``meta`` device, which cannot see what is inside of a kernel and takes as long as a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from lamina.adapter import LoRA, choose
from lamina.model.architecture import Architecture
from lamina.model.decoder import Decoder
from lamina.model.quantised import form_bytes
from lamina.ops import fp8, int8
from lamina.ops.loss import slice_rows
from lamina.training.kept import GATE_UP, QKV, Layer, loss_rows, loss_slices, norm_kept, norm_working
from lamina.training.setup import FLOAT, INDEX, Portion, Setup, shapes

SMALL = 4096
SCALE = FLOAT / 256
"""Bytes of 8-bit AdamW's scale of 256 numbers of a moment, for each of them."""

PAGED = 100_000
"""Numbers of a matrix from which on a paged form keeps its moments in pages; bitsandbytes leaves smaller ones on the device."""


@dataclass(frozen=True)
class Moment:
    """A moment of a step, and the bytes of each item that is alive then; in the order of the table."""

    name: str
    weights: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int = 0
    loss_slices: int = 0
    buffers: int = 0
    runtime: int = 0

    @property
    def items(self) -> dict[str, int]:
        """Bytes by item."""
        return {name.replace("_", " "): number for name, number in vars(self).items() if name != "name"}

    @property
    def total(self) -> int:
        """All that is alive."""
        return sum(self.items.values())


@dataclass(frozen=True)
class Plan:
    """The moments of a run's heaviest step, of which the largest is the predicted peak."""

    moments: tuple[Moment, ...]
    peak: Moment = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak", max(self.moments, key=lambda moment: moment.total))

    @property
    def items(self) -> dict[str, int]:
        """Bytes of each item at the peak."""
        return self.peak.items

    @property
    def total(self) -> int:
        """The predicted peak in bytes."""
        return self.peak.total


LIBRARIES = {"cpu": 16_000_000, "cuda": 68_000_000}
"""Bytes that a run takes beside its tensors. On a CPU: most of it oneDNN's compiled products, of which ``process.py`` keeps few, then
code that runs for the first time and the heap's holes (benchmarks/memory.py). On CUDA, in torch's allocator: cuBLAS's workspaces,
32 MiB each on Hopper, one for the thread of the backward pass; not measured on hardware yet."""

WRITER = 45_000_000
"""Resident bytes of the library that writes the ledger, once it has written."""


def in_process(setup: Setup) -> Setup:
    """The setup with what a process takes beside its tensors: resident memory on a CPU, the allocator's on CUDA."""
    writer = WRITER if setup.device == "cpu" and setup.ledger else 0
    return replace(setup, runtime=LIBRARIES[setup.device] + writer)


def ranks_of(architecture: Architecture, lora: LoRA) -> dict[str, int]:
    """The rank of each linear that an adapter is laid on, by its path.

    Raises:
        ConfigError: as ``attach``.
    """
    with torch.device("meta"):
        model = Decoder(architecture)
    return {path: lora.rank_of(path) for path in choose(model, lora)}


def plan(setup: Setup, *portions: Portion) -> Plan:
    """Predicts the memory of a run whose heaviest micro-batches are ``portions``.

    A step computes its heaviest micro-batch first, before there are gradients, so two are enough: the heaviest of all, and the
    heaviest that follows another one.
    """
    return Plan(tuple(moment for portion in portions for moment in _moments(setup, portion)))


def weights(setup: Setup) -> int:
    """The frozen base: linears of the layers in their form, all else in the computation's dtype."""
    a, linears = setup.architecture, shapes(setup.architecture)
    heads = a.width * a.vocabulary * (1 if a.tied else 2)
    norms = a.width * (2 * a.layers + 1) + (2 * a.head_width * a.layers if a.qk_norm else 0)
    biased = {"q_proj": a.qkv_bias, "k_proj": a.qkv_bias, "v_proj": a.qkv_bias, "o_proj": a.output_bias}
    biases = sum(out for name, (out, _) in linears.items() if biased.get(name.split(".")[1], a.mlp_bias))
    frozen = a.layers * sum(_frozen(setup, *shape) for shape in linears.values())
    return frozen + (heads + norms + a.layers * biases) * setup.itemsize


def trainable(setup: Setup) -> int:
    """Numbers of all A and B."""
    return sum(_factors(setup))


def _factors(setup: Setup) -> Iterator[int]:
    """Numbers of each A and B."""
    linears = shapes(setup.architecture)
    for path, rank in setup.ranks.items():
        outputs, inputs = linears[".".join(path.split(".")[3:])]
        yield from (rank * inputs, rank * outputs)


def _moment_bytes(setup: Setup, size: int) -> float:
    """Bytes of a number of a moment; bitsandbytes keeps those of small tensors in fp32, and pages, not their scales, in memory
    that gives way to all else."""
    eight_bit = setup.optimizer.endswith("8bit") and size >= SMALL
    paged = setup.optimizer.startswith("paged") and size >= PAGED
    return SCALE * eight_bit + (0 if paged else 1 if eight_bit else FLOAT)


def _frozen(setup: Setup, outputs: int, inputs: int) -> int:
    """A frozen matrix in its form."""
    if setup.base is None:
        return outputs * inputs * setup.itemsize
    return form_bytes(setup.base, setup.double, outputs, inputs)


def _buffer(setup: Setup, tokens: int) -> int:
    """The buffer that all frozen matrices share: the largest of them as numbers, or in int8 what a product works in.

    Few rows of the last layer, which in int8 the kernels leave to torch, work in less than a dense matrix.
    """
    matrices = shapes(setup.architecture).values()
    dense = max(outputs * inputs for outputs, inputs in matrices) * setup.itemsize
    rows, dtype = min(tokens, int8.ROWS), torch.float32 if setup.itemsize == FLOAT else torch.bfloat16
    working = max(
        int8.working_memory(rows, one, other, int8.faster(tokens, other, setup.device, dtype))
        for matrix in matrices
        for one, other in (matrix, matrix[::-1])
    )
    return max(dense, working if setup.base == "int8" else 0) if setup.base else 0


def _product(setup: Setup, tokens: int, outputs: int, inputs: int) -> int:
    """What the product with a frozen matrix needs for itself: in FP8 the rows that are quantised, and where it is emulated on a
    CPU both operands and the product in fp32."""
    if setup.base == "int8" and setup.device == "cuda":
        return inputs * outputs  # the gradient of the input goes through the transpose
    if setup.base != "fp8":
        return 0
    emulated = FLOAT * (inputs * outputs + tokens * outputs) if setup.device == "cpu" else 0
    wide = 0 if setup.itemsize < FLOAT and fp8.by_kernel(setup.device, torch.bfloat16) else 2 * FLOAT
    return tokens * inputs * (wide + 1) + emulated


def _moments(setup: Setup, portion: Portion) -> Iterator[Moment]:
    a, n, e = setup.architecture, portion.tokens, setup.itemsize
    numbers = trainable(setup)
    optimiser = round(2 * sum(size * _moment_bytes(setup, size) for size in _factors(setup)))

    def alive(name: str, **made: int) -> Moment:
        always = {"weights": weights(setup), "adapters": numbers * FLOAT, "optimiser": optimiser}
        return Moment(name, **{"gradients": 0, **always, **made}, runtime=setup.runtime)

    gradients = numbers * FLOAT if portion.accumulated else 0
    copies = 2 * numbers * FLOAT * setup.ledger  # of A and B before the step, and stacked after it
    yield alive("optimiser step", gradients=numbers * FLOAT, buffers=_buffer(setup, n) + copies)

    layers: list[Layer] = []
    for index in range(a.layers):
        layers.append(Layer(setup, portion, index, bool(layers) and layers[-1].leaving))
    # What is kept below each layer, and below them all: cosine and sine of the positions, which go where nothing is turned back;
    # tokens, targets and positions.
    below = [n * a.head_width * e + 3 * n * INDEX]
    for index, layer in enumerate(layers):
        stream = 0 if portion.offload else n * a.width * e * layer.leaving
        kept = stream if index < portion.checkpointed else layer.kept
        below.append(below[-1] + kept)
    turned = n * a.head_width * e * (portion.checkpointed > 0 or any(layer.mixed for layer in layers))
    kept = below[-1] - below[0] + 3 * n * INDEX + turned + norm_kept(setup, portion.supervised, a.width)
    rows = loss_rows(setup, portion.supervised)
    slices = loss_slices(setup, portion.supervised)
    scores = [
        setup.product(min(portion.supervised, slice_rows(setup.device)), *sizes, along=along)
        for sizes, along in (((a.vocabulary, a.width), True), ((a.width, a.vocabulary), False))
    ]
    at_loss = _buffer(setup, n) + max(scores)
    yield alive("loss", gradients=gradients, activations=kept + rows, loss_slices=slices, buffers=at_loss)
    norm = norm_working(setup, portion.supervised, a.width)
    yield alive("final norm, backward", gradients=gradients, activations=kept, buffers=_buffer(setup, n) + norm)
    for index, layer in enumerate(layers):
        done = gradients or FLOAT * sum(above.trainable for above in layers[index + 1 :])
        again = index < portion.checkpointed
        for name, added, kept, buffers in _layer(setup, layer, again):
            yield alive(
                f"layer {index}, {name}",
                gradients=done + added if again or "backward" in name else gradients,
                activations=below[index] + kept,
                buffers=_buffer(setup, n) + buffers,
            )


def _layer(setup: Setup, layer: Layer, again: bool) -> Iterator[tuple[str, int, int, int]]:
    """The moments of a layer: name, bytes of its own gradients, what it keeps, and what the moment needs beside."""
    a, n, after = setup.architecture, layer.n, layer.after
    whole, stream, inner = (
        rows * width * setup.itemsize for rows, width in ((n, a.width), (after, a.width), (after, a.mlp_width))
    )
    forward, backward = (_product(setup, after, a.mlp_width, a.width) + most for most in layer.products())
    entry = whole * (not layer.entering)  # its input, where that is not kept as it is
    upon = stream * (again and layer.leaving)  # computed again, the gradient of its output is there already
    yield "attention", 0, layer.attention + entry + upon, layer.mixing_forward
    yield "forward", 0, layer.kept + entry + upon, max(layer.forward, stream + forward)
    if layer.leaving:
        upon = stream * layer.middle + entry * again  # the gradient that goes past the MLP
        yield "MLP backward", FLOAT * layer.down_trainable, layer.kept + upon, max(layer.backward, inner + backward)
        if (siblings := layer.siblings(GATE_UP, after, layer.middle))[1]:
            kept = layer.attention + layer.norm + siblings[0]
            yield "gate and up, backward", FLOAT * layer.mlp_trainable, kept + upon, siblings[1]
        upon = stream + entry * again
        norm = norm_working(setup, after, a.width) if layer.middle else 0
        yield "norm backward", FLOAT * layer.mlp_trainable, layer.attention + layer.norm + upon, norm
        upon = stream * layer.entering + entry * again
        yield "attention backward", FLOAT * layer.mlp_trainable, layer.attention - layer.output + upon, layer.mixing
        kept, norm = layer.qk_norms
        yield "query and key norm backward", FLOAT * layer.trainable, kept + upon, norm
        if (siblings := layer.siblings(QKV, n, layer.entering))[1]:
            kept = siblings[0] + norm_kept(setup, n, a.width) * layer.entering
            yield "q, k and v, backward", FLOAT * layer.trainable, kept + upon, siblings[1]
