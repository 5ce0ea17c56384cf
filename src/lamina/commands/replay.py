"""Runs a reference job again, mended, faithful, and mended with each of its faults by itself, and says what each fault did.

A is miniguanaco, the best-known Llama-2 notebook; B the KDnuggets article; C the project Lamina began with. Without --model they are
scaled down to the demo's base and data, some minutes on two cores. Flags hold for every variant. All are measured on the same held-out
rows. The folder, runs/replay-A-1 unless --out names another, holds a run for each variant, replay.json and the page replay.html."""

import argparse
import sys
from contextlib import closing
from pathlib import Path

from lamina import jobfile, settings
from lamina.commands.opening import named
from lamina.errors import ConfigError
from lamina.job import SECTIONS
from lamina.replaying import Replayed, replay, resume_replay
from lamina.report.console import Progress, clean, safe_json, table
from lamina.report.replay import COLUMNS, as_json, lines, rows
from lamina.training.loop import Step
from lamina.variants import LETTERS, pair

_WHOLE = {"": jobfile.Head, **SECTIONS}
_OWN = {"name", "commit"}  # decided by the replay


def arguments(parser: argparse.ArgumentParser) -> None:
    jobs = ", ".join(f"{letter} ({name})" for letter, name in LETTERS.items())
    parser.add_argument("letter", nargs="?", metavar="A|B|C", help=f"the reference job: {jobs}")
    parser.add_argument("--resume", metavar="REPLAY", type=named, help="go on with the replay in this folder")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object; the rest to stderr")
    settings.add_flags(parser, _WHOLE, without=_OWN)


def run(given: argparse.Namespace) -> None:
    flags = settings.read_flags(given, _WHOLE)
    if given.resume is None and given.letter is None:
        raise ConfigError("found no job, expected A, B or C: `lamina replay A`")
    if given.resume is not None and (given.letter is not None or any(flags.values.values())):
        raise ConfigError(f"found other settings beside --resume {given.resume}, expected none: it is the same replay")
    with closing(Progress(sys.stderr if given.json else sys.stdout)) as progress:
        show = _Brief(progress)
        if given.resume is not None:
            found = resume_replay(Path(given.resume), show)
        else:
            found = replay(given.letter, *pair(given.letter, flags), show)
    _print(found, given.json)


def _print(found: Replayed, machines: bool) -> None:
    entries = list(found.entries)
    if machines:
        print(safe_json({"folder": str(found.folder), "entries": as_json(entries)}))
        return
    print()
    table(COLUMNS, rows(entries), sys.stdout)
    print()
    print("\n".join(map(clean, lines(entries))))
    print(clean(f"\nThe replay is in {found.folder}: a run for each variant, replay.json and replay.html"))


class _Brief:
    """Shows steps on a terminal only: a log of a dozen runs would hold hardly anything else."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def line(self, text: str) -> None:
        self.progress.line(text)

    def start(self, steps: int, done: int) -> None:
        self.progress.start(steps, done)

    def step(self, step: Step) -> None:
        if self.progress.live:
            self.progress.step(step)

    def evaluation(self, step: int, loss: float) -> None: ...
