"""Writes the base of a run with its adapter added to the weights: a plain model, which needs neither Lamina nor PEFT.

What it wrote is read again, layer by layer, and compared with base and adapter on held-out rows."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from lamina.commands.opening import add_opening, model_changes
from lamina.merging import merge
from lamina.report.console import clean, safe_json, table
from lamina.understand.proof import Policy


def arguments(parser: argparse.ArgumentParser) -> None:
    add_opening(parser, "folder of a run", as_trained=True)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the model, new or empty")
    parser.add_argument(
        "--policy",
        choices=get_args(Policy),
        help="what the update is added to: the weights as they are stored, those that training saw, or the former and "
        "quantised again; if unset, those that training saw",
    )
    parser.add_argument("--json", action="store_true", help="print the record as one JSON object")


def run(given: argparse.Namespace) -> None:
    record = merge(Path(given.run), Path(given.out), best=given.best, changes=model_changes(given), policy=given.policy)
    if given.json:
        print(safe_json({"folder": str(record.folder)} | record.as_json()))
    else:
        table(*record.table(), sys.stdout)
        print("\n".join(map(clean, record.lines())))
