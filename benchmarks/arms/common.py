"""What all arms share: the job they are given, the rows, the clock, and what they report.

An arm is a program that takes the path of a job (JSON), trains its steps in the order of the rows, and writes what it
saw to the path that the job names. It depends on torch alone, so that it runs in any environment.

``Record`` is called at the begin and at the end of each step, and does the rest: times the step, keeps what the gates ask of the
first one, evaluates the held-out rows where a loss is to be reached (the clock stands meanwhile, and every arm's model is evaluated by
the same code, row by row), and lets one more step, which is not counted, run under the profiler.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
GEMMS = {
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::mkldnn_linear",
    "aten::_int_mm",
    "aten::_scaled_mm",
}
# Where Lamina's own kernels are told to the profiler.
GEMMS |= {"lamina::products", "lamina::few_products", "lamina::integer_products"}
GEMMS |= {"aten::mkldnn_convolution", "aten::convolution_backward"}  # litgpt multiplies by B as a convolution
Row = dict[str, list[int]]


@dataclass
class Job:
    """One process's work.

    Attributes:
        rows: file of the rows, tokens and targets; ``first`` is the first one used.
        warmup, steps: steps that are not counted, then those that are.
        precision: of the whole arm, bf16 or fp32; settings: what sets variants of an arm apart.
        gradients: where the first step's gradients go, if they are asked for.
        profile: one step more, under the profiler.
        held_out: rows on which the loss is measured after every step; ``until``: the loss at which the process ends.
        spawned: the moment its parent started it, in Unix time.
        device: cpu or cuda.
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
    profile: bool = False
    held_out: str | None = None
    until: float | None = None
    spawned: float = field(default_factory=time.time)
    device: str = "cpu"

    @classmethod
    def read(cls) -> "Job":
        """The job that the command line names; sets the number of threads, and that fp32 is fp32 in convolutions too."""
        job = cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        torch.set_num_threads(job.threads)
        if job.precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # on a GPU torch rounds them by itself, and litgpt's B is one
        return job

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]

    @property
    def all_steps(self) -> int:
        """Steps of the process, counted or not."""
        return self.warmup + self.steps + self.profile

    def examples(self) -> list[Row]:
        """The rows of all steps of this process, in order: ``input_ids``, ``labels`` (not shifted, as usual in Hugging Face).

        Those of a step come longest first: it is the same step, and whoever pads some rows at a time pads least.
        """
        rows, ordered = read_rows(self.rows), []
        for first in range(self.first, self.first + self.batch * self.all_steps, self.batch):
            step = [rows[index % len(rows)] for index in range(first, first + self.batch)]
            ordered += sorted(step, key=lambda row: -len(row["input_ids"]))
        return ordered

    def batches(self) -> Iterator[list[Row]]:
        """The rows of each step."""
        rows = self.examples()
        for first in range(0, len(rows), self.batch):
            yield rows[first : first + self.batch]

    def mixed(self) -> AbstractContextManager[Any]:
        """Autocast, where the settings ask for it."""
        asked = self.settings.get("autocast") and self.precision == "bf16"
        return torch.autocast(self.device, torch.bfloat16) if asked else nullcontext()


def read_rows(path: str) -> list[Row]:
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@dataclass(frozen=True)
class Part:
    """An adapter's matrix inside a parameter: these rows of it, in this order; all, where no rows are named."""

    parameter: nn.Parameter
    rows: slice | Tensor = field(default_factory=lambda: slice(None))


class Record:
    """The clock of an arm and its report. ``begin`` and ``end`` enclose each step.

    Args:
        trained: the adapter's matrices under the names that all arms use: ``model.layers.0.self_attn.q_proj.A``.
        logits: computes the model's logits [1, T, V] of tokens [1, T].
        versions: of the packages that matter.
    """

    def __init__(
        self,
        job: Job,
        trained: Mapping[str, nn.Parameter | Part],
        logits: Callable[[Tensor], Tensor],
        versions: dict[str, str],
    ) -> None:
        self.job, self.logits, self.versions = job, logits, versions
        self.steps: list[dict[str, Any]] = []
        self.held_out: list[float] = []
        self.divisor, self.peak, self.gemm_share, self._stood = 1, 0, None, 0.0
        self._profiler: Any = None
        forget_peak(job.device)  # of training: how an arm's weights came there says nothing of its tool
        parts = {name: part if isinstance(part, Part) else Part(part) for name, part in trained.items()}
        self._silent, self._gradients = set(parts), {}
        self._handles = [
            part.parameter.register_post_accumulate_grad_hook(lambda _, name=name, part=part: self._look(name, part))
            for name, part in parts.items()
        ]

    def _look(self, name: str, part: Part) -> None:
        """In the first step: which matrices have a gradient, and for the gate, a copy of it, summed over micro-batches."""
        gradient = part.parameter.grad[part.rows]
        if gradient.any():
            self._silent.discard(name)
        if self.job.gradients:
            self._gradients[name] = gradient.detach().float().cpu().clone()

    def begin(self) -> None:
        if self.job.profile and len(self.steps) == self.job.warmup + self.job.steps and not self._profiler:
            self._profiler = torch.profiler.profile()
            self._profiler.__enter__()
        self._wait()
        self._others, self._began = others(), time.perf_counter()

    def end(self, loss: float, tokens: int, supervised: int) -> None:
        self._wait()
        seconds, used = time.perf_counter() - self._began, others() - self._others
        if self._profiler:
            self._profiler.__exit__(None, None, None)
            spent, self._profiler = gemm_seconds(self._profiler, self.job.device), None
            self.gemm_share = spent / seconds if spent else None
            return
        step = {"seconds": seconds, "loss": loss, "tokens": tokens, "supervised": supervised, "others": used}
        self.steps.append(step | {"since_start": time.time() - self.job.spawned - self._stood})
        self.peak = peak(self.job.device)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.job.held_out:
            self._evaluate(self.job.held_out)
        self.begin()

    def _evaluate(self, file: str) -> None:
        """Measures the held-out loss while the clock stands; ends the process when it is low enough."""
        began = time.time()
        self.held_out.append(held_out_loss(self.logits, read_rows(file), self.job.device))
        self._stood += time.time() - began
        if self.job.until is not None and self.held_out[-1] <= self.job.until:
            self.write()
            raise SystemExit(0)

    def _wait(self) -> None:
        if self.job.device != "cpu":
            torch.cuda.synchronize()

    def write(self) -> None:
        """Writes the report. ``divisor`` turns summed gradients into the mean's."""
        if self.job.precision == "fp32":
            assert torch.get_float32_matmul_precision() == "highest", "a product in fp32 was rounded to TF32"
        if self.job.gradients:
            from safetensors.torch import save_file

            save_file({name: g.div_(self.divisor) for name, g in self._gradients.items()}, self.job.gradients)
        report = {"steps": self.steps, "silent": sorted(self._silent), "peak": self.peak}
        report |= {"held_out": self.held_out, "gemm_share": self.gemm_share}
        report |= {"threads": torch.get_num_threads(), "versions": {"torch": torch.__version__} | self.versions}
        Path(self.job.result).write_text(json.dumps(report), encoding="utf-8")


@torch.no_grad()
def held_out_loss(logits: Callable[[Tensor], Tensor], rows: list[Row], device: str) -> float:
    """Mean -log p over the targets of all rows, each computed by itself, in fp32 from the arm's logits."""
    total, count = 0.0, 0
    for row in rows:
        tokens, labels = (torch.tensor([row[name]], device=device) for name in ("input_ids", "labels"))
        total += float(F.cross_entropy(logits(tokens)[0, :-1].float(), labels[0, 1:], reduction="sum"))
        count += int((labels[0, 1:] != IGNORED).sum())
    return total / count


def gemm_seconds(profiler: Any, device: str = "cpu") -> float:
    """Seconds inside matrix products, attention's own not counted; on a GPU those of the kernels that they started."""
    own = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    return sum(getattr(e, own) for e in profiler.key_averages() if e.key in GEMMS) / 1e6


def forget_peak(device: str) -> None:
    """Lets the peak begin anew."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(OSError):  # where /proc cannot be written the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(device: str) -> int:
    """Most memory since the peak was forgotten, in bytes: resident of the process, or on a GPU its allocations there.

    Linux hands on the ``ru_maxrss`` of whoever starts a process, so its own mark is asked there.
    """
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def resident(field: str) -> int:
    """Resident bytes of this process: ``VmRSS`` now, ``VmHWM`` at most. Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def others() -> float:
    """Processor seconds, of all cores, that this process did not get: used by others or taken by the host. Linux only."""
    if sys.platform != "linux":
        return 0.0
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}  # a container may see the cores of its host
    with Path("/proc/stat").open() as lines:
        cores = [[int(word) for word in line.split()[1:9]] for line in lines if line.split(maxsplit=1)[0] in mine]
    busy = sum(sum(core) - core[3] - core[4] for core in cores)  # all but idle and waiting for a disk
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def length(rows: list[Row]) -> int:
    """Tokens of some rows."""
    return sum(len(row["input_ids"]) for row in rows)


def supervised(rows: list[Row]) -> int:
    """Targets of some rows, counted as they lie in them."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's trainable matrices under the names that all arms use."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{path}.{factor[0]}"] = parameter
    return found


@torch.no_grad()
def fill(parts: Mapping[str, Part], adapter: str) -> None:
    """Writes the adapter that all arms begin with, a folder in PEFT's format, into a model of other names."""
    from safetensors.torch import load_file

    matrices = load_file(Path(adapter) / "adapter_model.safetensors")
    for name, part in parts.items():
        path, factor = name.rsplit(".", 1)
        part.parameter[part.rows] = matrices.pop(f"base_model.model.{path}.lora_{factor}.weight").to(part.parameter)
    assert not matrices, f"matrices without a place: {list(matrices)}"


def rank_and_scale(adapter: str) -> tuple[int, float]:
    """Rank and alpha of an adapter's folder."""
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    return config["r"], config["lora_alpha"]
