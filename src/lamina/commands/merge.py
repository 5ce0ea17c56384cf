"""Writes the base of a run with its adapter added to the weights: a plain model, which needs neither Lamina nor PEFT.

What it wrote is read again, layer by layer, and compared with base and adapter on held-out rows."""

import argparse
from pathlib import Path

from lamina.commands.opening import add_opening, model_changes
from lamina.merging import merge
from lamina.report.console import clean, safe_json


def arguments(parser: argparse.ArgumentParser) -> None:
    add_opening(parser, "folder of a run")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the model, new or empty")
    parser.add_argument("--json", action="store_true", help="print the record as one JSON object")


def run(given: argparse.Namespace) -> None:
    record = merge(Path(given.run), Path(given.out), best=given.best, changes=model_changes(given))
    if given.json:
        print(safe_json({"folder": str(record.folder)} | record.as_json()))
    else:
        print("\n".join(map(clean, record.lines())))
