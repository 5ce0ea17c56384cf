"""Examines a job before it is trained: settings, the base's config and tokenizer, the data, the memory. Loads no weights.

Every finding says what was found, why it matters, how to mend it, and in which rows. Exit status 2 where there are errors: the run
would be refused, or could not give what it is for. At the end stand two rows as the model sees them, token by token."""

import argparse
import sys
from collections.abc import Iterator
from itertools import islice

from rich.text import Text

from lamina import jobfile, settings
from lamina.commands.train import job_of, refuse_unwritten
from lamina.doctor.checkup import Checkup, check
from lamina.doctor.finding import Diagnosis, Finding
from lamina.doctor.salvage import salvaged
from lamina.doctor.shown import example, legend, told
from lamina.errors import ConfigError, DataError
from lamina.job import SECTIONS, Job
from lamina.report.console import clean, safe_json, say, table

EXAMPLES = 2


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB", help="a built-in job (see `lamina jobs`) or a job.toml")
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    settings.add_flags(parser, {"": jobfile.Head, **SECTIONS})


def run(given: argparse.Namespace) -> None:
    job, refused = _read(given)
    found = check(job)
    kept = [finding for finding in found.diagnosis.findings if not (finding.rule == "data" and refused)]
    diagnosis = Diagnosis.of([*refused, *kept], found.diagnosis.lengths)
    if given.json:
        print(safe_json(diagnosis.as_json()))
    else:
        _show(diagnosis, found)
    if errors := diagnosis.graded("error"):
        names = ", ".join(dict.fromkeys(finding.rule for finding in errors))
        raise ConfigError(
            f"{job.head.name}: found {diagnosis.summary()} ({names}), expected no errors; mend them as told above"
        )


def _read(given: argparse.Namespace) -> tuple[Job, list[Finding]]:
    """The job, without what is wrong in its settings, and that as findings.

    Raises:
        ConfigError: too little of it is left to be examined.
    """
    try:
        job = job_of(given)
        refuse_unwritten(given, job)
    except DataError as error:
        found, _, mend = str(error).partition("; ")
        return job, [Finding("data", "error", found, "the run would be refused", mend)]
    except ConfigError as error:
        rest, problems = salvaged(given.job, given)
        if rest is None:
            raise
        told = [str(error), *(problem for problem in problems if problem.split(": ", 1)[1] not in str(error))]
        mend = "correct or remove it; the other findings are those of the job without it"
        return rest, [Finding("settings", "error", problem, "the run would be refused", mend) for problem in told]
    return job, []


def _show(diagnosis: Diagnosis, found: Checkup) -> None:
    """Prints the account of the data, what each length would lose, the findings, and the examples."""
    if found.data:
        print("\n".join(map(clean, found.data.report.lines())))
    if any(cut.rows for cut in diagnosis.lengths):
        print("\nrows cut at the end would lose:")
        columns = ("at tokens", "rows", "tokens", "answers cut", "answers lost")
        table(columns, ([f"{number:,}" for number in cut] for cut in diagnosis.lengths), sys.stdout)
    print()
    say(told(diagnosis), sys.stdout)
    print(diagnosis.summary())
    if found.data:
        print()
        say(_examples(found), sys.stdout)


def _examples(found: Checkup) -> Iterator[Text]:
    assert found.data is not None, "asked for where there are data"
    coloured = sys.stdout.isatty()
    if coloured:
        yield legend()
    for row in islice(found.data.train, EXAMPLES):
        yield example(row, found.tokenizer, coloured)
