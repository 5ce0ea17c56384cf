"""The memory plan beside the peak that was measured, over a grid of models, forms, adapters and micro-batches.

Each configuration is run as ``lamina train`` runs it (``memory_parts.py``): the model is made, the heaviest micro-batch computed, and some
steps are trained. Measured is the peak above what there was before: of resident memory on a CPU, of torch's allocations on a GPU. The
rows of all steps have the same lengths, but where more than a few steps are asked for: then lengths are drawn for each, as real data
has them, and every micro-batch is of a new size. ``--tiny`` tries the benchmark itself and writes nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Timer
from typing import Any

import machine
import memory_grid
import results
from memory_grid import MODELS, SMALL

from lamina.process import prepare

FOLDER = Path(__file__).parent / "results"
JOBS = {"cpu": 1, "cuda": 8}
"""Processes at one time; resident memory is measured beside no other."""

LIMIT = {"cpu": 1800, "cuda": 100}
"""Seconds after which a process is ended, and its configuration counts as failed."""

FIELDS = ["date", "commit", "versions", "machine", "configuration", "planned_mib", "measured_mib", "ratio"]
FIELDS += ["moment", "items"]
MORE = ["requested_mib", "left_mib"]
"""Columns of a GPU's rows only."""

Job = dict[str, Any]


def serve(device: str, jobs: list[Job]) -> None:
    """The child: runs configurations one after the other and prints a line for each."""
    prepare()
    from memory_parts import KINDS

    for job in jobs:
        print(json.dumps(KINDS[device](job)), flush=True)


def reports(device: str, jobs: list[Job], tiny: bool, log: Path | None) -> list[Job]:
    """Runs configurations in a process; where it dies, the others go on in a new one. On a CPU, each has one to itself."""
    found: list[Job] = []
    while len(found) < len(jobs):
        rest = jobs[len(found) :] if device == "cuda" else jobs[len(found) : len(found) + 1]
        before = len(found)
        for report in answers(device, rest, tiny):
            print(line_of(jobs[len(found)], report), flush=True)
            if log and report["log"]:
                write_log(log, jobs[len(found)], report)
            found.append(report)
        if len(found) < before + len(rest):
            print(f"FAILED: {name_of(jobs[len(found)])}", flush=True)
            found.append({})
    return found


def answers(device: str, jobs: list[Job], tiny: bool) -> Iterator[Job]:
    """What a child prints."""
    command = [sys.executable, __file__, "--device", device, "--serve", json.dumps(jobs)]
    threads = 1 if tiny else max(1, machine.cores() // JOBS[device])
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        timer = Timer(LIMIT[device], child.kill)
        timer.start()
        yield from map(json.loads, child.stdout)
        timer.cancel()


def name_of(job: Job) -> str:
    """A configuration in words."""
    hidden = ("small", "folder", "shape")
    return ", ".join(f"{key} {value}" for key, value in job.items() if value is not None and key not in hidden)


def line_of(job: Job, report: Job) -> str:
    """A configuration's line for people."""
    planned, measured = (report[key] / 2**20 for key in ("planned", "measured"))
    return f"{planned:8.1f} MiB planned {measured:8.1f} measured  {measured / planned:6.3f}  {name_of(job)}"


def placed(job: Job, device: str, build: Path) -> Job:
    """The configuration with the models it takes: files for a CPU, sizes for a GPU."""
    shape = MODELS[job["model"]]
    if device == "cuda":
        return job | {"shape": asdict(shape)}
    import checkpoint

    return job | {"small": str(checkpoint.write(build, SMALL)), "folder": str(checkpoint.write(build, shape))}


def row_of(job: Job, report: Job) -> dict[str, Any]:
    """The row of a configuration."""
    sizes = {
        f"{key}_mib": round(report[key] / 2**20, 1)
        for key in ("planned", "measured", "requested", "left")
        if key in report
    }
    items = json.dumps({key: round(value / 2**20, 1) for key, value in report["items"].items()})
    ratio = round(report["measured"] / report["planned"], 3)
    return sizes | {"configuration": name_of(job), "ratio": ratio, "moment": report["moment"], "items": items}


def write_log(path: Path, job: Job, report: Job) -> None:
    """Appends who held the memory of a configuration that is off, as soon as it is known."""
    sizes = ", ".join(f"{key} {report[key] / 2**20:.1f} MiB" for key in ("requested", "left"))
    with path.open("a", encoding="utf-8") as log:
        log.write("\n".join([line_of(job, report), f"  {sizes}", *report["log"], "", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tiny", action="store_true", help="one small configuration: tries the benchmark, writes nothing"
    )
    parser.add_argument("--only", help="configurations whose description holds this; writes no rows")
    parser.add_argument("--device", choices=JOBS, default="cpu", help="where the model computes")
    parser.add_argument("--jobs", type=int, help=f"processes at one time, instead of {JOBS['cuda']} on a GPU")
    parser.add_argument("--results", type=Path, help="file of the rows, instead of results/memory_….csv")
    parser.add_argument("--log", type=Path, help="on a GPU: who held the memory where the plan is off; beside the rows")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.device, json.loads(options.serve))
        return

    gpu = options.device == "cuda"
    grid = [{"model": "small"}] if options.tiny else memory_grid.GPU if gpu else memory_grid.CPU
    jobs = [(memory_grid.USUAL_GPU if gpu else memory_grid.USUAL) | changes for changes in grid]
    jobs = [job for job in jobs if not options.only or options.only in name_of(job)]
    build = machine.ROOT / "build" / "memory"
    jobs = [placed(job, options.device, build) for job in jobs]
    count = options.jobs or JOBS[options.device]
    shares = [jobs[first::count] for first in range(min(count, len(jobs)))]
    path = options.results or FOLDER / f"memory_{'gpu' if gpu else 'cpu'}.csv"
    log = (options.log or path.with_suffix(".log")) if gpu and not options.tiny else options.log
    if log:
        log.write_text("", encoding="utf-8")
    if not jobs:
        sys.exit("no configuration is of that description")
    with ThreadPoolExecutor(len(shares)) as pool:
        answered = list(
            pool.map(lambda share: reports(options.device, share, options.tiny, log if gpu else None), shares)
        )
    done = [pair for share, found in zip(shares, answered, strict=True) for pair in zip(share, found, strict=True)]
    done = sorted((pair for pair in done if pair[1]), key=lambda pair: jobs.index(pair[0]))
    finish(done, len(jobs), path, options)


def finish(done: list[tuple[Job, Job]], asked: int, path: Path, options: argparse.Namespace) -> None:
    """Says how far the plan is off, and writes rows and log."""
    gpu = options.device == "cuda"
    ratios = [report["measured"] / report["planned"] for _, report in done]
    if ratios:
        around = f"{min(ratios):.3f} to {max(ratios):.3f} of the plan, median {statistics.median(ratios):.3f}"
        off = ", ".join(
            f"{sum(abs(ratio - 1) > limit for ratio in ratios)} beyond {limit:.0%}" for limit in (0.05, 0.1)
        )
        print(f"{len(done)} configurations: measured is {around}; {off}")
    if done and not options.tiny and not options.only:
        fixed = results.origin("torch", *(["bitsandbytes"] if gpu else []))
        fixed |= {"machine": machine.gpu()} if gpu else {}
        results.append(path, [fixed | row_of(*pair) for pair in done], FIELDS[:8] + (MORE if gpu else []) + FIELDS[8:])
    if len(done) < asked:
        sys.exit(f"{asked - len(done)} of {asked} configurations failed")


if __name__ == "__main__":
    main()
