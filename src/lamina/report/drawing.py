"""The drawing board of the charts: a style, stand-in colours, and SVG that belongs to a page.

matplotlib knows no light and dark pages. So it draws in stand-in colours, which ``svg`` replaces by the page's variables; it
leaves texts as texts, for which the page has fonts; and names that are the same in every picture get the picture's own key.
Nothing of pyplot is used: there is no global figure and no display, and the same numbers give the same bytes.
"""

import contextlib
import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lamina.report.console import clean

Colour = Literal["base", "tuned", "dear", "third", "ink", "muted", "grid", "paper"]

COLOURS: dict[str, str] = {
    name: f"#0a00{n:02x}" for n, name in enumerate(("base", "tuned", "dear", "third", "ink", "muted", "grid", "paper"))
}
STEPS = 8
"""Shades of a map, of which the page has as many variables ``--ramp-0`` … and ``--on-ramp-0`` … for text on them."""
SHADES = [f"#0b00{n:02x}" for n in range(STEPS)]
ON_SHADES = [f"#0c00{n:02x}" for n in range(STEPS)]
_VARIABLES = {
    **{code: f"var(--{name})" for name, code in COLOURS.items()},
    **{code: f"var(--ramp-{n})" for n, code in enumerate(SHADES)},
    **{code: f"var(--on-ramp-{n})" for n, code in enumerate(ON_SHADES)},
}
WIDTH = 470
"""Points across a chart, which is as wide as half a page."""
_HEIGHT, _BOTTOM, _RIGHT = 270, 42, 14
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with two $ is no formula
    "font.family": ["DejaVu Sans"],  # comes with matplotlib; only measures, for the page's own fonts are no wider
    "font.size": 10.5,
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.columnspacing": 5.0,  # in a narrow page the letters are larger
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "round",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 6),
}


@contextlib.contextmanager
def canvas(height: float = _HEIGHT, left: float = 62, top: float = 20) -> Iterator[tuple[Any, Any]]:
    """A figure with its axes, in the page's style; what is drawn in the block takes that style.

    The margins are given and not found by measuring every text, which takes half of the time of a drawing.

    Args:
        height: of the figure, in points; as are the margins ``left`` of the axes, for their names, and on ``top``, for a legend.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        wide, high = WIDTH - left - _RIGHT, height - top - _BOTTOM
        axes = figure.add_axes((left / WIDTH, _BOTTOM / height, wide / WIDTH, high / height))
        axes.yaxis.set_label_coords((9 - left) / wide, 0.5)
        yield figure, axes


def width_of(names: Sequence[str]) -> float:
    """About how wide the longest name is at the axis, in points."""
    return 6.2 * max(map(len, shortened(names)), default=0)


def svg(figure: Any, key: str, description: str) -> str:
    """The figure as an element of a page, its colours the page's, its ids beginning with ``key``."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's fonts may have it
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    used = list(dict.fromkeys(re.findall(r"(?:href=\"|url\()#([^\")]+)", text)))
    names = {name: f"{key}-{number}" for number, name in enumerate(used)}
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", text)
    text = re.sub(r"(href=\"|url\()#([^\")]+)", lambda m: f"{m[1]}#{names[m[2]]}", text)
    text = re.sub(r"#0[abc]00[0-9a-f]{2}", lambda m: _VARIABLES[m[0]], text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's own
    text = re.sub(
        r"<[^>]*>", lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m[0]), text
    )  # hundredths of a point do not show
    text = re.sub(r"\s*\n\s*", " ", text)
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None, "matplotlib writes a view box"
    label = html.escape(clean(description))
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{label}">'
    return head + text[text.index(">") + 1 :].strip()


def thin(points: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the points, evenly, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(n * (len(points) - 1) / (most - 1))] for n in range(most)]


def said(text: str, longest: int = 60) -> str:
    """Text as a picture takes it: nothing that steers, not endless."""
    text = clean(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def shortened(names: Sequence[str]) -> list[str]:
    """Names as the ticks of an axis take them."""
    return [said(name, 24) for name in names]


def finite(value: float | None) -> float | None:
    """The number, where it is one that can be drawn."""
    return value if value is not None and math.isfinite(value) and abs(value) < 1e100 else None


def written(value: float | None) -> str:
    """A number in a table: four digits, or all of a whole number."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"
