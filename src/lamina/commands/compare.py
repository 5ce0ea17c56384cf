"""Puts the cards of finished runs side by side: the settings that differ, the measures, and their differences.

Nothing is computed anew and no model is loaded. Runs are compared with the first one named, where they were measured on
the same rows."""

import argparse
import sys

from lamina.commands.opening import named
from lamina.comparing import compare
from lamina.report.console import clean, safe_json, table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=named, nargs="+", help="folders of finished runs, two or more")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(given: argparse.Namespace) -> None:
    found = compare(given.runs)
    if given.json:
        print(safe_json(found.as_json()))
        return
    for number, (columns, rows) in enumerate(found.tables()):
        if number:
            print()
        table(columns, rows, sys.stdout)
    for note in found.notes:
        print(clean(note))
