"""Fine-tunes a model: a built-in job, a job file, or --model and --data; any setting of a job can be given as a flag.

Everything goes into one folder, runs/NAME-1 (2, 3, …) unless --out names another. An interrupted run is saved, and
`lamina train --resume RUN` goes on exactly where it stopped."""

import argparse
import sys
from contextlib import closing
from pathlib import Path

from lamina import jobfile, jobs, settings
from lamina.commands.opening import named
from lamina.errors import ConfigError, DataError
from lamina.job import SECTIONS, Job
from lamina.report.console import Progress, before_after, clean, safe_json
from lamina.run import CHANGEABLE, Result, fine_tune, resume


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB", help="a built-in job (see `lamina jobs`) or a job.toml")
    parser.add_argument(
        "--resume", metavar="RUN", type=named, help="go on with this run where its last saved state stands"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object; the rest to stderr")
    settings.add_flags(parser, {"": jobfile.Head, **SECTIONS})


def run(given: argparse.Namespace) -> None:
    with closing(Progress(sys.stderr if given.json else sys.stdout)) as progress:
        if given.resume is None:
            job = job_of(given)
            refuse_unwritten(given, job)
            result = fine_tune(job, progress)
        else:
            result = resume(Path(given.resume), _changes(given), progress)
    show(result, given.json)


def job_of(given: argparse.Namespace) -> Job:
    """The job that the arguments name, with their settings over it."""
    if given.job is None and not {"model.model", "data.data"} <= vars(given).keys():
        raise ConfigError(
            "found no job, expected a built-in one (`lamina train demo`), a job.toml (`lamina init` prints one), "
            "or both --model and --data"
        )
    job = Job.of(jobfile.load(given.job, SECTIONS, given))
    if "train.epochs" in vars(given) and job.train.steps is not None:
        beside = "--steps" if "train.steps" in vars(given) else f"the job's steps = {job.train.steps}"
        raise ConfigError(f"found --epochs beside {beside}, which decides alone; leave out one, or add --steps none")
    return job


def refuse_unwritten(given: argparse.Namespace, job: Job) -> None:
    """Tells how the file of a built-in job is written, where it has to be.

    Raises:
        DataError: it is not there.
    """
    if given.job in jobs.names() and "data.data" not in vars(given):
        data = Path(job.data.data)  # a job's file that the user has to write; those it ships are named otherwise
        if data.suffix == ".jsonl" and not job.data.data.startswith(jobs.PREFIX) and not data.exists():
            raise DataError(f"{data}: no such file; `lamina jobs {given.job}` prints the script that writes it")


def _changes(given: argparse.Namespace) -> dict[str, object]:
    """The settings that a resumed run changes: few, because it is to be the same run."""
    if given.job is not None:
        raise ConfigError(
            f"found both the job {given.job} and --resume {given.resume}, expected one: a run has its own job"
        )
    sections = {"": jobfile.Head, **SECTIONS}
    flags = settings.read_flags(given, sections).values
    changes = {name: value for section in flags.values() for name, value in section.items()}
    if fixed := [s.flag for s in settings.settings(sections) if s.name in changes.keys() - set(CHANGEABLE)]:
        allowed = ", ".join(s.flag for s in settings.settings(sections) if s.name in CHANGEABLE)
        raise ConfigError(
            f"found {', '.join(fixed)} with --resume, expected only {allowed}: a resumed run is the same run; "
            f"for another one: lamina train {Path(given.resume) / 'job.toml'} {fixed[0]} …"
        )
    return changes


def show(result: Result, as_json: bool) -> None:
    """Prints the card of a finished run."""
    if as_json:
        print(safe_json({"folder": str(result.folder), "card": result.card.as_json()}))
    else:
        card = result.card
        before_after(card.table(), card.answers(), sys.stdout, card.lines())
        print(clean(f"\nThe run is in {result.folder}. Go on with: lamina chat {result.folder}"))
