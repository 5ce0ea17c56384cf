"""Charts as SVG inside a page: drawn by matplotlib, coloured by the page, and never without their numbers.

Every chart is made by a function of its kind, which draws and writes the table of the same numbers in one go.

Colours mean the same in all charts: grey and dashed is the base, blue the adapter, orange what is dear, green a third
thing. They differ in lightness too, and each line in its dashes or marks, for readers who see no colours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lamina.report.drawing import (
    COLOURS,
    ON_SHADES,
    SHADES,
    STEPS,
    Colour,
    canvas,
    finite,
    said,
    shortened,
    thin,
    width_of,
    written,
)

POINTS = 240
"""Points of a line that are drawn; more do not show at this width."""
ROWS = 60
"""Rows of the table below a chart."""
VALUES = 64
"""Cells of a map up to which their values are written into them, if its columns are at most ``WRITTEN``."""
WRITTEN = 10
_FLAT = 0.01
_STYLES: dict[str, dict[str, Any]] = {
    "solid": {"linewidth": 2.0},
    "dashed": {"linewidth": 1.6, "linestyle": (0, (5, 3))},
    "faint": {"linewidth": 1.0, "alpha": 0.35},
    "points": {"linewidth": 1.6, "marker": "o", "markersize": 5},
}


@dataclass(frozen=True)
class Chart:
    """A drawn chart and its numbers.

    Attributes:
        caption: what to see in it.
        figure: of matplotlib.
        columns, rows: the numbers as a table; of long lines some points.
    """

    title: str
    caption: str
    figure: Any
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Line:
    """A line of a chart; points whose y is None or not finite are gaps.

    Attributes:
        style: ``faint`` for what lies behind, ``points`` for a line with marks.
        band: lower and upper ends of an interval around it.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: Colour = "tuned"
    style: Literal["solid", "dashed", "faint", "points"] = "solid"
    band: tuple[Sequence[float], Sequence[float]] | None = None


def lines(
    title: str,
    caption: str,
    of: Sequence[Line],
    x: str,
    y: str,
    log: str = "",
    marks: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Draws lines over a common axis.

    Args:
        x, y: labels of the axes, with units.
        log: which axes are logarithmic: "", "x", "y" or "xy"; x to base 2, for ranks.
        marks: (x, what it is) of vertical lines.
    """
    legend = _Legend([line.name for line in of])
    with canvas(top=max(20, legend.height + (18 if marks else 8))) as (figure, axes):
        for line in of:
            _draw(axes, line, "y" in log)
        for at, what in marks:
            axes.axvline(at, color=COLOURS["dear"], linewidth=1.2, linestyle=(0, (4, 2)))
            above = {"xycoords": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.annotate(said(what), (at, 1.01), fontsize=9.5, color=COLOURS["dear"], annotation_clip=False, **above)
        axes.set_xlabel(said(x))
        axes.set_ylabel(said(y))
        if "x" in log:
            _powers_of_two(axes, [at for line in of for at in line.x])
        if "y" in log and any((finite(value) or 0.0) > 0 for line in of for value in line.y):
            _logarithmic(axes)
        else:
            _at_least(axes)
        legend.draw(figure, axes)
    points = sorted({at for line in of for at in line.x})
    values = [dict(zip(line.x, line.y, strict=True)) for line in of]
    rows = [[written(at), *(written(one.get(at)) for one in values)] for at in thin(points, ROWS)]
    return Chart(title, caption, figure, [x, *(line.name for line in of)], rows)


def bars(
    title: str, caption: str, names: Sequence[str], groups: Mapping[str, Sequence[float | None]], label: str
) -> Chart:
    """Draws horizontal bars, one or some for each name, with their values at their ends.

    Args:
        groups: values by the name of the group; at most three groups.
        label: of the axis of values, with its unit.
    """
    height = 78 + len(names) * (14 + 11 * len(groups))
    legend = _Legend(list(groups))
    with canvas(height, left=16 + width_of(names), top=12 + legend.height) as (figure, axes):
        wide = 0.8 / len(groups)
        palette: tuple[Colour, ...] = ("tuned",) if len(groups) == 1 else ("tuned", "third", "dear")
        for number, (group, values) in enumerate(groups.items()):
            places = [place - 0.4 + wide * (number + 0.5) for place in range(len(names))]
            lengths = [finite(value) or 0.0 for value in values]
            axes.barh(places, lengths, wide * 0.86, color=COLOURS[palette[number]], label=said(group))
            for place, length, value in zip(places, lengths, values, strict=True):
                axes.annotate(
                    _brief(value),
                    (max(length, 0.0), place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9.5,
                )
        axes.set_yticks(range(len(names)), shortened(names))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.16)
        axes.set_xlabel(said(label))
        legend.draw(figure, axes)
    rows = [[name, *(written(values[n]) for values in groups.values())] for n, name in enumerate(names)]
    return Chart(title, caption, figure, ["", *groups], rows)


def heat(
    title: str,
    caption: str,
    names: tuple[Sequence[str], Sequence[str]],
    values: Sequence[Sequence[float | None]],
    labels: tuple[str, str, str],
) -> Chart:
    """Draws a map of values, pale for small and full for large; a cell without a value stays empty.

    Args:
        names: of the rows, from above, and of the columns.
        labels: of the rows, the columns and the values, with their unit.
    """
    rows, columns = names
    known = [value for row in values for value in row if finite(value) is not None]
    edges = _edges([value for value in known if value is not None])
    height = 102 + len(rows) * max(9, min(24, 380 / max(1, len(rows))))
    with canvas(height, left=30 + width_of(rows), top=58) as (figure, axes):
        _cells(axes, values, edges)
        every = -(-len(columns) // 16)
        axes.set_xticks(range(0, len(columns), every), shortened(columns[::every]))
        every = -(-len(rows) // 20)
        axes.set_yticks(range(0, len(rows), every), shortened(rows[::every]))
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_ylabel(said(labels[0]))
        axes.set_xlabel(said(labels[1]))
        if edges:
            _scale(figure, axes, edges, labels[2])
    table = [[name, *map(written, row)] for name, row in zip(rows, values, strict=True)]
    return Chart(title, caption, figure, [f"{labels[0]} \\ {labels[1]}", *columns], table)


def _draw(axes: Any, line: Line, log: bool) -> None:
    chosen = thin(range(len(line.x)), POINTS)
    x = [line.x[n] for n in chosen]
    y = [math.nan if (v := finite(line.y[n])) is None or (log and v <= 0) else v for n in chosen]
    colour = COLOURS[line.colour]
    if line.band is not None:
        axes.fill_between(x, *([end[n] for n in chosen] for end in line.band), color=colour, alpha=0.18, linewidth=0)
    shown = dict(_STYLES[line.style])
    if len(x) == 1:
        shown |= {"marker": "o", "markersize": 6}
    axes.plot(x, y, color=colour, label=said(line.name), **shown)


def _brief(value: float | None) -> str:
    """A number at the end of a bar: three digits."""
    number = finite(value)
    return written(value) if number is None else f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


class _Legend:
    """The names of the lines or bars above the axes; of a single one there is none."""

    def __init__(self, names: Sequence[str]) -> None:
        self.columns = 3 if sum(map(len, names)) < 45 else 2
        self.height = 16 * -(-len(names) // self.columns) if len(names) > 1 else 0

    def draw(self, figure: Any, axes: Any) -> None:
        """Draws it, once the lines are there."""
        handles, names = axes.get_legend_handles_labels()
        if self.height:
            at = {"loc": "upper left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.1}
            figure.legend(handles, names, ncols=self.columns, fontsize=9.5, handlelength=1.8, **at)


def _at_least(axes: Any) -> None:
    """A y axis of at least a hundredth of its values, so that rounding looks like nothing, and its numbers are short."""
    low, high = axes.get_ylim()
    lacks = _FLAT * max(abs(low), abs(high)) - (high - low)
    if lacks > 0:
        axes.set_ylim(low - lacks / 2, high + lacks / 2)


def _logarithmic(axes: Any) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 times the powers of ten, or at the powers, where these are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, (1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axes.minorticks_off()


def _powers_of_two(axes: Any, at: Sequence[float]) -> None:
    places = sorted({value for value in at if value > 0})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places], minor=False)
    axes.minorticks_off()


def _edges(values: Sequence[float]) -> list[float]:
    """Edges of the shades, evenly spaced, by factors where the values differ by more than a thousand."""
    if not values:
        return []
    low, high = min(values), max(values)
    if low > 0 and high / low > 1000:
        return [low * (high / low) ** (n / STEPS) for n in range(STEPS + 1)]
    if high - low <= abs(high) * 1e-9:
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if high else (-0.5, 0.5)
    return [low + (high - low) * n / STEPS for n in range(STEPS + 1)]


def _cells(axes: Any, values: Sequence[Sequence[float | None]], edges: Sequence[float]) -> None:
    from matplotlib.collections import PolyCollection

    write = sum(map(len, values)) <= VALUES and max(map(len, values), default=0) <= WRITTEN
    squares, shades = [], []
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if (number := finite(value)) is None:
                continue
            shade = max(0, min(STEPS - 1, sum(number >= edge for edge in edges) - 1))
            squares.append([(column + x, row + y) for x, y in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))])
            shades.append(SHADES[shade])
            if write:
                size = 9.5 if len(line) <= 8 else 8
                axes.text(column, row, f"{number:.2g}", ha="center", va="center", color=ON_SHADES[shade], fontsize=size)
    axes.add_collection(PolyCollection(squares, facecolors=shades, edgecolors=COLOURS["paper"], linewidths=1))


def _scale(figure: Any, axes: Any, edges: Sequence[float], label: str) -> None:
    """The shades beside their values."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    shades = ScalarMappable(BoundaryNorm(list(edges), STEPS), ListedColormap(SHADES))
    place, high = axes.get_position(), 72 * figure.get_figheight()
    box = figure.add_axes((place.x0, 1 - 49 / high, place.width, 8 / high))
    bar = figure.colorbar(shades, cax=box, orientation="horizontal", ticklocation="top", spacing="uniform")
    bar.set_ticks([edges[0], edges[STEPS // 2], edges[-1]], labels=[f"{edges[n]:.3g}" for n in (0, STEPS // 2, STEPS)])
    bar.set_label(said(label), labelpad=9)  # letters are larger on a narrow page, and must not touch the values
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
