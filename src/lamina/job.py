"""A job: everything that decides a run, as sections of settings, and how it lies in a file."""

import contextlib
import dataclasses
import hashlib
import itertools
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from lamina import jobfile, jobs
from lamina.adapter import LoRA, choose
from lamina.data.examples import DataSettings
from lamina.data.faults import Faults
from lamina.data.prepare import Prepared, prepare
from lamina.data.problems import Problems
from lamina.errors import CheckpointError, ConfigError, DataError, ModelError
from lamina.evaluation import Evaluating
from lamina.generation import Sampling
from lamina.jobfile import Head
from lamina.model.architecture import read_config
from lamina.model.decoder import Decoder
from lamina.model.locate import locate
from lamina.model.outline import outline
from lamina.model.weights import ModelSettings, pick_device
from lamina.section import section
from lamina.training.loop import Training
from lamina.training.optimizer import check_pages
from lamina.training.order import Order, by_length, shuffled


@section
class Watching:
    """What happens between the steps: evaluating, saving, stopping early."""

    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations on the held-out rows; unset: five over the run. The base is always evaluated first, and
    the adapter at the end."""

    save_every: Annotated[int, Field(ge=1)] = 50
    """Steps between saves of the adapter and of everything that resuming needs; the end and an interrupt save too."""

    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations without a better one; unset: never."""

    ledger_every: Annotated[int, Field(ge=0)] = 1
    """Steps between entries of the ledger, which says of every adapted matrix how large it is and how it moves; 0: none."""

    samples: Annotated[int, Field(ge=0)] = 2
    """Held-out prompts that are answered (greedily) at every evaluation, so that one sees the answers change; 0: none."""

    sample_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens of such an answer at most."""


SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "data": DataSettings,
    "adapter": LoRA,
    "train": Training,
    "watch": Watching,
    "evaluate": Evaluating,
    "generate": Sampling,
    "faults": Faults,
}


@dataclass(frozen=True)
class Job:
    """Everything that decides a run."""

    model: ModelSettings
    data: DataSettings
    adapter: LoRA = field(default_factory=LoRA)
    train: Training = field(default_factory=Training)
    watch: Watching = field(default_factory=Watching)
    evaluate: Evaluating = field(default_factory=Evaluating)
    generate: Sampling = field(default_factory=Sampling)
    faults: Faults = field(default_factory=Faults)
    head: Head = field(default_factory=Head)

    @classmethod
    def of(cls, sections: Mapping[str, Any]) -> "Job":
        """The job of sections by name, as ``jobfile.load`` returns them."""
        return cls(**{name or "head": made for name, made in sections.items()})

    def sections(self) -> dict[str, Any]:
        """The sections by name, as ``jobfile.dump`` takes them."""
        return {"": self.head, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "head"}}


def read_job(folder: Path) -> Job:
    """The job of a run folder.

    Raises:
        CheckpointError: the folder is not a run's.
    """
    if not (folder / "job.toml").is_file():
        raise CheckpointError(f"{folder}: found no job.toml, expected the folder of a run")
    return Job.of(jobfile.load(str(folder / "job.toml"), SECTIONS))


def base_folder(model: ModelSettings, weights: bool = True) -> Path:
    """Where the files of the base are, or without ``weights`` an outline of them; a model that is shipped with Lamina
    has a name of its own."""
    if model.model.startswith(jobs.PREFIX):
        return jobs.path(model.model)
    return (locate if weights else outline)(model.model, model.revision)


@contextlib.contextmanager
def elsewhere(run: Path | None, model: str = "--model", data: str = "") -> Iterator[None]:
    """Where a run's base or data are not found, says how their new place is named; nothing of what is no run.

    Args:
        model: the flag for the base.
        data: the flags for the data; if empty, they are named in the run's ``job.toml``.
    """
    try:
        yield
    except ModelError as error:
        if run is None:
            raise
        raise ModelError(f"{error}; if the base of {run} lies elsewhere now, name its place as {model}") from None
    except DataError as error:
        if run is None:
            raise
        data = data or f"data or eval_data in {run / 'job.toml'}"
        raise DataError(f"{error}; if the data of {run} lie elsewhere now, name their place as {data}") from None


def shipped_path(name: str) -> Path:
    """The place of a file that the job names: shipped with Lamina, or the user's."""
    return jobs.path(name) if name.startswith(jobs.PREFIX) else Path(name)


def check(job: Job, base: Path) -> None:
    """Refuses, before anything large is read, what the model's config alone shows to be impossible.

    Raises:
        ConfigError: no such device; a paged optimiser without a GPU; a target, layer or rank that does not fit; more checkpointed
            layers than there are.
    """
    check_pages(job.train.optimizer, pick_device(job.model.device))
    architecture = read_config(base)
    with torch.device("meta"):
        choose(Decoder(architecture), job.adapter)
    if (job.train.checkpoint_layers or 0) > architecture.layers:
        raise ConfigError(
            f"train.checkpoint_layers: found {job.train.checkpoint_layers}, expected at most {architecture.layers}, "
            f"the layers of the model"
        )


def prepare_data(job: Job, base: Path, tokenizer: Any, problems: Problems | None = None) -> Prepared:
    """Reads a job's data: the same rows are held out whenever it is called; ``problems`` as in ``prepare``."""
    a = read_config(base)
    prepared = prepare(
        shipped(job.data),
        tokenizer,
        job.head.seed,
        vocabulary=a.vocabulary,
        max_position=a.max_position,
        problems=problems,
        faults=job.faults,
    )
    report = replace(prepared.report, source=job.data.data, held_out_source=job.data.eval_data or "")
    return replace(prepared, report=report)  # named as the job names them, not by where a shipped file lies


def order_of(job: Job, lengths: NDArray[np.int64]) -> Order:
    """The order in which a job's training examples, of these lengths, are met: the place for a curriculum of a whole run."""
    return by_length(lengths, job.train.batch_size) if "by-length" in job.faults.commit else shuffled


_MEASURED = {"evaluate", "generate", "watch.ledger_every", "watch.samples", "watch.sample_tokens"}
"""Sections and settings that decide what is seen of an adapter, and nothing of what it becomes."""


PLACES = ("model", "revision", "data", "data_revision", "eval_data")
"""Settings that say where base and data lie; what lies there has fingerprints of its own."""


def settings_fingerprint(job: Job, without: Collection[str]) -> str:
    """A hash of all settings that decide what is trained: not where it, its base and its data lie, nor what is measured
    of it, nor those named in ``without``, nor what is at its default, so that a setting that a later version adds does not make
    a run another one."""
    deciding = {
        f"{name}.{f.name}": getattr(section, f.name)
        for name, section in job.sections().items()
        for f in fields(section)
        if f.name not in {"out", "name", *PLACES, *without}
        and not _MEASURED & {name, f"{name}.{f.name}"}
        and getattr(section, f.name) != _default(f)
    }
    return hashlib.sha256(repr(sorted(deciding.items())).encode()).hexdigest()


def _default(of: dataclasses.Field[Any]) -> Any:
    return of.default if of.default_factory is MISSING else of.default_factory()


def shipped(data: DataSettings) -> DataSettings:
    """The data with names of shipped files resolved; the saved job keeps the names, which mean the same everywhere."""
    held_out = data.eval_data and str(shipped_path(data.eval_data))
    return replace(data, data=str(shipped_path(data.data)), eval_data=held_out)


def new_folder(head: Head) -> Path:
    """Makes the folder of a new run: the one named, new or empty, or the next free ``runs/<name>-<n>``.

    Raises:
        CheckpointError: the named folder holds something, or cannot be made.
    """
    folders = (
        [Path(head.out)] if head.out else (Path("runs") / f"{head.name}-{number}" for number in itertools.count(1))
    )
    for folder in folders:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if head.out and folder.is_dir() and not any(folder.iterdir()):
                return folder
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be made ({error.strerror}); name another place as --out") from None
        else:
            return folder
    assert head.out is not None, "of the others one is free"
    if not Path(head.out).is_dir():
        raise CheckpointError(f"{head.out}: is a file, expected a folder, new or empty; name another --out")
    run = (Path(head.out) / "job.toml").is_file()
    go_on = f"to go on with the run in it: lamina train --resume {head.out}; for a new one " if run else ""
    raise CheckpointError(f"{head.out}: is not empty; {go_on}name another --out")


def take_back(folder: Path, given: bool) -> None:
    """Removes what a run left in its new folder that never began, and the folder, if it was not there before (``given``)."""
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    if not given:
        folder.rmdir()
