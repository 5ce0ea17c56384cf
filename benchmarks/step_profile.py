"""Where the time of one of Lamina's steps goes, and what the machine's bare GEMMs of the same shapes would take.

The bound is the time of the GEMMs alone: the same weights and sizes, outputs allocated beforehand, nothing in between.
Steps and GEMMs take turns, so that what the machine does meanwhile falls on both. On a GPU the model is random and made there,
without files, and time is that of its kernels, under the operation that started them (``gpu_profile.py``).
"""

import collections
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import torch
import workload
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent / "arms"))
from bare_gemms import BareGemms
from common import GEMMS, Job
from lamina_arm import prepared

from lamina.data.pack import pack
from lamina.training.loop import start, train

WARMUP, STEPS, BATCH = 2, 5, 4
SCOPES = {
    "_CrossEntropySum": "loss",
    "_Project": "adapted linear",
    "_Rotate": "rotary",
    "_Kernel": "attention",
    "_RMSNorm": "norm",
    "NormBackward": "norm",
    "rms_norm": "norm",
    "_SwiGLU": "swiglu",
    "silu": "swiglu",
    "Optimizer": "optimizer",
    "_fused_adamw": "optimizer",
    "_foreach": "optimizer",
    "linalg": "optimizer",
}
"""Part of an event's or an enclosing event's name, and its group; the innermost that is known counts."""


def main(files: workload.Files) -> None:
    """Profiles the whole-text workload and prints both tables."""
    torch.set_num_threads(machine.cores())
    job = Job(
        *map(str, (files.model, files.adapter, files.whole)), first=0, batch=BATCH, warmup=WARMUP, steps=2 * STEPS,
        threads=machine.cores(), precision="bf16", learning_rate=2e-4, clip=1.0, result="",
    )  # fmt: skip
    model, rows, training = prepared(job)
    steps = train(model, rows, training, start(model, training), seed=0)
    for _ in range(WARMUP):
        next(steps)
    print(machine.machine())
    print(f"commit {machine.commit()}, torch {torch.__version__}, {files.about}, {BATCH} rows a step, bf16\n")
    bound(BareGemms(job.model, job.adapter, job.dtype), steps)
    where(steps)
    began = time.perf_counter()
    for first in range(0, BATCH * STEPS, BATCH):
        pack(rows.rows[first : first + BATCH], training.portion)
    print(f"  packing, measured by itself: {(time.perf_counter() - began) / STEPS * 1e3:.2f} ms a step")


def bound(bare: BareGemms, steps: Iterator) -> None:
    """A step, its bare GEMMs, the next step …"""
    spent = collections.defaultdict(list)
    flops = collections.defaultdict(list)
    for _ in range(STEPS):
        began = time.perf_counter()
        step = next(steps)
        bare.wait()
        spent["step"].append(time.perf_counter() - began)
        bare.size(step.tokens, step.supervised_tokens)
        seconds, counts = bare.timed()
        for name in seconds:
            spent[name].append(seconds[name])
            flops[name].append(counts[name])
    gemms = [sum(times) for times in zip(*(spent[name] for name in flops), strict=True)]
    print(f"{'bare GEMMs':24}{'ms':>8}{'GFLOP/s':>9}{'of step':>9}")
    for name, counts in flops.items():
        share = statistics.median(t / s for t, s in zip(spent[name], spent["step"], strict=True))
        rate = sum(counts) / sum(spent[name]) / 1e9
        print(f"  {name:22}{statistics.median(spent[name]) * 1e3:8.0f}{rate:9.0f}{share:9.0%}")
    share = statistics.median(g / s for g, s in zip(gemms, spent["step"], strict=True))
    rate = sum(map(sum, flops.values())) / sum(gemms) / 1e9
    print(f"  {'all':22}{statistics.median(gemms) * 1e3:8.0f}{rate:9.0f}{share:9.0%}")
    print(f"  {'Lamina’s step':22}{statistics.median(spent['step']) * 1e3:8.0f}   reaches {share:.0%} of the bound\n")


def where(steps: Iterator) -> None:
    """Time by group of operations, from the profiler, over some steps."""
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            next(steps)
    wall = time.perf_counter() - began
    groups, parts = collections.Counter(), collections.defaultdict(collections.Counter)
    for event in profiler.events():
        group = group_of(event)
        groups[group] += event.self_cpu_time_total / 1e6
        parts[group][event.name] += event.self_cpu_time_total / 1e6
    groups["between the operations (Python, packing)"] = wall - sum(groups.values())
    print(f"{'where a step goes':42}{'ms':>8}{'share':>8}   (self time, under the profiler)")
    for name, seconds in groups.most_common():
        most = ", ".join(f"{op} {t / STEPS * 1e3:.0f}" for op, t in parts[name].most_common(4))
        print(f"  {name:40}{seconds / STEPS * 1e3:8.1f}{seconds / wall:8.1%}   {most}")
    print(f"  {'all':40}{wall / STEPS * 1e3:8.1f}")


def group_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    gemm, place = event.name in GEMMS, event
    if any(part in event.name for part in ("scaled_dot_product", "flash_attention")):
        return "attention"
    while place is not None:
        for part, group in SCOPES.items():
            if part in place.name:
                if not gemm or group == "attention":  # whose products are no part of the bound
                    return group
                return f"GEMM, {'head' if group == 'loss' else 'frozen and LoRA'}"
        place = place.cpu_parent
    return "GEMM, frozen and LoRA" if gemm else "elementwise and other"


__all__ = ["bound", "group_of", "main"]
