"""Writes docs/benchmarks.md and its pictures from the rows of results: ``.venv/bin/python benchmarks/tables.py``.

Nothing in the page was typed by hand, and no number in it comes from two runs: ratios are those of the rows, which pair the
rounds of one run. Of each model, workload and machine class the newest run that has Lamina and a peer is shown, a short one
(``QUICK=1``, or of fewer rounds) only where there is no longer one; all others are in the last table. ``--check`` writes nothing and
tells what is out of step with the rows.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import alone
import plots
import results
from catalogue import ARMS, BOUND, FULL, LAMINA
from markdown import NONE, Row, origin, table

DOCS = Path(__file__).resolve().parents[1] / "docs"
HEAD = """\
# Benchmarks

<!-- Written by benchmarks/tables.py from benchmarks/results/*.csv: do not edit. -->

Speed and memory of Lamina beside other tools, from the rows that `make bench` appends to `benchmarks/results`. How it is
measured, what the arms are and what keeps a row from being written stands in [benchmarks/README.md](../benchmarks/README.md).
Compare within a table: its arms took turns in one run on one machine. Speeds of different runs do not compare. A number from a
single round is marked ¹: it says less than the median of several.

* `llama-768x12-r64` is a Llama of width 768 with 12 layers, and LoRA of rank 64 on all its linear layers.
* An arm is a tool in one of its forms: `-padded` pads the rows of a step to the longest, `-single` computes one row at a time, `-packed`
  and `-padding-free` put them into one row, `-default` is the tool as it comes. `peft` is a plain loop with transformers and PEFT, padded.
* *Real tokens* are those of the rows, without padding; *supervised* ones carry a loss.
* *The bound* is the speed of the step's matrix products by themselves, without attention, norms, or anything between them; *in GEMMs* is
  the share of an arm's step that it spends in its own.
* *Memory* is the most that the process had at one time, libraries included.
"""


COLUMNS: dict[str, Callable[[Row], str]] = {
    "arm": lambda row: row["arm"],
    "real tok/s": lambda row: f"{row['tok_s']}{_once(row)}",
    "lowest – highest": lambda row: f"{row['tok_s_min']} – {row['tok_s_max']}",
    "supervised tok/s": lambda row: row["supervised_tok_s"],
    "peak GiB": lambda row: row["peak_gib"],
    "Lamina is … × as fast": lambda row: _known(row["lamina_is_times_faster"]),
    "of the bound": lambda row: _percent(row["of_bound"]),
    "in GEMMs": lambda row: _percent(row["gemm_share"]),
    "s to a loss": lambda row: _known(row["seconds_to_loss"]),
}


def page() -> str:
    """The page's text."""
    return "\n".join([HEAD, *_overview(), *_beside(), *_growth(), *alone.sections(), *_gates(), *_history()])


def pictures(docs: Path) -> Iterator[tuple[Path, list[Row], Any]]:
    """Each picture of the page, the rows that it shows, and what draws it."""
    for name, rows in shown():
        yield docs / "images" / f"bench-{name}.svg", rows, plots.bars
    for axis, rows in grown():
        yield docs / "images" / f"growth-{axis}.svg", rows, lambda rows, path, axis=axis: plots.growth(rows, axis, path)


def shown() -> list[tuple[str, list[Row]]]:
    """For each machine class, model and workload: a name for files and headings, and the rows of the newest run with a peer; of a
    short one only where there is no longer one."""
    newest: dict[str, list[Row]] = {}
    for kind in ("cpu", "gpu"):
        for rows in sorted(_runs(results.read(results.FOLDER / f"{kind}.csv")), key=_thoroughness):
            model, workload = rows[0]["workload"].split(",")[0], rows[0]["workload"].rsplit(", ", 1)[1]
            tools = {row["arm"] for row in rows} - {BOUND}
            if LAMINA in tools and len(tools) > 1:
                newest[f"{kind}-{model}-{workload}"] = rows
    return list(newest.items())


def _thoroughness(rows: list[Row]) -> tuple[bool, bool]:
    """Whether the arms of a run counted as many steps a round as a full run's do, and whether there were as many rounds."""
    return max(int(row["steps"]) for row in rows) >= FULL.steps, max(int(row["rounds"]) for row in rows) >= FULL.rounds


def grown() -> list[tuple[str, list[Row]]]:
    """The newest run of each axis of growth."""
    newest: dict[tuple[str, str], list[Row]] = {}
    for row in results.read(results.FOLDER / "growth_cpu.csv"):
        newest.setdefault((row["axis"], row["run"]), []).append(row)
    last = {axis: rows for (axis, _), rows in newest.items()}
    return [(axis, last[axis]) for axis in plots.NAMES if axis in last]


def _runs(rows: list[Row]) -> list[list[Row]]:
    """Rows by run and workload, in the order of their writing."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["run"], row["workload"]), []).append(row)
    return list(found.values())


def _beside() -> Iterator[str]:
    yield "## Beside other tools\n"
    if not shown():
        yield NONE
    for name, rows in shown():
        kind, rest = name.split("-", 1)
        yield f"### {rest.rsplit('-', 1)[1].capitalize()}, {rest.rsplit('-', 1)[0]}, {kind.upper()}\n"
        yield f"{rows[0]['workload'].split(', ', 1)[1]}. {origin(rows)}\n"
        yield f"{summary(rows)}\n"
        yield f"![Real tokens per second of each arm](images/bench-{name}.svg)\n"
        columns = {name: [cell(row) for row in rows if row["arm"] != BOUND] for name, cell in COLUMNS.items()}
        filled = {name: cells for name, cells in columns.items() if any(cell != "–" for cell in cells)}
        yield table(" | ".join(filled), [" | ".join(line) for line in zip(*filled.values(), strict=True)])
        if kind == "cpu" and (absent := _absent(rows)):
            yield f"Not measured in this run: {', '.join(absent)}.\n"


def _absent(rows: list[Row]) -> list[str]:
    """The tools that have arms on the workload, and none in this run."""
    workload = rows[0]["workload"].rsplit(", ", 1)[1]
    tools = dict.fromkeys(arm.contest[0] for arm in ARMS if arm.workload == workload and not arm.asked)
    return [tool for tool in tools if tool not in {row["arm"].partition("-")[0] for row in rows}]


def _overview() -> Iterator[str]:
    """The runs that are shown, in a line each."""
    lines = []
    for name, rows in shown():
        own, peers = next(row for row in rows if row["arm"] == LAMINA), peers_of(rows)
        if peers:
            best, (share, lean) = min(peers, key=_ratio), _memory(own, peers)
            kind, rest = name.split("-", 1)
            model, workload = rest.rsplit("-", 1)
            lines.append(
                f"{workload} | {model}, {kind.upper()} | {own['tok_s']}{_once(own)} | {_percent(own['of_bound'])} | "
                f"{best['lamina_is_times_faster']} × {best['arm']}{_once(best)} | {share:.2f} of {lean['arm']}{_once(lean)}"
            )
    if lines:
        head = "workload | model | Lamina, real tok/s | of the bound | times as fast as the fastest peer"
        yield table(f"{head} | memory, as a share of the leanest peer's", lines)


def summary(rows: list[Row]) -> str:
    """What the run says of Lamina, in one sentence: by the fastest peer over the same base, by TRL, by the bound, in memory."""
    own = next(row for row in rows if row["arm"] == LAMINA)
    peers = peers_of(rows)
    if not peers:
        return "No peer over the same base in this run."
    best = min(peers, key=_ratio)
    parts = [
        f"Lamina is {best['lamina_is_times_faster']} × as fast as the fastest peer of this run ({best['arm']}{_once(best)})"
    ]
    trl = [row for row in peers if row["arm"].startswith("trl")]
    if trl:
        fast = min(trl, key=_ratio)
        parts.append(f"{fast['lamina_is_times_faster']} × as TRL's fastest form ({fast['arm']}{_once(fast)})")
    for whose, some in (("the leanest peer", peers), ("TRL's leanest form", trl)):
        if some:
            share, lean = _memory(own, some)
            parts.append(f"in {share:.2f} of the memory of {whose} ({lean['arm']}{_once(lean)})")
    int8 = next((row for row in rows if row["arm"] == f"{LAMINA}-int8"), None)
    if int8:
        medians = float(int8["tok_s"]) / float(best["tok_s"])
        parts.append(f"over an int8 base {medians:.2f} × as fast as that peer over bf16, by the medians")
    if own["of_bound"]:
        parts.append(f"at {float(own['of_bound']):.0%} of the speed of the bare matrix products")
    return ", ".join(parts) + (" (single rounds¹)." if own["rounds"] == "1" else ".")


def _memory(own: Row, others: list[Row]) -> tuple[float, Row]:
    """Lamina's memory by that of the leanest of some rows, and which that is."""
    lean = min(others, key=lambda row: float(row["peak_gib"]))
    return float(own["peak_gib"]) / float(lean["peak_gib"]), lean


def peers_of(rows: list[Row]) -> list[Row]:
    """The other tools' rows over a base that is not quantised."""
    apart = (LAMINA, BOUND)
    known = [row for row in rows if row["lamina_is_times_faster"] and not row["arm"].startswith(apart)]
    return [row for row in known if not row["arm"].endswith(("nf4", "int8", "fp8"))]


def _growth() -> Iterator[str]:
    yield "## How cost grows\n"
    if not grown():
        yield NONE
    for axis, rows in grown():
        others = {"length": "rank {rank}", "rank": "rows of {length}", "layers": "rank {rank}, rows of {length}"}
        setting = others.get(axis, "rank {rank}, rows of {length}").format(**rows[0])
        model = "" if axis == "parameters" else f"{rows[0]['model']}, "
        yield f"### Against {plots.NAMES[axis]}\n"
        yield f"{model}{setting}, all tokens targets, 2,048 tokens a step or one longer row. {origin(rows)}\n"
        yield f"![Speed and memory against {plots.NAMES[axis]}; the dashed line is the bound](images/growth-{axis}.svg)\n"
        arms = [arm for arm in (BOUND, LAMINA, "peft") if any(row["arm"] == arm for row in rows)]
        at = {(row["value"], row["arm"]): row for row in rows}
        lines = []
        for value in sorted({row["value"] for row in rows}, key=int):
            cells = [at.get((value, arm)) for arm in arms]
            speeds = [f"{row['tok_s']}{_once(row)}" if row else "–" for row in cells]
            memory = [row["peak_gib"] if row else "–" for row, arm in zip(cells, arms, strict=True) if arm != BOUND]
            lines.append(" | ".join([f"{int(value):,}", *speeds, *memory]))
        names = [f"{arm}, tok/s" for arm in arms] + [f"{arm}, GiB" for arm in arms if arm != BOUND]
        yield table(" | ".join([plots.NAMES[axis], *names]), lines)


def _gates() -> Iterator[str]:
    yield "## The long gates\n"
    rows = results.read(results.FOLDER / "gates.csv")
    rows = [row for row in rows if row["run"] == rows[-1]["run"]]
    if not rows:
        yield NONE
        return
    yield f"Of {rows[0]['model']}. {origin(rows)}\n"
    yield table(
        "gate | what | found | at most | passed",
        [
            f"{r['gate']} | {r['what']} | {r['found']} | {r['limit']} | {'yes' if r['passed'] == 'True' else 'no'}"
            for r in rows
        ],
    )


def _history() -> Iterator[str]:
    yield "## All runs\n"
    lines = []
    for kind in ("cpu", "gpu"):
        for rows in _runs(results.read(results.FOLDER / f"{kind}.csv")):
            peers = [(_ratio(row), row["arm"]) for row in peers_of(rows)]
            own = next((row for row in rows if row["arm"] == LAMINA), None)
            nearest = "{} × {}".format(*min(peers)) if peers else "–"
            workload = rows[0]["workload"]
            lines.append(
                f"{rows[0]['date']} | {rows[0]['commit']} | {_short(rows[0]['machine'])} | {workload.split(',')[0]}, "
                f"{workload.rsplit(', ', 1)[1]} | {own['tok_s'] + _once(own) if own else '–'} | {nearest}"
            )
    yield (
        table("date | commit | machine | model, workload | Lamina, tok/s | and the nearest peer", lines)
        if lines
        else NONE
    )


def _ratio(row: Row) -> float:
    return float(row["lamina_is_times_faster"])


def _short(machine: str) -> str:
    return ", ".join(machine.split(", ")[:2])


def _once(row: Row) -> str:
    return "¹" if row["rounds"] == "1" else ""


def _known(value: str) -> str:
    return value or "–"


def _percent(value: str) -> str:
    return f"{float(value):.0%}" if value else "–"


def stale(docs: Path) -> Iterator[str]:
    """What is not as the rows have it."""
    target = docs / "benchmarks.md"
    if not target.exists() or target.read_text(encoding="utf-8") != page():
        yield f"{target.name} is out of step with benchmarks/results"
    for path, rows, _ in pictures(docs):
        if plots.drawn_from(path) != plots.digest(rows):
            yield f"{path.name} was drawn from other rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where something is out of step")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of the page")
    options = parser.parse_args()
    if options.check:
        found = list(stale(options.docs))
        print("\n".join(found) or "in step")
        sys.exit(bool(found))
    (options.docs / "benchmarks.md").write_text(page(), encoding="utf-8")
    for path, rows, draw in pictures(options.docs):
        draw(rows, path)
        print(f"{path.name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
