"""How cost grows: speed and memory against length of the rows, rank, adapted layers, dropout and size of the model.

One of them is varied at a time. A step has 2,048 tokens in rows of equal length (one row where it is longer), all targets, so that
nobody pads. At each point Lamina, the plain PEFT loop and the bare matrix products take turns; the rows of a point are written as soon
as it is measured, and a run that was cut off goes on with ``--resume``. Rows of an arm that leaves a matrix without a gradient, counts
other tokens, or shared more than a tenth of the processors with others are told and not written.
"""

import argparse
import statistics
from dataclasses import dataclass, replace
from typing import Any

import machine
import results
import rows as texts
import workload
from bench import BUILD, Bench, Failed, miscounted
from catalogue import Arm, forms

PATH = results.FOLDER / "growth_cpu.csv"
FIELDS = (
    "date commit run axis value arm model rank length adapted_layers parameters tok_s peak_gib rounds others versions machine threads"
).split()
TOKENS, STEPS, WARMUP = 2048, 2, 1
ARMS = tuple(arm for arm in forms("dense") if arm.name in ("bare-gemms", "lamina", "peft"))


@dataclass(frozen=True)
class Point:
    """One value of one axis, everything else as usual."""

    axis: str
    value: int
    shape: workload.Shape
    length: int = 512


def points(model: str, slow: bool) -> list[Point]:
    """The points of a run, of the tiny model three of each axis; the 1.1 B model only where it is asked for."""
    usual, few = workload.MODELS[model], model == "tiny"
    lengths = [128, 512, 2048] if few else [2**n for n in range(7, 14)]
    ranks = [rank for rank in ((4, 64) if few else (2**n for n in range(2, 9))) if rank <= usual.width]
    layers = sorted({1, usual.layers} if few else {1, usual.layers // 4, usual.layers // 2, usual.layers} - {0})
    models = [model] if few else ["15m", "134m", *(["1.1b"] if slow else [])]
    return [
        *(Point("length", length, usual, length) for length in lengths),
        *(Point("rank", rank, replace(usual, rank=rank)) for rank in ranks),
        *(Point("layers", top, replace(usual, adapted=f"{usual.layers - top}-{usual.layers - 1}")) for top in layers),
        *(Point("dropout", percent, replace(usual, dropout=percent / 100)) for percent in (0, 5, 10)),
        *(Point("parameters", workload.MODELS[name].parameters, workload.MODELS[name]) for name in models),
    ]


def measure(point: Point, run: str, rounds: int) -> dict[Arm, list[dict[str, Any]]]:
    """The arms in turn at one point; one that fails, for want of memory as a rule, is told and left out."""
    bench = Bench(workload.prepare(BUILD / "bench", point.shape), run)
    rows = BUILD / "bench" / "rows" / f"dense-{point.length}.jsonl"
    batch = max(1, TOKENS // point.length)
    if not rows.exists():
        texts.write_rows(rows, texts.dense(point.length, batch * (WARMUP + STEPS)))
    job = {"rows": str(rows), "batch": batch, "warmup": WARMUP, "steps": STEPS}
    reports: dict[Arm, list[dict[str, Any]]] = {}
    for round_ in range(rounds):
        for arm in bench.able(list(ARMS)):
            try:
                report = bench.process(arm, f"{point.axis}-{point.value}-{round_}", **job)
            except Failed as failed:
                print(f"  {failed}", flush=True)
            else:
                report["miscounted"] = miscounted(report, texts.counts(rows, 0, batch))
                reports.setdefault(arm, []).append(report | {"counted": report["steps"][WARMUP:]})
    return reports


def rows_of(point: Point, reports: dict[Arm, list[dict[str, Any]]], fixed: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each arm, the median of its rounds."""
    shape, made = point.shape, []
    adapted = point.value if point.axis == "layers" else shape.layers
    for arm, own in reports.items():
        loud = statistics.median(map(results.noise, own))
        made.append(
            fixed
            | {
                "axis": point.axis,
                "value": point.value,
                "arm": arm.name,
                "model": f"llama-{shape.width}x{shape.layers}",
            }
            | {"rank": shape.rank, "length": point.length, "adapted_layers": adapted, "parameters": shape.parameters}
            | {"tok_s": round(statistics.median(map(results.speed, own)), 1), "rounds": len(own)}
            | {"peak_gib": round(max(r["peak"] for r in own) / 2**30, 2), "others": round(loud, 3)}
            | {"versions": " ".join(f"{k} {v}" for k, v in own[0]["versions"].items()), "machine": machine.machine()}
            | {"threads": own[0]["threads"]}
            | {"faults": "; ".join([*results.silent(own), *results.miscounts(own), *results.loudness(loud)])}
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="on the 134 M model: an hour or two")
    parser.add_argument("--slow", action="store_true", help="the 1.1 B model too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries the benchmark itself, writes nothing")
    parser.add_argument("--axis", choices=("length", "rank", "layers", "dropout", "parameters"), help="only this one")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was cut off")
    options = parser.parse_args()
    model = "tiny" if options.tiny else "134m" if options.full else "15m"
    date, commit, run = results.stamp()
    run = options.resume or run
    done = {(row["axis"], row["value"]) for row in results.read(PATH) if row["run"] == run}
    print(f"{machine.machine()}\nrun {run}", flush=True)
    for point in points(model, options.slow):
        if (options.axis and point.axis != options.axis) or (point.axis, str(point.value)) in done:
            continue
        rows = rows_of(
            point, measure(point, run, 1 if options.tiny else 2), {"date": date, "commit": commit, "run": run}
        )
        for row in rows:
            print(
                f"{row['axis']:11}{row['value']:12}  {row['arm']:12}{row['tok_s']:9} tok/s {row['peak_gib']:6} GiB  {row['faults']}"
            )
        if not options.tiny:
            results.append(PATH, rows, FIELDS)


if __name__ == "__main__":
    main()
