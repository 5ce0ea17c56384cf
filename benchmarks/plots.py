"""The pictures of docs/benchmarks.md, drawn from rows of results: SVG, the same rows giving the same bytes.

Each carries the digest of what it was drawn from, so that a test can tell an old picture without drawing a new one: another version of
matplotlib draws other bytes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

Row = dict[str, str]
COLOURS = {"lamina": "#1f6fb4", "bare-gemms": "#444444", "peft": "#d9822b"}
OTHER = "#b8b8b8"
NAMES = {
    "length": "tokens of a row",
    "rank": "rank",
    "layers": "adapted layers, from the top",
    "dropout": "dropout, per cent",
    "parameters": "parameters",
}


def digest(rows: list[Row]) -> str:
    """Of everything that a picture of these rows shows."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def bars(rows: list[Row], path: Path) -> None:
    """Tokens per second of each arm of a run on one workload, fastest first, from the slowest to the fastest round; the bound is a line."""
    figure, axes = _figure(0.9 + 0.3 * len(rows))
    arms = sorted((row for row in rows if row["arm"] != "bare-gemms"), key=lambda row: float(row["tok_s"]))
    rates = [float(row["tok_s"]) for row in arms]
    spread = [
        [rate - float(row["tok_s_min"]) for rate, row in zip(rates, arms, strict=True)],
        [float(row["tok_s_max"]) - rate for rate, row in zip(rates, arms, strict=True)],
    ]
    colours = [COLOURS["lamina"] if row["arm"].startswith("lamina") else OTHER for row in arms]
    axes.barh([row["arm"] for row in arms], rates, xerr=spread, color=colours, ecolor="#666666", height=0.7)
    for row in rows:
        if row["arm"] == "bare-gemms":
            axes.axvline(float(row["tok_s"]), color=COLOURS["bare-gemms"], linestyle=(0, (5, 3)))
            above = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 8}
            axes.text(float(row["tok_s"]), 1.01, "bare GEMMs", **above)
    axes.set_xlabel("real tokens per second")
    _save(figure, path, rows)


def growth(rows: list[Row], axis: str, path: Path) -> None:
    """Speed, with the roofline of the bare matrix products, and memory against one axis."""
    figure, (left, right) = _figure(3.0, columns=2)
    for arm in ("bare-gemms", "lamina", "peft"):
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: int(row["value"]))
        at = [int(row["value"]) for row in own]
        style: dict[str, Any] = {"color": COLOURS[arm], "marker": "o", "markersize": 4, "label": arm}
        if arm == "bare-gemms":
            style |= {"linestyle": (0, (5, 3)), "marker": "", "label": "bare GEMMs"}
        left.plot(at, [float(row["tok_s"]) for row in own], **style)
        if arm != "bare-gemms":
            right.plot(at, [float(row["peak_gib"]) for row in own], **style)
    for part, name in ((left, "real tokens per second"), (right, "peak memory, GiB")):
        if axis != "dropout":
            part.set_xscale("log", base=10 if axis == "parameters" else 2)
        part.set_xlabel(NAMES[axis])
        part.set_title(name, fontsize=9, loc="left")
        if axis == "parameters":
            part.set_yscale("log")
        else:
            part.set_ylim(bottom=0)
        ticks = sorted({int(row["value"]) for row in rows})
        part.set_xticks(ticks, [f"{tick / 1e6:.0f} M" if axis == "parameters" else str(tick) for tick in ticks])
        part.minorticks_off()
    if left.lines:
        left.legend(frameon=False, fontsize=8)
    _save(figure, path, rows)


def drawn_from(path: Path) -> str:
    """The digest that a picture carries; empty, if there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.partition("rows ")[2][:16]


def _figure(height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for part in axes if columns > 1 else [axes]:
        part.spines[["top", "right"]].set_visible(False)
        part.tick_params(labelsize=8)
    return figure, axes


def _save(figure: Any, path: Path, rows: list[Row]) -> None:
    from matplotlib import rc_context

    path.parent.mkdir(exist_ok=True)
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": f"rows {digest(rows)}"})
