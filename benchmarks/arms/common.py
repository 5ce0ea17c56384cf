"""What all arms share: the job they are given, the rows, the clock, and what they report.

An arm is a program that takes the path of a job (JSON), trains its steps in the order of the rows, and writes what it
saw to the path that the job names. It depends on torch alone, so that it runs in any environment.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100


@dataclass
class Job:
    """One process's work.

    Attributes:
        rows: file of the rows, tokens and targets; ``first`` is the first one used.
        warmup, steps: steps that are not counted, then those that are.
        precision: of the whole arm, bf16 or fp32; settings: what sets variants of an arm apart.
        gradients: where the first step's gradients go, if they are asked for.
    """

    model: str
    adapter: str
    rows: str
    first: int
    batch: int
    warmup: int
    steps: int
    threads: int
    precision: str
    learning_rate: float
    clip: float
    result: str
    settings: dict[str, Any] = field(default_factory=dict)
    gradients: str | None = None

    @classmethod
    def read(cls) -> "Job":
        """The job that the command line names; sets the number of threads."""
        job = cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        torch.set_num_threads(job.threads)
        return job

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]

    def examples(self) -> list[dict[str, list[int]]]:
        """The rows of all steps of this process, in order: ``input_ids``, ``labels`` (not shifted, as usual in Hugging Face)."""
        with Path(self.rows).open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        count = self.batch * (self.warmup + self.steps)
        return [rows[(self.first + index) % len(rows)] for index in range(count)]


class Record:
    """The clock of an arm and its report. ``begin`` and ``end`` enclose each step."""

    def __init__(self, job: Job, trained: Mapping[str, nn.Parameter]) -> None:
        self.job, self.steps, self.divisor = job, [], 1
        self._silent, self._gradients = set(trained), {}
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._look(name, p))
            for name, p in trained.items()
        ]

    def _look(self, name: str, parameter: Tensor) -> None:
        """In the first step: which matrices have a gradient, and for the gate, a copy of it."""
        if parameter.grad is not None and parameter.grad.any():
            self._silent.discard(name)
        if self.job.gradients:
            self._gradients[name] = parameter.grad.detach().float().clone()

    def begin(self) -> None:
        self._others, self._began = others(), time.perf_counter()

    def end(self, loss: float, tokens: int, supervised: int) -> None:
        seconds, used = time.perf_counter() - self._began, others() - self._others
        step = {"seconds": seconds, "loss": loss, "tokens": tokens, "supervised": supervised, "others": used}
        self.steps.append(step)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.begin()

    def write(self, **more: Any) -> None:
        """Writes the report. ``divisor`` turns summed gradients into the mean's."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self.job.gradients:
            from safetensors.torch import save_file

            save_file({name: g.div_(self.divisor) for name, g in self._gradients.items()}, self.job.gradients)
        report = {"steps": self.steps, "silent": sorted(self._silent), "peak": peak, "threads": torch.get_num_threads()}
        Path(self.job.result).write_text(json.dumps(report | more), encoding="utf-8")


def others() -> float:
    """Processor seconds, of all cores, that this process did not get: used by others or taken by the host. Linux only."""
    if sys.platform != "linux":
        return 0.0
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's trainable matrices under the names that all arms use: ``model.layers.0.self_attn.q_proj.A``."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{path}.{factor[0]}"] = parameter
    return found
