"""From the command to the first step: what a person waits before `lamina train` learns anything, and where that goes.

The job is 1,000 rows of guanaco with Llama-2's tokenizer on a random model of 15 M parameters in fp16; all else is at its
defaults, so a twentieth of the rows is held out and evaluated before the first step. Each measurement is the command in a process of
its own. Its end is the line of the first step in ``metrics.jsonl``; its processor time is what Linux counts for the process then.
The first run warms the page cache and Python's bytecode, and does not count.

Then the parts, in one process more, in seconds of processor time: they are what can be compared where other programs run
beside, and what does not become less with more threads is the imports. ``--tiny`` is one round, and writes nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import checkpoint
import machine
import results
from workload import DATA, Shape

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "startup_cpu.csv"
FIFTEEN_M = Shape(width=192, layers=6, mlp=512, heads=6, vocabulary=32_000)
PARTS = ("imports", "check", "tokenizer", "data", "plan", "load", "optimiser", "rehearsal", "evaluation", "first step")
FIELDS = ["date", "commit", "versions", "machine", "threads", "seconds", "cpu_seconds", *PARTS, "others"]


def base(build: Path) -> Path:
    """The model with the tokenizer's files beside it."""
    folder = checkpoint.write(build, FIFTEEN_M)
    for file in (DATA / "llama2-tokenizer").glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def command(folder: Path, out: Path) -> list[str]:
    data = str(DATA / "guanaco-llama2-1k")
    return ["train", "--model", str(folder), "--data", data, "--steps", "2", "--eval-samples", "0", "--out", str(out)]


def measure(folder: Path, threads: int) -> dict[str, float]:
    """One run of the command, ended after its first step."""
    sys.path.insert(0, str(HERE / "arms"))
    from common import others

    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        before, began = others(), time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "lamina", *command(folder, out)], env=environment, stdout=subprocess.DEVNULL
        )
        while not _stepped(out / "metrics.jsonl"):
            if child.poll() is not None:
                raise SystemExit("the run ended before its first step")
            time.sleep(0.01)
        seconds, used = time.perf_counter() - began, _processor(child.pid)
        busy = max(0.0, others() - before - used) / seconds / machine.cores()
        child.kill()
        child.wait()
    return {"seconds": seconds, "cpu_seconds": used, "others": busy}


def _stepped(metrics: Path) -> bool:
    return metrics.exists() and any('"loss"' in line for line in metrics.read_text(encoding="utf-8").splitlines())


def _processor(pid: int) -> float:
    """Seconds of processor time of a running process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Parts:
    """Processor time by part, between one place that is reached and the next; it stands where a run tells what it does."""

    def __init__(self) -> None:
        self.spent, self.last = dict.fromkeys(PARTS, 0.0), 0.0

    def reached(self, part: str) -> None:
        """What was spent since the place before belongs to this part."""
        now = time.process_time()
        self.spent[part] += now - self.last
        self.last = now

    def around(self, part: str, function: Any) -> Any:
        """A function that ends a part."""

        def call(*given: Any, **named: Any) -> Any:
            result = function(*given, **named)
            self.reached(part)
            return result

        return call

    def line(self, text: str) -> None:
        if text.startswith("the heaviest micro-batch"):
            self.reached("rehearsal")

    def start(self, steps: int, done: int) -> None:
        self.reached("load")

    def evaluation(self, step: int, loss: float) -> None:
        self.reached("evaluation")

    def step(self, step: Any) -> None:
        self.reached("first step")
        raise KeyboardInterrupt


def parts(folder: Path) -> dict[str, float]:
    """Processor time of each part up to the first step, by what ``lamina.run`` calls and tells."""
    from lamina.process import prepare

    prepare()
    from lamina import run as running
    from lamina.cli import parser_of
    from lamina.commands import train

    found = Parts()
    names = {"check": "check", "load_tokenizer": "tokenizer", "prepare_data": "data", "plan_run": "plan"}
    for name, part in (names | {"attach": "load", "start": "optimiser"}).items():
        setattr(running, name, found.around(part, getattr(running, name)))
    with tempfile.TemporaryDirectory() as place:
        job = train.job_of(parser_of("train", train).parse(command(folder, Path(place) / "run")[1:]))
        found.reached("imports")
        try:
            running.fine_tune(job, found)
        except KeyboardInterrupt:
            return found.spent
    raise SystemExit("the run ended before its first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="one round: tries the benchmark, writes nothing")
    parser.add_argument("--rounds", type=int, default=3, help="the least of so many counts")
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, machine.cores()}))
    parser.add_argument("--parts", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.parts:
        print(json.dumps(parts(Path(options.parts))))
        return
    folder = base(machine.ROOT / "build" / "startup")
    rounds = 1 if options.tiny else options.rounds
    rows = []
    for threads in options.threads:
        measured = [measure(folder, threads) for _ in range(rounds + (not options.tiny))][-rounds:]
        row: dict[str, Any] = {"threads": threads} | {
            name: min(one[name] for one in measured) for name in ("seconds", "cpu_seconds", "others")
        }
        asked = [sys.executable, __file__, "--parts", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(asked, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        told = ", ".join(f"{part} {row[part]:.2f}" for part in PARTS)
        print(
            f"{threads} threads: {row['seconds']:.1f} s to the first step, {row['cpu_seconds']:.1f} s of processor time "
            f"(others took {row['others']:.0%}); of it {told}",
            flush=True,
        )
    if not options.tiny:
        rows = [{key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
        results.append(RESULTS, [results.origin("torch") | row for row in rows], FIELDS)


if __name__ == "__main__":
    main()
