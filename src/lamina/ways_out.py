"""What a run that does not fit could change: each way with the memory it would need, the cheapest for the result first."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.data.render import Rendered
from lamina.job import Job
from lamina.training.loop import Examples
from lamina.training.optimizer import Kind

SHOWN = 3
SHORT = 64
"""Tokens below which no example is proposed to be cut."""
LOW_RANK = 8
LEANER: dict[str, dict[Kind, tuple[Kind, ...]]] = {
    "cpu": {"adamw": ("adamw8bit",)},
    "cuda": {
        "adamw": ("paged-adamw", "paged-adamw8bit"),
        "adamw8bit": ("paged-adamw8bit",),
        "paged-adamw": ("paged-adamw8bit",),
    },
}
"""Optimisers that take less memory, those first that round nothing."""


@dataclass(frozen=True)
class Way:
    """A change of a job.

    Attributes:
        options: the flags that make it, with their values; nothing, where a flag takes none.
        sections: other values for settings, by section.
        longest: tokens to which examples are cut; None leaves them.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    longest: int | None = None

    @property
    def flags(self) -> str:
        """The flags in a line."""
        return " ".join(f"{flag} {value}".rstrip() for flag, value in self.options.items())

    def of(self, job: Job) -> Job:
        """The changed job."""
        return replace(job, **{name: replace(getattr(job, name), **values) for name, values in self.sections.items()})

    def __add__(self, other: "Way") -> "Way":
        names = [*self.sections, *(name for name in other.sections if name not in self.sections)]
        both = {name: {**self.sections.get(name, {}), **other.sections.get(name, {})} for name in names}
        return Way({**self.options, **other.options}, both, other.longest or self.longest)


class Cut:
    """Examples cut to a length, every token of them learnt: for their memory only."""

    def __init__(self, examples: Examples, lengths: NDArray[np.int64], most: int) -> None:
        self.examples, self.most = examples, most
        self.lengths = np.minimum(lengths, most)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Rendered:
        """The beginning of the example at ``index``."""
        example = self.examples[index]
        tokens = example.tokens[: self.most]
        return Rendered(tokens, np.ones(len(tokens), dtype=np.bool_), example.row)


def ways_out(ways: Iterable[Way], needed: Callable[[Way], int], free: int) -> tuple[tuple[str, int], ...]:
    """The first few ways that fit, with the bytes they need; where too few do by themselves, all that are needed together.

    Args:
        needed: the bytes of the best plan for a changed job.
    """
    singles = list(ways)
    found = [(way.flags, size) for way in singles if (size := needed(way)) <= free]
    together = Way()
    for way in singles:
        together += way
        if len(found) >= SHOWN:
            break
        if together.flags != way.flags and (size := needed(together)) <= free:
            found.append((together.flags, size))
            break
    return tuple(found[:SHOWN])


def of_run(job: Job, device: str, layers: int | None = None) -> Iterator[Way]:
    """Changes of a run that goes on: those that leave it the same run.

    Args:
        layers: how many are to be computed twice; None lets the plan choose as few as fit.
    """
    if job.train.checkpoint_layers != layers:
        number = "none" if layers is None else str(layers)
        yield Way({"--checkpoint-layers": number}, {"train": {"checkpoint_layers": layers}})
    yield from _offloading(job, device)


def of_job(job: Job, longest: int, device: str, plain: bool) -> Iterator[Way]:
    """Changes in the order of what they cost the result: nothing, rounding, then what is learnt.

    Args:
        longest: tokens of the longest example.
        plain: whether the checkpoint stores numbers, which can be quantised; what is stored quantised stays as it is.
    """
    train, model = job.train, job.model
    if train.micro_batch_tokens is not None or train.checkpoint_layers is not None:
        both = {"micro_batch_tokens": None, "checkpoint_layers": None}
        yield Way({"--micro-batch-tokens": "none", "--checkpoint-layers": "none"}, {"train": both})
    yield from _offloading(job, device)
    for kind in LEANER.get(device, {}).get(train.optimizer, ()):
        yield Way({"--optimizer": kind}, {"train": {"optimizer": kind}})
    if model.dtype == "fp32":
        values = {"dtype": "bf16"} | ({"base": "bf16"} if model.base == "fp32" else {})  # which must agree
        yield Way({f"--{name}": value for name, value in values.items()}, {"model": values})
    if plain and model.form in (None, "int8", "fp8"):
        yield Way({"--base": "nf4"}, {"model": {"base": "nf4"}})
    if longest >= 2 * SHORT:
        yield _cut(longest // 2)
    if job.adapter.rank > LOW_RANK:
        yield Way({"--rank": str(LOW_RANK)}, {"adapter": {"rank": LOW_RANK}})
    if longest >= 4 * SHORT:
        yield _cut(longest // 4)


def _offloading(job: Job, device: str) -> Iterator[Way]:
    """The inputs of checkpointed layers in the host's memory, where that is another."""
    if device == "cuda" and not job.train.offload_checkpoints:
        yield Way({"--offload-checkpoints": ""}, {"train": {"offload_checkpoints": True}})


def _cut(longest: int) -> Way:
    return Way({"--max-length": str(longest)}, longest=longest)
