"""Writes the page of a run anew: report.html, one file with everything the run's folder holds, in words, tables and charts.

Every run writes it at its end. The page needs no network and no script; it opens from disk, prints, and can be sent. Nothing is
computed again: a chapter whose file is not in the folder says so."""

import argparse
from pathlib import Path

from lamina.commands.opening import named
from lamina.report.console import clean, safe_json
from lamina.reporting import report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=named, help="folder of a run")
    parser.add_argument("--out", metavar="FILE", type=named, help="the file; report.html in RUN if not given")
    parser.add_argument("--json", action="store_true", help="print the file's name as one JSON object")


def run(given: argparse.Namespace) -> None:
    path = report(Path(given.run), given.out and Path(given.out))
    print(safe_json({"report": str(path)}) if given.json else clean(f"wrote {path}"))
