"""Says what a job will need before anything large is loaded, or fetched from the hub: memory item by item, and time from timing one
layer here.

The data are read and tokenised, so that the plan is made for the longest batch that the run will really meet."""

import argparse

from lamina import jobfile, settings
from lamina.commands.train import job_of, refuse_unwritten
from lamina.job import SECTIONS, base_folder, check, prepare_data
from lamina.model.tokenizer import load_tokenizer
from lamina.planning import plan_run
from lamina.report.console import clean, safe_json


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB", help="a built-in job (see `lamina jobs`) or a job.toml")
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object, sizes in bytes")
    settings.add_flags(parser, {"": jobfile.Head, **SECTIONS})


def run(given: argparse.Namespace) -> None:
    job = job_of(given)
    refuse_unwritten(given, job)
    base = base_folder(job.model, weights=False)
    check(job, base)
    planned = plan_run(job, base, prepare_data(job, base, load_tokenizer(base)))
    if given.json:
        print(safe_json(planned.as_json()))
    else:
        print("\n".join(map(clean, planned.lines())))
    planned.check()
