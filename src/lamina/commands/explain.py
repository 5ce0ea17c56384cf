"""Explains what an adapter is: its size, its rank, where it sits, and which lower rank would have done.

RUN or ADAPTER is the folder of a run, or of any LoRA adapter in PEFT's format. Beside its base (a run's own, or --base) it is
also said how large the update is against the weights, along which of their directions it lies, and how many intruder dimensions
it made. Without the base, rank 64 on all linears of a 7B model takes about a minute on two cores; beside it, some minutes more;
with --exact, two dense SVDs of every matrix, which are hours."""

import argparse
import sys

from lamina import settings
from lamina.commands.opening import named
from lamina.errors import ConfigError
from lamina.explaining import explain, shrink
from lamina.model.weights import ModelSettings
from lamina.report.console import clean, safe_json, table

_MODEL = {"model": ModelSettings}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN|ADAPTER", type=named, help="folder of a run, or of a LoRA adapter")
    parser.add_argument("--base", type=named, metavar="MODEL", help="base to compare with, instead of the run's own")
    parser.add_argument("--best", action="store_true", help="the run's best adapter instead of its last")
    parser.add_argument(
        "--exact", action="store_true", help="decompose the base's matrices fully, large ones too (7B: hours)"
    )
    parser.add_argument("--no-losses", action="store_true", help="leave out the held-out losses at lower ranks")
    parser.add_argument("--save-rank", type=_rank, metavar="K", help="only write the adapter at a lower rank, to --out")
    parser.add_argument("--out", metavar="DIR", type=named, help="folder for it, new or empty")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    settings.add_flags(parser, _MODEL, without={"model", "base", "revision"})


def run(given: argparse.Namespace) -> None:
    if (given.save_rank is None) != (given.out is None):
        raise ConfigError("--save-rank and --out belong together: which rank, and where to write it")
    if given.save_rank is not None:
        _shrink(given)
        return
    found = explain(
        given.run,
        given.base,
        best=given.best,
        exact=given.exact,
        losses=not given.no_losses,
        changes=settings.read_flags(given, _MODEL).values["model"],
    )
    if given.json:
        print(safe_json(found.as_json()))
        return
    print("\n".join(map(clean, found.lines())))
    for heading, columns, rows in found.tables():
        print(f"\n{heading}")
        table(columns, rows, sys.stdout)


def _shrink(given: argparse.Namespace) -> None:
    written = shrink(given.run, given.save_rank, given.out, best=given.best)
    if given.json:
        print(safe_json({"folder": str(written.folder), "rank": written.rank, "energy": written.energy}))
    else:
        print(
            clean(
                f"wrote the adapter at rank {written.rank}, which keeps {written.energy:.1%} of ‖ΔW‖²: {written.folder}"
            )
        )


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an integer ≥ 1")
    return int(text)
