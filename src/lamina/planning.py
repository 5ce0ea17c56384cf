"""The plan of a run: what it will need, item by item, and how long it will take, before anything large is loaded.

Everything is a function of the job, the base's config and the lengths of the data's rows. What the settings leave open is
chosen here (``training.choosing``), and the choice is written into the run's job: a run that is resumed or replayed on
another machine is still cut in the same way.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.data.pack import Batch
from lamina.data.prepare import Prepared
from lamina.errors import TrainingError
from lamina.job import Job, order_of
from lamina.model.architecture import read_config
from lamina.model.weights import DTYPES, form_of_folder, pick_device
from lamina.report.console import duration
from lamina.training.available import available
from lamina.training.calibrate import calibrate
from lamina.training.choosing import Choice, candidates, choose
from lamina.training.heaviest import Heaviest, heaviest, rows_by_step, tokens_of
from lamina.training.loop import Training
from lamina.training.plan import Plan, in_process, plan, ranks_of
from lamina.training.setup import Portion, Setup
from lamina.ways_out import Cut, Way, of_job, of_run, ways_out

GIB = 2**30


@dataclass(frozen=True)
class Planned:
    """A run's memory and time.

    Attributes:
        training: the job's, with everything decided.
        heaviest: the micro-batch that the plan is made for.
        free: bytes that the run may take; ``limited`` where ``memory_gib`` says so, not the device.
        seconds: of training, estimated.
        tokens: of all steps.
        resumed: the folder of a run that goes on, which may change little of its job.
    """

    plan: Plan
    training: Training
    heaviest: Batch
    fits: bool
    free: int
    device: str
    seconds: float
    tokens: int
    layers: int
    ways_out: tuple[tuple[str, int], ...] = ()
    resumed: Path | None = None
    limited: bool = False

    @property
    def beyond(self) -> str:
        """What does not fit, and into what."""
        room = f"--memory-gib allows {size(self.free)}" if self.limited else f"{self.device} has {size(self.free)} free"
        return f"the run needs {size(self.plan.total)} and {room}"

    @property
    def without_way(self) -> str:
        """What there is to say where no setting makes it fit."""
        if self.resumed:
            return "nothing that a resumed run may change"
        least = self.plan.items["runtime"]
        if least > self.free:
            return f"nothing, for what the process takes beside its tensors is {size(least)} alone"
        return "no setting alone, but a smaller base"

    @property
    def enough(self) -> str:
        """The flag under which the run is tried all the same."""
        return f"--memory-gib {math.ceil(self.plan.total / GIB * 11) / 10}"

    def lines(self) -> Iterator[str]:
        """The plan for people: the choice, the table, the time."""
        batch, training = self.heaviest, self.training
        twice = f"{training.checkpoint_layers} of {self.layers} layers" if training.checkpoint_layers else "nothing"
        yield (
            f"memory plan, for the heaviest micro-batch: {len(batch.tokens):,} tokens (the longest example {max(batch.lengths):,}, "
            f"{batch.supervised:,} with a loss); micro-batches of at most {training.portion:,} tokens, {twice} computed twice"
        )
        for name, taken in self.plan.items.items():
            yield f"  {name:<12}{size(taken):>11}"
        room = "that --memory-gib allows" if self.limited else "free"
        of = f"of {size(self.free)} {room} on {self.device}; the peak is at: {self.plan.peak.name}"
        yield f"  {'total':<12}{size(self.plan.total):>11} {of}"
        if self.seconds:
            rate = self.tokens / self.seconds
            yield f"time: about {duration(self.seconds)} of training, {rate:,.0f} tokens/s, from timing one layer here"

    def check(self) -> None:
        """Passes when the run fits.

        Raises:
            TrainingError: it does not; names the three cheapest ways out.
        """
        if self.fits:
            return
        command = f"lamina train --resume {self.resumed} " if self.resumed else ""
        ways = "; ".join(f"{command}{flags} ({size(taken)})" for flags, taken in self.ways_out)
        raise TrainingError(
            f"{self.beyond}; what would fit: {ways or self.without_way}; to try it all the same: {command}{self.enough}"
        )

    def as_json(self) -> dict[str, Any]:
        """The plan for machines; all sizes in bytes."""
        return {
            "total_bytes": self.plan.total,
            "items": self.plan.items,
            "moment": self.plan.peak.name,
            "available_bytes": self.free,
            "fits": self.fits,
            "ways_out": [{"flags": flags, "total_bytes": taken} for flags, taken in self.ways_out],
            "device": self.device,
            "micro_batch_tokens": self.training.portion,
            "checkpoint_layers": self.training.checkpoint_layers,
            "heaviest_micro_batch": {
                "tokens": len(self.heaviest.tokens),
                "longest": max(self.heaviest.lengths),
                "supervised": self.heaviest.supervised,
            },
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def seconds_of(self, tokens: int) -> float:
        """The estimate for so many of the run's tokens: one that stops early trains on fewer."""
        return self.seconds * tokens / self.tokens


def plan_run(job: Job, base: Path, data: Prepared, timed: bool = True, resumed: Path | None = None) -> Planned:
    """Plans the memory of a run, chooses what its settings leave open, and estimates its time.

    Args:
        timed: whether to time a layer here, which takes seconds and a layer's memory; else the time is 0.
        resumed: the folder of the run, where it is one that goes on.

    Raises:
        ConfigError: an adapter that does not fit the model.
    """
    device = pick_device(job.model.device)
    free = _free(job, device)
    lengths = data.train.lengths
    steps = rows_by_step(lengths, job.train, job.head.seed, order_of(job, lengths))
    found_in = lru_cache(partial(heaviest, data.train, lengths, steps))
    needs = _Needs(job, base, int(lengths.max()), found_in, device.type)
    choice, found, fits = needs.choose(free)
    if choice.checkpointed or job.train.optimizer != "adamw":
        # These load it at their first use: then it would be taken from what was free here.
        importlib.import_module("torch._dynamo")
        free = _free(job, device)
        choice, found, fits = needs.choose(free)
    training = replace(job.train, micro_batch_tokens=choice.tokens, checkpoint_layers=choice.checkpointed)
    tokens = tokens_of(steps, lengths, job.train)
    layers = needs.setup.architecture.layers
    seconds = 0.0
    if fits and timed:
        usual = min(choice.tokens, max(1, tokens // job.train.total_steps(len(lengths))))
        pace = calibrate(needs.setup, DTYPES[job.model.dtype], device, usual)
        lowest = min(int(path.split(".")[2]) for path in needs.setup.ranks)
        targets = round(tokens * data.report.learnt)
        seconds = pace.seconds(tokens, targets, layers, choice.checkpointed, lowest)
    ways = () if fits else _ways_out(needs, data, steps, free, bool(resumed))
    batch = found_in(choice.tokens).first
    limited = job.train.memory_gib is not None
    return Planned(found, training, batch, fits, free, device.type, seconds, tokens, layers, ways, resumed, limited)


def _ways_out(
    of: "_Needs", data: Prepared, steps: NDArray[np.int64], free: int, resumed: bool
) -> tuple[tuple[str, int], ...]:
    """What would fit, of what may be changed."""
    job, base, device = of.job, of.base, of.device
    if of.setup.runtime > free:
        return ()

    def needed(way: Way) -> int:
        longest, found_in = of.longest, of.heaviest
        if way.longest:
            rows = Cut(data.train, data.train.lengths, way.longest)
            longest, found_in = int(rows.lengths.max()), lru_cache(partial(heaviest, rows, rows.lengths, steps))
        return _Needs(way.of(job), base, longest, found_in, device).choose(free)[1].total

    plain = form_of_folder(base, replace(job.model, base=None)) is None
    return ways_out(of_run(job, device) if resumed else of_job(job, of.longest, device, plain), needed, free)


def _free(job: Job, device: torch.device) -> int:
    """Bytes that the run may take now."""
    return available(device) if job.train.memory_gib is None else round(job.train.memory_gib * GIB)


def compared(planned: Planned, measured: int) -> str:
    """The plan beside the peak that was measured, in a line."""
    share = measured / planned.plan.total
    return (
        f"memory: planned {size(planned.plan.total)}, measured {size(measured)} at its peak ({share:.0%} of the plan)"
    )


def size(number: int) -> str:
    """Bytes for people."""
    return f"{number / GIB:,.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:,.1f} MiB"


class _Needs:
    """What a job needs, as a function of the choice.

    Args:
        longest: tokens of the longest example.
        heaviest: the micro-batches of the run that a budget of tokens makes.
    """

    def __init__(self, job: Job, base: Path, longest: int, heaviest: Callable[[int], Heaviest], device: str) -> None:
        self.job, self.base, self.longest, self.heaviest, self.device = job, base, longest, heaviest, device
        architecture = read_config(base)
        form = form_of_folder(base, job.model)
        setup = Setup(
            architecture,
            ranks_of(architecture, job.adapter),
            DTYPES[job.model.dtype].itemsize,
            base=form.base if form else None,
            double=form.double if form else True,
            optimizer=job.train.optimizer,
            dropout=job.adapter.dropout > 0,
            device="cuda" if device == "cuda" else "cpu",
            ledger=job.watch.ledger_every > 0,
        )
        self.setup = in_process(setup)

    def choose(self, free: int) -> tuple[Choice, Plan, bool]:
        """The best choice that fits, within what the settings fix."""
        tokens, layers = self.job.train.micro_batch_tokens, self.job.train.checkpoint_layers
        every = candidates(self.setup.device, self.longest, self.setup.architecture.layers, self.setup.dropout)
        fixed = (Choice(tokens or one.tokens, one.checkpointed if layers is None else layers) for one in every)
        return choose(iter(dict.fromkeys(fixed)), self.planned, free)

    def planned(self, choice: Choice) -> Plan:
        """The plan of a choice."""
        found = self.heaviest(choice.tokens)
        offload = self.job.train.offload_checkpoints and self.setup.device == "cuda"  # elsewhere the host is the device
        portions = [
            Portion(batch.lengths, batch.supervised, choice.checkpointed, accumulated, offload)
            for batch, accumulated in ((found.first, False), (found.later, True))
            if batch is not None
        ]
        return plan(self.setup, *portions)
