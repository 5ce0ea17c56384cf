"""Prints a complete job.toml, every setting under its documentation.

JOB is a built-in job or a job file to start from; without it, the reference job. Flags change settings on the way:
`lamina init demo --rank 4 > job.toml`."""

import argparse

from lamina import jobfile, settings
from lamina.job import SECTIONS

# Where a new job starts: the model and the data set that most tutorials use.
_REFERENCE = {"model.model": "NousResearch/Llama-2-7b-chat-hf", "data.data": "mlabonne/guanaco-llama2-1k"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB", help="the job to start from")
    settings.add_flags(parser, {"": jobfile.Head, **SECTIONS})


def run(given: argparse.Namespace) -> None:
    if given.job is None:
        given = argparse.Namespace(**(_REFERENCE | vars(given)))
    print(jobfile.dump(jobfile.load(given.job, SECTIONS, given)), end="")
