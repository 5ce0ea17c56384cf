"""The parts of ``qlora.py`` that need a process of their own: for its memory, its page cache, or its number of threads.

``qlora_parts.py PART JOB`` runs the function called PART with the arguments in JOB (JSON), and prints what it returns as
JSON, with the share of the processors that others took meanwhile. Memory is what Linux counts as resident, above the
process's own baseline. The baseline is taken when all libraries are loaded and have done the same work on a tiny model, so
that what lies above it is the large model's.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "arms"))
import machine
from common import forget_peak, others, resident
from qlora_share import share

from lamina.adapter import LoRA, attach
from lamina.data.pack import pack
from lamina.data.render import Rendered
from lamina.model.decoder import Decoder
from lamina.model.weights import load_model
from lamina.ops.blockwise import BLOCK
from lamina.ops.fourbit import FourBit
from lamina.ops.frozen import SharedBuffer
from lamina.ops.library import bitsandbytes
from lamina.training.loop import Training, start, train
from lamina.training.plan import in_process, plan, ranks_of, weights
from lamina.training.setup import Portion, Setup, shapes

BUFFER = 2**23
"""Bytes of the plain read's buffer."""


def read(folder: str) -> dict[str, Any]:
    """Reads all shards from a cold page cache into one buffer: what the disk allows, and loading cannot beat."""
    shards, buffer, total = _shards(folder), bytearray(BUFFER), 0
    _forget_pages(folder)
    began = time.perf_counter()
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return {"seconds": time.perf_counter() - began, "bytes": total}


def load(folder: str, small: str, base: str) -> dict[str, Any]:
    """Loads a model in a form from a cold page cache; the prediction is the plan's, and for the peak one weight more."""
    load_model(small, "bf16", "cpu", base=base)
    baseline = _settled()
    _forget_pages(folder)
    began = time.perf_counter()
    model = load_model(folder, "bf16", "cpu", base=base)
    seconds = time.perf_counter() - began
    peak, kept = resident("VmHWM") - baseline, resident("VmRSS") - baseline
    predicted = weights(Setup(model.architecture, {}, base=base))
    widest = max(outputs * inputs for outputs, inputs in shapes(model.architecture).values())
    largest = widest * torch.bfloat16.itemsize
    return {
        "seconds": seconds,
        "predicted": predicted,
        "kept": kept,
        "predicted_peak": predicted + largest,
        "peak": peak,
    }


def training(
    folder: str, small: str, base: str, checkpointed: int, rank: int, tokens: int, steps: int
) -> dict[str, Any]:
    """Trains an adapter on all linears by ``lamina.training.loop.train``, one row a step; the plan is to foretell the peak."""
    lora = LoRA(rank=rank, alpha=32.0)
    settings = Training(steps=steps, batch_size=1, checkpoint_layers=checkpointed)
    first = _adapted(small, base, lora)
    rows = _rows(steps, tokens, first.architecture.vocabulary)
    for _ in train(first, rows, Training(steps=1, batch_size=1), start(first, settings), seed=0):
        del first
    baseline = _settled()
    model = _adapted(folder, base, lora)
    rows = _rows(steps, tokens, model.architecture.vocabulary)
    forget_peak("cpu")  # loading had its own
    done = list(train(model, rows, settings, start(model, settings), seed=0))
    peak = resident("VmHWM") - baseline
    (batch,) = pack(rows[:1], tokens)
    setup = in_process(Setup(model.architecture, ranks_of(model.architecture, lora), base=base))
    predicted = plan(setup, Portion(batch.lengths, batch.supervised, checkpointed))
    return {
        "steps": [step.seconds for step in done],
        "losses": [step.loss for step in done],
        "tokens": done[0].tokens,
        "predicted": predicted.total,
        "moment": predicted.peak.name,
        "peak": peak,
    }


def kernels(outputs: int, inputs: int, kind: str, rounds: int) -> dict[str, Any]:
    """Seconds of quantising and dequantising a bf16 weight, Lamina's and bitsandbytes', which take turns; minima.

    Both quantise the absmax too. ``agree`` is the share of numbers that come back the same on both sides.
    """
    functional = bitsandbytes().functional
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    form = FourBit(outputs, inputs, torch.bfloat16, kind=kind, double=True, scratch=SharedBuffer())
    given = {"blocksize": BLOCK, "compress_statistics": True, "quant_type": kind}
    packed, state = functional.quantize_4bit(weight, **given)
    form.store(weight)
    agree = (form.dense() == functional.dequantize_4bit(packed, state)).float().mean().item()
    works: dict[str, Callable[[], Any]] = {
        "store": lambda: form.store(weight),
        "store, bitsandbytes": lambda: functional.quantize_4bit(weight, **given),
        "dense": form.dense,
        "dense, bitsandbytes": lambda: functional.dequantize_4bit(packed, state),
    }
    spent = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            spent[name] = min(spent[name], time.perf_counter() - began)
    return {"minima": spent, "agree": agree}


def _adapted(folder: str, base: str, lora: LoRA) -> Decoder:
    model = load_model(folder, "bf16", "cpu", base=base)
    attach(model, lora)
    return model


def _rows(count: int, tokens: int, vocabulary: int) -> list[Rendered]:
    """Rows of random tokens, of which every one but the first is a target."""
    random = np.random.default_rng(0)
    return [Rendered(random.integers(0, vocabulary, tokens, np.int32), np.ones(tokens, bool), n) for n in range(count)]


def _shards(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def _forget_pages(folder: str) -> None:
    """Takes a checkpoint out of this system's page cache; what a host below it keeps is out of reach."""
    for shard in _shards(folder):
        with shard.open("rb") as file:
            os.fsync(file.fileno())  # a page that is not on the disk yet is kept
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _settled() -> int:
    """Resident bytes with all that is garbage given back; the peak is counted from here."""
    gc.collect()
    forget_peak("cpu")
    return resident("VmRSS")


PARTS = {part.__name__: part for part in (read, load, training, kernels, share)}


def main() -> None:
    part, job = PARTS[sys.argv[1]], json.loads(sys.argv[2])
    before, began = others(), time.perf_counter()
    report = part(**job)
    used = (others() - before) / (time.perf_counter() - began) / machine.cores()
    print(json.dumps(report | {"others": max(0.0, used)}))


if __name__ == "__main__":
    main()
