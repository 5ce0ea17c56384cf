"""Measures a run on its held-out rows, the untouched base beside the adapter.

Held-out loss, perplexity, how many answer tokens are predicted, how many answers are the data's and end by themselves."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from lamina import settings
from lamina.commands.opening import add_opening, open_given
from lamina.errors import CheckpointError
from lamina.evaluation import Evaluating
from lamina.opened import card_of
from lamina.report.console import before_after, safe_json

_MEASURES = {"evaluate": Evaluating}


def arguments(parser: argparse.ArgumentParser) -> None:
    add_opening(parser, "folder of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object, every answer in it")
    settings.add_flags(parser, _MEASURES)


def run(given: argparse.Namespace) -> None:
    changes = settings.read_flags(given, _MEASURES).values["evaluate"]
    if not (Path(given.run) / "job.toml").is_file():  # before a model is loaded for nothing
        raise CheckpointError(
            f"{given.run}: found no job.toml, expected the folder of a run, which says what is held out"
        )
    opened = open_given(given)
    assert opened.job is not None, "it has a job.toml"
    job = replace(opened.job, evaluate=replace(opened.job.evaluate, **changes))
    card = card_of(replace(opened, job=job))
    if given.json:
        print(safe_json(card.as_json()))
    else:
        before_after(card.table(), card.answers(), sys.stdout, card.lines())
