"""``qlora.py gpu``: Llama-2-7B's shape over each base, and Llama-2-70B's in NF4, on one GPU, in one process.

A model is read from a folder, where there is one, or drawn on the device and quantised as it comes (``drawn.py``). Then an adapter of rank
16 on all linears, alpha 32, is trained by ``lamina.training.loop.train``: one row of 512 random tokens a step, all of them targets. Memory
is what torch's allocator has lent, above what it had lent before; layers are checkpointed only where the plan says that the
run would not fit otherwise; then the 7B in NF4 once more within 6 GB, and the 70B with all of them.
"""

import gc
import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload
from drawn import drawn
from workload import Shape

from lamina.adapter import LoRA, attach, detach
from lamina.data.pack import pack
from lamina.data.render import Rendered
from lamina.model.decoder import Decoder
from lamina.model.quantised import Base
from lamina.model.weights import load_model
from lamina.training.available import Meter, available
from lamina.training.loop import Training, start, train
from lamina.training.plan import Plan, in_process, plan, ranks_of, weights
from lamina.training.setup import Portion, Setup, shapes

Row = dict[str, Any]
BASES: tuple[Base | None, ...] = ("nf4", None, "fp8", "int8")
LORA = LoRA(rank=16, alpha=32.0)
STEPS, TOKENS, MANY = 3, 512, 16
"""Steps, of which the first is not timed; tokens of a row, and rows of a step where the speed of many is asked for."""

SPARE = 0.95
"""Share of the free memory that a plan may take before layers are checkpointed."""

SMALL = 6e9
"""Bytes in which the 7B in NF4 is trained once more."""


@dataclass(frozen=True)
class Scale:
    """How large the models are and where they are: Llama-2's on a GPU, or tiny ones on a CPU, which tries the benchmark."""

    device: torch.device
    shapes: dict[str, Shape]
    tokens: int

    @classmethod
    def of(cls, tiny: bool) -> "Scale":
        """The true one, or the tiny one."""
        if tiny:
            small = replace(workload.TINY, vocabulary=256, rank=16)
            return cls(torch.device("cpu"), {"7b": small, "70b": replace(small, kv_heads=2)}, 64)
        return cls(torch.device("cuda"), {name: workload.MODELS[name] for name in ("7b", "70b")}, TOKENS)


def rows_of(scale: Scale, folder: Path | None, everything: bool, large: bool) -> Iterator[Row]:
    """All that is measured, row by row.

    Args:
        folder: of a checkpoint of the 7B, which is read in NF4; with ``everything`` in all forms, else the others are drawn.
        large: the 70B too.
    """
    for base in BASES:
        where = folder if everything or base == BASES[0] else None
        model, row, before = made(scale, "7b", base, where)
        yield row
        for rows in (1, MANY):
            yield tried(scale, "7b", base, model, before, rows, fitting(model, base, rows, scale))
        if base == BASES[0]:
            yield tried(scale, "7b", base, model, before, 1, fitting(model, base, 1, scale, SMALL))
        del model
        emptied(scale.device)
    if large:
        model, row, before = made(scale, "70b", "nf4", None)
        yield row
        fits, layers = fitting(model, "nf4", 1, scale), model.architecture.layers
        for checkpointed in dict.fromkeys((fits, layers)):
            yield tried(scale, "70b", "nf4", model, before, 1, checkpointed)


def made(scale: Scale, name: str, base: Base | None, folder: Path | None) -> tuple[Decoder, Row, int]:
    """A model in its form, the row of its making, and what was allocated before: its peak beside the plan's and two of its largest
    matrices."""
    emptied(scale.device)
    meter, began = Meter(scale.device), time.perf_counter()
    if folder is None:
        model = drawn(scale.shapes[name], torch.bfloat16, scale.device, base)
    else:
        model = load_model(folder, "bf16", scale.device, base=base)
    synchronised(scale.device)
    seconds, peak = time.perf_counter() - began, meter.peak()
    kept = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    planned = weights(Setup(model.architecture, {}, base=base))
    matrix = 2 * max(outputs * inputs for outputs, inputs in shapes(model.architecture).values())
    numbers = f"{scale.shapes[name].parameters / seconds / 1e9:.2f} G weights/s"
    note = f"{'read from files' if folder else 'drawn on the device'}, {numbers}; kept bytes are {kept / planned:.4f} of the plan's; "
    note += f"beyond them at the peak {(peak - kept) / 2**20:.1f} MiB, {(peak - kept) / matrix:.2f} of the largest matrix in bf16"
    row = {"what": f"{name}, {'load' if folder else 'draw'}", "base": base or "bf16", "seconds": seconds}
    row |= {
        "predicted_bytes": planned + 2 * matrix,
        "measured_bytes": peak,
        "ratio": peak / (planned + 2 * matrix),
        "note": note,
    }
    return model, row, meter.before


def planned(model: Decoder, base: Base | None, rows: int, checkpointed: int, scale: Scale) -> Plan:
    """The plan of a step of so many rows in one micro-batch."""
    architecture = model.architecture
    device: Any = scale.device.type
    setup = in_process(Setup(architecture, ranks_of(architecture, LORA), base=base, device=device))
    (batch,) = pack(examples(rows, scale.tokens, architecture.vocabulary), rows * scale.tokens)
    return plan(setup, Portion(batch.lengths, batch.supervised, checkpointed))


def fitting(model: Decoder, base: Base | None, rows: int, scale: Scale, most: float | None = None) -> int:
    """The fewest checkpointed layers with which the plan fits into so many bytes, or what is free; all, where none does."""
    layers = model.architecture.layers
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    free = SPARE * (most or available(scale.device) + held)
    return next((n for n in range(layers) if planned(model, base, rows, n, scale).total <= free), layers)


def tried(scale: Scale, name: str, base: Base | None, model: Decoder, before: int, rows: int, checkpointed: int) -> Row:
    """``trained``; where the device refuses, the row says so, is not written, and what follows goes on."""
    what = f"{name}, train, {rows} x {scale.tokens} tokens, {checkpointed} layers checkpointed"
    try:
        row = trained(scale, base, model, before, rows, checkpointed)
    except RuntimeError as error:
        traceback.print_exc()
        row = {"faults": "failed", "note": f"FAILED: {str(error).splitlines()[0]}"}
    detach(model)
    return {"what": what, "base": base or "bf16"} | row


def trained(scale: Scale, base: Base | None, model: Decoder, before: int, rows: int, checkpointed: int) -> Row:
    """Trains a fresh adapter; seconds are the median of the steps but the first, memory is above what was allocated before the model."""
    emptied(scale.device)
    meter = Meter(scale.device)
    attach(model, LORA)
    settings = Training(
        steps=STEPS, batch_size=rows, checkpoint_layers=checkpointed, micro_batch_tokens=rows * scale.tokens
    )
    data = examples(STEPS * rows, scale.tokens, model.architecture.vocabulary)
    steps = list(train(model, data, settings, start(model, settings), seed=0))
    peak = meter.peak() + meter.before - before
    expected = planned(model, base, rows, checkpointed, scale)
    seconds = statistics.median(step.seconds for step in steps[1:])
    losses = " ".join(f"{step.loss:.4f}" for step in steps)
    took = " ".join(f"{step.seconds:.3f}" for step in steps)
    items = ", ".join(f"{item} {size / 2**20:.0f}" for item, size in expected.items.items() if size)
    return {
        "seconds": seconds,
        "tokens_s": steps[-1].tokens / seconds,
        "predicted_bytes": expected.total,
        "measured_bytes": peak,
        "ratio": peak / expected.total,
        "note": f"losses {losses}; steps {took} s; peak foreseen: {expected.peak.name}; in MiB {items}",
    }


def examples(count: int, tokens: int, vocabulary: int) -> list[Rendered]:
    """Rows of random tokens, of which every one but the first is a target."""
    random = np.random.default_rng(0)
    return [Rendered(random.integers(0, vocabulary, tokens, np.int32), np.ones(tokens, bool), n) for n in range(count)]


def emptied(device: torch.device) -> None:
    """Lets go of what nobody holds, and of what libraries keep to work in."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.init()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def synchronised(device: torch.device) -> None:
    """Waits until the device has done all."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
