"""Rows of results: a row for each arm of a run, appended to a CSV of ``results/``.

Ratios are of one run: a speed is set against Lamina's and against the bare matrix products' of the same round; the median counts.
"""

import csv
import datetime
import json
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine
from catalogue import LAMINA, Arm

FOLDER = Path(__file__).parent / "results"
NOISE = 0.1
"""Share of the processors that others may take while an arm is measured; the median over its rounds."""
FIELDS = (
    "date commit workload arm settings tok_s tok_s_min tok_s_max supervised_tok_s peak_gib lamina_is_times_faster loss rounds warmup "
    "steps versions machine threads others run bound_tok_s of_bound gemm_share seconds_to_loss held_out_loss"
).split()
Reports = dict[Arm, list[dict[str, Any]]]


def stamp() -> tuple[str, str, str]:
    """Date, commit and name of a run that begins now."""
    now, commit = datetime.datetime.now(datetime.UTC), machine.commit()
    return f"{now:%Y-%m-%d %H:%M}", commit, f"{now:%Y%m%dT%H%M%S}-{commit}"


def speed(report: dict[str, Any], what: str = "tokens") -> float:
    """Tokens per second over the counted steps."""
    return sum(s[what] for s in report["counted"]) / sum(s["seconds"] for s in report["counted"])


def noise(report: dict[str, Any]) -> float:
    """The share of the processors that others took during the counted steps."""
    counted = report["counted"]
    return sum(s["others"] for s in counted) / sum(s["seconds"] for s in counted) / machine.cores()


def paired(reports: list[dict[str, Any]], against: list[dict[str, Any]]) -> float | None:
    """The median of speed(against)/speed over the rounds that both have; nothing, where they share none."""
    other = {report["round"]: speed(report) for report in against}
    ratios = [other[r["round"]] / speed(r) for r in reports if r["round"] in other]
    return statistics.median(ratios) if ratios else None


def rows_of(reports: Reports, found: dict[Arm, list[str]], fixed: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each arm; ``faults`` says why it is not to be written, ``fixed`` what all rows of the run have in common."""
    made = []
    for arm, own in reports.items():
        lamina = _beside(reports, arm, lambda other: other.tool == LAMINA and other.base == arm.base)  # noqa: B023
        bare = _beside(reports, arm, lambda other: other.bound)
        rates, factor, over = [speed(r) for r in own], paired(own, lamina), paired(own, bare)
        loud = max(statistics.median(map(noise, group)) for group in (own, lamina) if group)
        values = fixed | {
            "workload": own[0]["workload"],
            "arm": arm.name,
            "settings": json.dumps(arm.settings),
            "tok_s": _round(statistics.median(rates), 1),
            "tok_s_min": _round(min(rates), 1),
            "tok_s_max": _round(max(rates), 1),
            "supervised_tok_s": _round(statistics.median(speed(r, "supervised") for r in own), 1),
            "peak_gib": _round(max(r["peak"] for r in own) / 2**30, 2),
            "lamina_is_times_faster": _round(factor, 2),
            "loss": _round(statistics.mean(s["loss"] for r in own for s in r["counted"]), 4),
            "rounds": len(own),
            "warmup": own[0]["warmup"],
            "steps": len(own[0]["counted"]),
            "versions": " ".join(f"{name} {version}" for name, version in own[0]["versions"].items()),
            "threads": own[0]["threads"],
            "others": _round(loud, 3),
            "bound_tok_s": _round(statistics.median(map(speed, bare)), 1) if bare else "",
            "of_bound": _round(1 / over, 3) if over else "",
            "gemm_share": _round(_median(r["gemm_share"] for r in own), 3),
            "seconds_to_loss": _round(_median(r.get("seconds_to_loss") for r in own), 1),
            "held_out_loss": _round(_median(r.get("until") for r in own), 4),
        }
        made.append(
            values | {"faults": "; ".join([*found.get(arm, []), *silent(own), *miscounts(own), *loudness(loud)])}
        )
    return made


def _beside(reports: Reports, arm: Arm, wanted: Any) -> list[dict[str, Any]]:
    """The reports of the arm on the same workload that is asked for."""
    return next((r for other, r in reports.items() if other.workload == arm.workload and wanted(other)), [])


def _round(value: float | None, digits: int) -> float | str:
    return "" if value is None else round(value, digits)


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def silent(reports: list[dict[str, Any]]) -> list[str]:
    """What the measured runs add to the gate "alive"."""
    return [f"alive: {len(r['silent'])} matrices without a gradient in bf16" for r in reports if r["silent"]][:1]


def miscounts(reports: list[dict[str, Any]]) -> list[str]:
    """The gate "counts", of the measured runs."""
    return [r["miscounted"] for r in reports if r.get("miscounted")][:1]


def loudness(share: float) -> list[str]:
    """The gate "quiet", of an arm and of Lamina beside it."""
    return [f"quiet: others took {share:.0%} of the processors, more than {NOISE:.0%}"] if share > NOISE else []


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    print(f"\n{rows[0]['machine']}\ncommit {rows[0]['commit']}, run {rows[0]['run']}, medians of rounds")
    workload = ""
    for row in rows:
        if row["workload"] != workload:
            workload = row["workload"]
            print(f"\n{workload}")
            print(
                f"{'':22}{'tok/s':>8}{'min':>8}{'max':>8}{'superv./s':>11}{'peak GiB':>10}{'Lamina is':>11}"
                f"{'of bound':>10}{'in GEMMs':>10}{'s to loss':>11}{'loss':>9}"
            )
        ratio = f"{row['lamina_is_times_faster']} ×" if row["lamina_is_times_faster"] != "" else "–"
        shares = "".join(
            f"{share:10.0%}" if share != "" else f"{'–':>10}" for share in (row["of_bound"], row["gemm_share"])
        )
        print(
            f"{row['arm']:22}{row['tok_s']:8}{row['tok_s_min']:8}{row['tok_s_max']:8}{row['supervised_tok_s']:11}{row['peak_gib']:10}"
            f"{ratio:>11}{shares}{row['seconds_to_loss'] or '–':>11}{row['loss']:9}"
            f"  {row['faults'] and 'NOT WRITTEN: ' + row['faults']}"
        )


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, in the order of their writing; none, where there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def origin(*packages: str) -> dict[str, str]:
    """Where a row was measured: when, at which commit, with which versions, on which machine."""
    date, commit, _ = stamp()
    versions = " ".join(f"{name} {version(name)}" for name in packages)
    return {"date": date, "commit": commit, "versions": versions, "machine": machine.machine()}


def append(path: Path, rows: list[dict[str, Any]], fields: list[str]) -> None:
    """Appends rows that passed; a file with fewer columns gets the new ones, empty in its old rows, whose date names their run."""
    passed = [{name: row.get(name, "") for name in fields} for row in rows if not row.get("faults")]
    path.parent.mkdir(exist_ok=True)
    old = read(path)
    if old and list(old[0]) != fields:
        old = [dict.fromkeys(fields, "") | row | {"run": row.get("run") or row["date"]} for row in old]
        _write(path, old + passed, fields, "w")
    else:
        _write(path, passed, fields, "a")
    shown = path.relative_to(machine.ROOT) if path.is_relative_to(machine.ROOT) else path
    print(f"\n{len(passed)} of {len(rows)} rows appended to {shown}")


def _write(path: Path, rows: list[dict[str, Any]], fields: list[str], mode: str) -> None:
    new = mode == "w" or not path.exists()
    with path.open(mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerows(rows)
