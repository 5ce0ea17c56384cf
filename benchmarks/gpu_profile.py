"""Where the time of one of Lamina's steps goes on a GPU, over one form of the base after another.

The model is random and made on the GPU, so that a profile of Llama-2-7B's shape needs no files of 13.5 GB: what its kernels take does
not depend on the numbers. Kernels count under the innermost operation that started them. *Idle* is the time of a step in which no kernel
runs: what the host is late with. It is that of profiled steps, and the profiler makes the host later; beside it stands an upper bound for
a step that nobody watches, its seconds less the same kernels.
"""

import collections
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint
import machine
import rows as texts
import step_profile
import torch
from bare_gemms import BareGemms
from common import GEMMS, Row, read_rows, supervised
from drawn import drawn
from lamina_arm import InOrder
from torch.profiler import ProfilerActivity, profile
from workload import SEED, Shape

from lamina import LoRA, attach
from lamina.model.decoder import Decoder
from lamina.training.loop import Step, Training, start, train

WARMUP, STEPS, WATCHED, MOST, PORTION = 2, 5, 2, 25, 8192
BATCH = texts.BATCH["whole"] * texts.LARGER


def main(folder: Path, shape: Shape, bases: list[str], device: str = "cuda") -> None:
    """Profiles the whole-text workload over each base, beside the bare GEMMs of the same steps."""
    print(machine.machine(device))
    print(f"commit {machine.commit()}, torch {torch.__version__}, {texts.about('whole', folder)}, {BATCH} rows a step")
    rows = read_rows(str(folder / "whole.jsonl"))
    with tempfile.TemporaryDirectory() as sizes:
        (Path(sizes) / "config.json").write_text(json.dumps(checkpoint.config_of(shape)))
        (Path(sizes) / "adapter_config.json").write_text(json.dumps({"r": shape.rank}))
        bare = BareGemms(sizes, sizes, torch.bfloat16, device)
    bound = bare_speed(bare, rows)
    print(f"bare GEMMs {bound:.0f} tok/s", flush=True)
    del bare
    for base in bases:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = random_model(shape, None if base == "bf16" else base, device)
        examples = InOrder([rows[index % len(rows)] for index in range(BATCH * (WARMUP + STEPS + WATCHED))], seed=0)
        training = Training(
            steps=WARMUP + STEPS + WATCHED,
            batch_size=BATCH,
            learning_rate=2e-4,
            schedule="constant",
            warmup=0.0,
            micro_batch_tokens=PORTION,
        )
        told(base, train(model, examples, training, start(model, training), seed=0), bound, shape.rank, device)
        del model, examples


def random_model(shape: Shape, base: str | None, device: str) -> Decoder:
    """A Llama of this shape with random weights and a random adapter, made where it computes."""
    model = drawn(shape, torch.bfloat16, torch.device(device), base)
    with torch.no_grad():
        for module in attach(model, LoRA(rank=shape.rank, alpha=16.0), SEED).values():
            module.b.normal_(0.0, 0.01)
    return model


def bare_speed(bare: BareGemms, rows: list[Row]) -> float:
    """Tokens per second of the bare products over the steps that Lamina takes later."""
    speeds = []
    for number in range(WARMUP + STEPS):
        step = [rows[index % len(rows)] for index in range(BATCH * number, BATCH * (number + 1))]
        tokens = sum(len(row["input_ids"]) for row in step)
        bare.size(tokens, supervised(step))
        speeds.append(tokens / sum(bare.timed()[0].values()))
    return statistics.median(speeds[WARMUP:])


def told(base: str, steps: Iterator[Step], bound: float, rank: int, device: str) -> None:
    """Speed and memory of unwatched steps, then where the time of watched ones goes."""
    for _ in range(WARMUP):
        next(steps)
    _wait(device)
    began = time.perf_counter()
    taken = [next(steps) for _ in range(STEPS)]
    _wait(device)
    speed = sum(step.tokens for step in taken) / (time.perf_counter() - began)
    print(
        f"\n{base}: {speed:.0f} tok/s, {speed / bound:.0%} of the bare GEMMs, peak {taken[-1].memory_bytes / 2**30:.2f} GiB"
    )
    on_gpu = [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True) as profiler:
        _wait(device)
        began = time.perf_counter()
        watched = [next(steps) for _ in range(WATCHED)]
        _wait(device)
        wall = time.perf_counter() - began
    groups, kernels, busy = spent(profiler.events(), rank)
    print(f"{'where a step goes':28}{'ms':>9}{'share':>8}   (kernels of {WATCHED} profiled steps)")
    for name, seconds in groups.most_common():
        print(f"  {name:26}{seconds / WATCHED * 1e3:9.1f}{seconds / wall:8.1%}")
    print(f"  {'idle':26}{(wall - busy) / WATCHED * 1e3:9.1f}{1 - busy / wall:8.1%}")
    a_token = busy / sum(step.tokens for step in watched)
    print(
        f"  {'all':26}{wall / WATCHED * 1e3:9.1f}          idle without the profiler: {max(0.0, 1 - a_token * speed):.1%}"
    )
    print(f"{'kernels':100}{'ms':>9}{'share':>8}{'calls':>8}")
    for name, (seconds, calls) in sorted(kernels.items(), key=lambda item: -item[1][0])[:MOST]:
        print(f"  {name[:98]:98}{seconds / WATCHED * 1e3:9.2f}{seconds / wall:8.1%}{calls // WATCHED:8}")


def spent(events: Any, rank: int) -> tuple[collections.Counter[str], dict[str, list[float]], float]:
    """Seconds of kernels by group; seconds and calls by the kernel's name; seconds of all kernels, also of those that no operation owns."""
    groups: collections.Counter[str] = collections.Counter()
    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    busy = 0.0
    marks = {event.name for event in events if event.is_user_annotation}  # told of the GPU too, as if they were kernels
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU:
            for kernel in event.kernels:
                groups[_group(event, rank)] += kernel.duration / 1e6 if kernel.name not in marks else 0.0
        elif not event.is_user_annotation:
            busy += event.time_range.elapsed_us() / 1e6
            kernels[event.name][0] += event.time_range.elapsed_us() / 1e6
            kernels[event.name][1] += 1
    groups["started by no operation"] = max(0.0, busy - sum(groups.values()))
    return groups, kernels, busy


def _group(event: Any, rank: int) -> str:
    group = step_profile.group_of(event)
    if group.startswith("GEMM, frozen"):
        return f"GEMM, {'LoRA' if any(rank in shape for shape in event.input_shapes if shape) else 'frozen'}"
    if group in ("elementwise and other", "adapted linear") and (event.name in GEMMS or "gemm" in event.name.lower()):
        return "GEMM, other"
    return group


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


__all__ = ["main"]
