"""One configuration of ``memory.py``, planned and measured in this process: on a CPU from files, on a GPU from numbers drawn there.

On a CPU a small model is trained first, so that libraries are there, and the peak is of resident memory above that. On a GPU nothing
is allocated before: torch's allocator is emptied, cuBLAS's workspaces are given back, and all that is allocated counts. What is
left when model, gradients and optimiser are gone, is the libraries'.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peak import Entry, peak_of, recording
from workload import Shape

from lamina.adapter import LoRA, attach
from lamina.data.render import Rendered
from lamina.model.architecture import Architecture
from lamina.model.decoder import Decoder
from lamina.model.weights import DTYPES, load_model
from lamina.training.available import Meter
from lamina.training.heaviest import Heaviest, heaviest, rows_by_step
from lamina.training.loop import Training, rehearse, start, train
from lamina.training.plan import Plan, in_process, plan, ranks_of
from lamina.training.setup import Portion, Setup

OFF = 0.03
"""How far the peak may be from the plan before it is told who held it."""

MOMENTS = 5
"""Moments of the plan that are told then: the largest."""


@dataclass(frozen=True)
class Work:
    """What a configuration asks for."""

    job: dict[str, Any]
    lora: LoRA
    training: Training

    @classmethod
    def of(cls, job: dict[str, Any]) -> "Work":
        """Reads a configuration."""
        chosen = {name: job[name] for name in ("layers", "dropout") if name in job}
        if "targets" in job:
            chosen["targets"] = tuple(job["targets"])
        training = Training(
            steps=job.get("steps", 3),
            batch_size=len(job["lengths"]),
            checkpoint_layers=job.get("checkpointed", 0),
            micro_batch_tokens=job.get("micro_batch_tokens", 4096),
            optimizer=job.get("optimizer", "adamw"),
            offload_checkpoints=job.get("offload", False),
        )
        return cls(job, LoRA(rank=job["rank"], **chosen), training)

    @property
    def lengths(self) -> list[int]:
        """Of the rows of a step, or of all steps where their number is given."""
        if "steps" not in self.job:
            return list(self.job["lengths"])
        shares = np.random.default_rng(1).uniform(0.2, 1.0, (self.job["steps"], len(self.job["lengths"])))
        return [int(length) for length in (shares * self.job["lengths"]).flat]

    def rows(self, lengths: list[int], vocabulary: int) -> list[Rendered]:
        """Rows of random tokens, of which the last ``share`` is learnt."""
        random, share = np.random.default_rng(0), self.job.get("share", 1.0)
        return [
            Rendered(random.integers(0, vocabulary, n, dtype=np.int32), np.arange(n) >= max(1, (1 - share) * n), row)
            for row, n in enumerate(lengths)
        ]

    def run(self, model: Decoder, lora: LoRA, lengths: list[int]) -> Plan:
        """Trains as ``lamina train`` does, the heaviest micro-batch first. Returns the plan of it."""
        attach(model, lora)
        data, training = self.rows(lengths, model.architecture.vocabulary), self.training
        known = np.array(lengths)
        found = heaviest(data, known, rows_by_step(known, training, 0), training.portion)
        planned = self.planned(model.architecture, lora, found, model.vocabulary.device)
        rehearse(model, found.first, training, beside=planned.items["optimiser"])
        list(train(model, data, training, start(model, training), 0))
        return planned

    def planned(self, architecture: Architecture, lora: LoRA, found: Heaviest, device: torch.device) -> Plan:
        """The plan of a run with these heaviest micro-batches."""
        setup = Setup(
            architecture,
            ranks_of(architecture, lora),
            DTYPES[self.job["dtype"]].itemsize,
            base=self.job["base"],
            optimizer=self.training.optimizer,
            dropout=lora.dropout > 0,
            device="cuda" if device.type == "cuda" else "cpu",
        )
        batches = [(found.first, False), *([(found.later, True)] if found.later else [])]
        layers, offload = self.training.checkpoint_layers or 0, self.training.offload_checkpoints
        portions = [Portion(b.lengths, b.supervised, layers, later, offload) for b, later in batches]
        return plan(in_process(setup), *portions)


def from_files(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a configuration on the CPU, once in a process."""
    work, device = Work.of(job), torch.device("cpu")
    work.run(load_model(job["small"], job["dtype"], device, base=job["base"]), LoRA(rank=4), [16] * len(job["lengths"]))
    meter = Meter(device)
    model = load_model(job["folder"], job["dtype"], device, base=job["base"])
    planned = work.run(model, work.lora, work.lengths)
    return report_of(planned, meter.peak())


def on_gpu(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a configuration on the GPU, as often in a process as one likes."""
    work, device = Work.of(job), torch.device("cuda")
    torch.cuda.init()
    torch._C._cuda_clearCublasWorkspaces()
    _emptied()
    with recording() as record:
        meter = Meter(device)
        planned = _trained(work, device)
        measured = meter.peak()
        counts = torch.cuda.memory_stats(device)
        report = report_of(planned, measured) | {"requested": counts["requested_bytes.all.peak"], "log": []}
        if abs(measured / planned.total - 1) > OFF:
            report["log"] = told(planned, record)
    _emptied()
    return report | {"left": torch.cuda.memory_allocated(device), "device": torch.cuda.get_device_name(device)}


def _trained(work: Work, device: torch.device) -> Plan:
    """Draws the model, trains it, and lets go of all but the plan."""
    from drawn import drawn

    model = drawn(Shape(**work.job["shape"]), DTYPES[work.job["dtype"]], device, work.job["base"])
    return work.run(model, work.lora, work.lengths)


def _emptied() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def report_of(planned: Plan, measured: int) -> dict[str, Any]:
    """What the parent is told."""
    return {"planned": planned.total, "measured": measured, "moment": planned.peak.name, "items": planned.items}


def told(planned: Plan, record: Callable[[], Any]) -> list[str]:
    """The largest moments of the plan, and who held the memory at the peak in truth."""
    lines = []
    for moment in sorted(planned.moments, key=lambda moment: -moment.total)[:MOMENTS]:
        items = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in moment.items.items() if size)
        lines.append(f"  planned {moment.total / 2**20:.1f} MiB at {moment.name}: {items}")
    try:
        entries: list[Entry] = record()
        return [*lines, *peak_of(entries).lines()]
    except (
        RuntimeError,
        LookupError,
        TypeError,
    ) as error:  # another version's record: the measurement stands all the same
        return [*lines, f"  no record: {type(error).__name__}: {error}"]


KINDS = {"cpu": from_files, "cuda": on_gpu}
