"""What a run that does not fit could change: each way with the memory it would need, the cheapest for the result first."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.data.render import Rendered
from lamina.job import Job
from lamina.training.loop import Examples

SHOWN = 3
SHORT = 64
"""Tokens below which no example is proposed to be cut."""
LOW_RANK = 8


@dataclass(frozen=True)
class Way:
    """A change of a job, as the flags that make it.

    Attributes:
        sections: other values for settings, by section.
        longest: tokens to which examples are cut; None leaves them.
    """

    flags: str = ""
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    longest: int | None = None

    def of(self, job: Job) -> Job:
        """The changed job."""
        return replace(job, **{name: replace(getattr(job, name), **values) for name, values in self.sections.items()})

    def __add__(self, other: "Way") -> "Way":
        names = [*self.sections, *(name for name in other.sections if name not in self.sections)]
        both = {name: {**self.sections.get(name, {}), **other.sections.get(name, {})} for name in names}
        return Way(f"{self.flags} {other.flags}".strip(), both, other.longest or self.longest)


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


def ways_out(job: Job, longest: int, needed: Callable[[Way], int], free: int) -> tuple[tuple[str, int], ...]:
    """The first few ways that fit, with the bytes they need; where too few do by themselves, all that are needed together.

    Args:
        longest: tokens of the longest example.
        needed: the bytes of the best plan for a changed job.
    """
    singles = list(_singles(job, longest))
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


def _singles(job: Job, longest: int) -> Iterator[Way]:
    """Changes in the order of what they cost the result: nothing, rounding, then what is learnt."""
    train = job.train
    if train.micro_batch_tokens is not None or train.checkpoint_layers is not None:
        flags = "--micro-batch-tokens none --checkpoint-layers none"
        yield Way(flags, {"train": {"micro_batch_tokens": None, "checkpoint_layers": None}})
    if train.optimizer == "adamw":
        yield Way("--optimizer adamw8bit", {"train": {"optimizer": "adamw8bit"}})
    if job.model.dtype == "fp32":
        base = {"base": None} if job.model.base == "fp32" else {}
        yield Way("--dtype bf16", {"model": {"dtype": "bf16", **base}})
    if job.model.form is None:
        yield Way("--base nf4", {"model": {"base": "nf4"}})
    if longest >= 2 * SHORT:
        yield Way(f"--max-length {longest // 2}", longest=longest // 2)
    if job.adapter.rank > LOW_RANK:
        yield Way(f"--rank {LOW_RANK}", {"adapter": {"rank": LOW_RANK, "rank_pattern": {}}})
    if longest >= 4 * SHORT:
        yield Way(f"--max-length {longest // 4}", longest=longest // 4)
