"""Where the time of one of Lamina's steps goes, and what the machine's bare GEMMs of the same shapes would take.

The bound is the time of the GEMMs alone: the same weights and sizes, outputs allocated beforehand, nothing in between.
Steps and GEMMs take turns, so that what the machine does meanwhile falls on both.
"""

import collections
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
import torch
import workload
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent / "arms"))
from common import Job
from lamina_arm import prepared

from lamina.adapter import AdaptedLinear, adapted
from lamina.data.pack import pack
from lamina.model.decoder import Decoder
from lamina.ops.loss import SLICE
from lamina.training.loop import start, train

WARMUP, STEPS, BATCH = 2, 5, 4
GEMMS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear"}
SCOPES = {
    "_CrossEntropySum": "loss",
    "_AdaptedLinear": "adapted linear",
    "_Rotate": "rotary",
    "_InBlocks": "attention",
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


class BareGemms:
    """The GEMMs of one step on N packed tokens, of which S carry a loss, by group."""

    def __init__(self, model: Decoder, tokens: int, supervised: int) -> None:
        self.modules: list[tuple[str, AdaptedLinear]] = list(adapted(model).items())
        self.vocabulary, self.supervised = model.vocabulary, supervised
        dtype, widths = model.vocabulary.dtype, set()
        for _, module in self.modules:
            widths |= set(module.base.weight.shape)
        rank = max(module.a.shape[0] for _, module in self.modules)
        self.at = {width: torch.randn(tokens, width, dtype=dtype) for width in widths}  # inputs and gradients
        self.out = {width: torch.empty(tokens, width, dtype=dtype) for width in widths}
        self.narrow, self.narrow_grad = (torch.randn(tokens, rank, dtype=dtype) for _ in range(2))
        self.factors = [(m.a.detach().to(dtype), m.b.detach().to(dtype)) for _, m in self.modules]
        self.a_grad = {w: torch.empty(rank, w, dtype=dtype) for w in widths}
        self.b_grad = {w: torch.empty(w, rank, dtype=dtype) for w in widths}
        self.hidden = torch.randn(supervised, self.vocabulary.shape[1], dtype=dtype)
        self.logits = torch.empty(min(SLICE, supervised), len(self.vocabulary), dtype=dtype)

    def groups(self) -> dict[str, tuple[Callable[[], None], float]]:
        """Each group's work and its FLOPs."""
        tokens = len(self.narrow)
        weights = sum(m.base.weight.numel() for _, m in self.modules)
        unneeded = sum(m.base.weight.numel() for path, m in self.modules if _reads_embedding(path))
        factors = sum(a.numel() + b.numel() for a, b in self.factors)
        first = sum(
            a.numel() for (a, _), (path, _) in zip(self.factors, self.modules, strict=True) if _reads_embedding(path)
        )
        return {
            "frozen, forward": (self.forward, 2.0 * tokens * weights),
            "frozen, backward": (self.backward, 2.0 * tokens * (weights - unneeded)),
            "LoRA": (self.lora, 2.0 * tokens * (3 * factors - first)),
            "head": (self.head, 4.0 * self.supervised * self.vocabulary.numel()),
        }

    def forward(self) -> None:
        for _, module in self.modules:
            out, width = module.base.weight.shape
            torch.mm(self.at[width], module.base.weight.t(), out=self.out[out])

    def backward(self) -> None:
        for path, module in self.modules:
            out, width = module.base.weight.shape
            if not _reads_embedding(path):
                torch.mm(self.at[out], module.base.weight, out=self.out[width])

    def lora(self) -> None:
        for (a, b), (path, _) in zip(self.factors, self.modules, strict=True):
            out, width = len(b), a.shape[1]
            torch.mm(self.at[width], a.t(), out=self.narrow)
            self.out[out].addmm_(self.narrow, b.t())
            torch.mm(self.at[out], b, out=self.narrow_grad)
            torch.mm(self.narrow_grad.t(), self.at[width], out=self.a_grad[width])
            torch.mm(self.at[out].t(), self.narrow, out=self.b_grad[out])
            if not _reads_embedding(path):
                self.out[width].addmm_(self.narrow_grad, a)

    def head(self) -> None:
        for part in self.hidden.split(SLICE):
            logits = self.logits[: len(part)]
            torch.mm(part, self.vocabulary.t(), out=logits)
            torch.mm(logits, self.vocabulary)


def _reads_embedding(path: str) -> bool:
    """The first layer's q, k and v read the frozen embedding: no gradient goes there."""
    return path.startswith("model.layers.0.self_attn.") and not path.endswith("o_proj")


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
    bound(model, steps)
    where(steps)
    began = time.perf_counter()
    for first in range(0, BATCH * STEPS, BATCH):
        pack(rows.rows[first : first + BATCH], training.portion)
    print(f"  packing, measured by itself: {(time.perf_counter() - began) / STEPS * 1e3:.2f} ms a step")


def bound(model: Decoder, steps: Iterator) -> None:
    """A step, its bare GEMMs, the next step …"""
    spent = collections.defaultdict(list)
    flops = collections.defaultdict(list)
    for _ in range(STEPS):
        began = time.perf_counter()
        step = next(steps)
        spent["step"].append(time.perf_counter() - began)
        bare = BareGemms(model, step.tokens, step.supervised_tokens)
        bare.forward()  # touches the outputs' memory once
        for name, (work, count) in bare.groups().items():
            began = time.perf_counter()
            work()
            spent[name].append(time.perf_counter() - began)
            flops[name].append(count)
        del bare
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
        group = _group(event)
        groups[group] += event.self_cpu_time_total / 1e6
        parts[group][event.name] += event.self_cpu_time_total / 1e6
    groups["between the operations (Python, packing)"] = wall - sum(groups.values())
    print(f"{'where a step goes':42}{'ms':>8}{'share':>8}   (self time, under the profiler)")
    for name, seconds in groups.most_common():
        most = ", ".join(f"{op} {t / STEPS * 1e3:.0f}" for op, t in parts[name].most_common(4))
        print(f"  {name:40}{seconds / STEPS * 1e3:8.1f}{seconds / wall:8.1%}   {most}")
    print(f"  {'all':40}{wall / STEPS * 1e3:8.1f}")


def _group(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    gemm, place = event.name in GEMMS, event
    if "scaled_dot_product" in event.name:
        return "attention"
    while place is not None:
        for part, group in SCOPES.items():
            if part in place.name:
                if not gemm or group == "attention":  # whose products are no part of the bound
                    return group
                return f"GEMM, {'head' if group == 'loss' else 'frozen and LoRA'}"
        place = place.cpu_parent
    return "GEMM, frozen and LoRA" if gemm else "elementwise and other"


__all__ = ["BareGemms", "main"]
