"""The benchmark of quantised bases: ``benchmarks/qlora.py seven-b``, ``merge``, ``share``, ``kernels`` or ``gpu``.

``seven-b`` loads and trains a checkpoint of Llama-2-7B's true size and compares seconds with a plain read of its files, bytes
with the plan. ``merge`` trains over it by the command line, and merges (``qlora_merge.py``). ``share`` says what of a step is
spent in making numbers from the stored form. ``kernels`` compares the two conversions with bitsandbytes'. ``gpu`` draws, loads and
trains the 7B and the 70B there (``qlora_gpu.py``), and appends to ``results/qlora_gpu.csv``. Each other appends rows to
``results/qlora_cpu.csv``, unless the run is ``--tiny`` or of another shape, or others took the processors meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import results
import workload
from run import NOISE

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "qlora_cpu.csv"
ON_GPU = HERE / "results" / "qlora_gpu.csv"
ROUNDS = {"seven-b": 2, "share": 7, "kernels": 7}
BASES, MORE_BASES = ("nf4",), ("nf4", "int8", "fp8")
STEPS, TOKENS = 3, 512
MATRICES = ((4096, 4096), (11008, 4096))
SMALL = replace(workload.TINY, layers=1, vocabulary=256, rank=16)
"""What the processes load, and train on, before they take their baseline."""

FIELDS = ["date", "commit", "versions", "machine", "threads", "what", "base", "seconds", "tokens_s"]
FIELDS += ["predicted_bytes", "measured_bytes", "ratio", "others", "note"]
Row = dict[str, Any]


def child(part: str, count: int, **job: Any) -> dict[str, Any]:
    """Runs one of ``qlora_parts`` in a process of its own."""
    command = [sys.executable, HERE / "qlora_parts.py", part, json.dumps(job)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": str(count)}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{part}: ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def threads(options: argparse.Namespace) -> int:
    """All cores, but for a trial, which tests run beside others."""
    return 1 if options.tiny else machine.cores()


def seven_b(options: argparse.Namespace, rounds: int) -> list[Row]:
    """Loading in each form beside a plain read, which take turns; then training with no layer checkpointed, and with all."""
    import checkpoint

    if sys.platform != "linux":
        sys.exit("seven-b: reads the memory of its processes from /proc, which only Linux has")
    shape = replace(SMALL, layers=2) if options.tiny else checkpoint.LLAMA_2_7B
    shape = replace(shape, layers=options.layers or shape.layers)
    folder, small = (str(checkpoint.write(options.build / "qlora", of)) for of in (shape, SMALL))
    rows = []
    for base in MORE_BASES if options.all else BASES:
        reads, loads = [], []
        for _ in range(rounds):
            reads.append(child("read", threads(options), folder=folder))
            loads.append(child("load", threads(options), folder=folder, small=small, base=base))
        rows += [show(row) for row in loading(base, reads, loads)]
    for checkpointed in (0, shape.layers):
        job = {"checkpointed": checkpointed, "rank": shape.rank, "tokens": TOKENS, "steps": STEPS}
        report = child("training", threads(options), folder=folder, small=small, base="nf4", **job)
        rows.append(show(trained("nf4", checkpointed, report)))
    return rows


def loading(base: str, reads: list[dict[str, Any]], loads: list[dict[str, Any]]) -> list[Row]:
    """Rows of the plain read, of loading and of its peak; least seconds, most bytes."""
    read, load = (min(reports, key=lambda report: report["seconds"]) for reports in (reads, loads))
    kept, peak = (max(report[name] for report in loads) for name in ("kept", "peak"))
    speed, shown = f"{read['bytes'] / read['seconds'] / 1e9:.2f} GB/s", kept / load["predicted"]
    return [
        times(read, "plain read", base) | {"measured_bytes": read["bytes"], "note": speed},
        times(load, "load", base)
        | {
            "predicted_bytes": load["predicted"],
            "measured_bytes": kept,
            "ratio": load["seconds"] / read["seconds"],
            "note": f"seconds by the plain read's; kept bytes are {shown:.3f} of the plan's",
        },
        {
            "what": "load, peak",
            "base": base,
            "predicted_bytes": load["predicted_peak"],
            "measured_bytes": peak,
            "ratio": peak / load["predicted_peak"],
            "others": load["others"],
        },
    ]


def trained(base: str, checkpointed: int, report: dict[str, Any]) -> Row:
    """A row of training: the median of its steps."""
    seconds = statistics.median(report["steps"])
    losses = " ".join(f"{loss:.4f}" for loss in report["losses"])
    took = " ".join(f"{step:.2f}" for step in report["steps"])
    return {
        "what": f"train, {checkpointed} layers checkpointed",
        "base": base,
        "seconds": seconds,
        "tokens_s": report["tokens"] / seconds,
        "predicted_bytes": report["predicted"],
        "measured_bytes": report["peak"],
        "ratio": report["peak"] / report["predicted"],
        "others": report["others"],
        "note": f"losses {losses}; steps {took} s; peak foreseen: {report['moment']}",
    }


def share(options: argparse.Namespace, rounds: int) -> list[Row]:
    """The step over each base, and what of it goes into making numbers."""
    files = workload.prepare(options.build / "bench", workload.TINY if options.tiny else workload.Shape())
    job = {"model": str(files.model), "adapter": str(files.adapter), "rows": str(files.whole), "rounds": rounds}
    report = child("share", threads(options), **job)
    found = report["bases"]
    fixed = {"others": report["others"], "note": f"{files.model.parent.name}, {files.about}, the first 4 rows"}
    rows = []
    for base, best in found.items():
        speed, slower = best["tokens"] / best["seconds"], best["seconds"] / found["dense"]["seconds"]
        step = {"what": "step", "base": base, "seconds": best["seconds"], "tokens_s": speed, "ratio": slower}
        rows.append(show(step | fixed))
        if base != "dense":
            made = {"what": "step, making numbers", "base": base, "seconds": best["making"]}
            rows.append(show(made | {"ratio": best["making"] / best["seconds"]} | fixed))
    return rows


def kernels(options: argparse.Namespace, rounds: int) -> list[Row]:
    """Both conversions of both codes, by number of threads, each in a process of its own."""
    rows = []
    for outputs, inputs in ((64, 128),) if options.tiny else MATRICES:
        for count in sorted({1, min(2, threads(options))}):
            for kind in ("nf4", "fp4"):
                report = child("kernels", count, outputs=outputs, inputs=inputs, kind=kind, rounds=rounds)
                for name in ("store", "dense"):
                    ours, theirs = (report["minima"][key] for key in (name, f"{name}, bitsandbytes"))
                    speeds = (
                        f"{rate(name, outputs * inputs / ours)}, bitsandbytes {rate(name, outputs * inputs / theirs)}"
                    )
                    row = {"what": f"{name} {outputs}×{inputs}", "base": kind, "threads": count, "seconds": ours}
                    same = f"{report['agree']:.4%} of the numbers the same"
                    row |= {"ratio": theirs / ours, "others": report["others"], "note": f"{speeds}; {same}"}
                    rows.append(show(row))
    return rows


def rate(name: str, weights: float) -> str:
    """Weights per second: millions where they are quantised, billions where they are made again."""
    return f"{weights / 1e6:.0f} M weights/s" if name == "store" else f"{weights / 1e9:.2f} G weights/s"


def gpu(options: argparse.Namespace, _: int) -> list[Row]:
    """Llama-2-7B's shape over each base and the 70B's, on the GPU of this machine."""
    from qlora_gpu import Scale, rows_of

    folder = None if options.tiny else options.model
    return [show(row) for row in rows_of(Scale.of(options.tiny), folder, options.all, not options.seven)]


def merge(options: argparse.Namespace, _: int) -> Iterator[Row]:
    """A run over Llama-2-7B's shape in NF4, and its merge by each policy: minutes each, so a row comes when it is measured."""
    import checkpoint
    import qlora_merge

    tiny = replace(workload.TINY, vocabulary=32_000)
    shape = replace(tiny, layers=3) if options.tiny else checkpoint.LLAMA_2_7B
    shape = replace(shape, layers=options.layers or shape.layers)
    return map(show, qlora_merge.rows_of(options.build, shape, tiny, threads(options)))


def times(report: dict[str, Any], what: str, base: str) -> Row:
    return {"what": what, "base": base, "seconds": report["seconds"], "others": report["others"]}


def show(row: Row) -> Row:
    """Prints a row, and returns it."""

    def cell(name: str, form: str, unit: float = 1) -> str:
        return format(row[name] / unit, form) if name in row else "–"

    what = f"{row['what']}, {row['base']}" + (f", {row['threads']} threads" if row.get("threads", 1) > 1 else "")
    numbers = f"{cell('seconds', '.4g'):>9} s{cell('tokens_s', '.1f'):>8} tok/s"
    numbers += "".join(f"{cell(name, '.3f', 2**30):>9}" for name in ("predicted_bytes", "measured_bytes")) + " GiB"
    print(
        f"{what:38}{numbers}  ratio {cell('ratio', '.3f'):>6}  others {cell('others', '.0%'):>4}  {row.get('note', '')}",
        flush=True,
    )
    return row


def append(row: Row, options: argparse.Namespace) -> None:
    """Appends a row to the results; as in run.py, it is not written if others took too much meanwhile."""
    if row.get("others", 0.0) > NOISE:
        print(f"NOT WRITTEN: {row['what']}, {row['base']}: others took {row['others']:.0%}, more than {NOISE:.0%}")
        return
    there = options.mode == "gpu"
    fixed = results.origin("torch", "bitsandbytes")
    fixed |= {"machine": machine.gpu()} if there else {"threads": machine.cores()}
    short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    fields = [name for name in FIELDS if not (there and name in ("threads", "others"))]
    results.append(options.results or (ON_GPU if there else RESULTS), [fixed | short], fields)


MODES = {"seven-b": seven_b, "merge": merge, "share": share, "kernels": kernels, "gpu": gpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: tries the benchmark itself, writes no rows")
    parser.add_argument("--layers", type=int, help="seven-b, merge: fewer layers than 32; writes no rows")
    parser.add_argument("--all", action="store_true", help="seven-b: load in int8 and fp8 too, not in nf4 only")
    parser.add_argument("--rounds", type=int, help=f"rounds to take the minima of, instead of {ROUNDS}")
    parser.add_argument("--build", type=Path, default=machine.ROOT / "build", help="where models are written, and kept")
    parser.add_argument(
        "--model",
        type=Path,
        help="gpu: folder of a checkpoint of the 7B, which is read in nf4, with --all in all forms",
    )
    parser.add_argument("--seven", action="store_true", help="gpu: without the 70B")
    parser.add_argument("--results", type=Path, help="file of the rows, instead of results/qlora_….csv")
    options = parser.parse_args()
    print(f"{machine.machine()}\ncommit {machine.commit()}\n", flush=True)
    for row in MODES[options.mode](options, options.rounds or (1 if options.tiny else ROUNDS.get(options.mode, 1))):
        if not (options.tiny or options.layers):
            append(row, options)
    if options.tiny or options.layers:
        print("\nnothing is written: a tiny model, or fewer layers")


if __name__ == "__main__":
    main()
