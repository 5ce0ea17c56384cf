"""A page: one HTML file of sections with text, tables and charts, that opens from disk and asks nobody for anything.

    page = Page("What each fault did", "Job B on the demo base, each fault alone")
    section = page.section("The table", "Every row is a run of 150 steps.")
    section.table(Table("Fault by fault", ["fault", "stop rate"], [["none", "100 %"], ["masked-end", "0 %"]]))
    section.chart(charts.bars("Stop rate", "Longer is better.", ["none", "masked-end"], {"adapter": [1.0, 0.0]}, "share"))
    page.write(folder / "replay.html")

What is put in is plain text, everywhere. The template escapes whatever it prints, and the control characters that ``clean`` knows
are taken out on the same way, so that neither can be forgotten: a row of a data set that says ``<script>`` or ``{{7*7}}`` shows
as that. The one exception is ``Drawing``, which only ``drawing.svg`` makes. The page has no script, and its policy forbids any, as
it forbids every request.

Rejected: a page that a script draws from JSON (it prints badly, says nothing to a reader without scripts, and is a megabyte of
library); building strings by hand (the one place where escaping is forgotten is the one that counts).
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from lamina.report import charts
from lamina.report.console import clean
from lamina.report.drawing import svg
from lamina.report.record import write_text

_NUMBER = re.compile(
    r"[-−+≤≥<>≈ ]*[\d.,]+(e[-+]?\d+)?([ \u00a0]?(%|s|ms|min|h|nats|GiB|MiB|GB|MB|B)( \d\d? (s|min))?)?|[-–—]|"
)


@dataclass(frozen=True)
class Table:
    """A table: what it shows, the names of its columns, and its rows, of which the first cell names the row."""

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    stacks: bool = False
    """On a narrow screen the cells of a row stand below each other; for long texts."""

    @property
    def kinds(self) -> list[str]:
        """The class of each column: n for numbers only, set to the right; s for short texts, not broken; else nothing."""
        cells = [[row[column] for row in self.rows] for column in range(len(self.columns))]
        return [
            "n" if n and all(map(_NUMBER.fullmatch, of)) else "s" if _short(of) else "" for n, of in enumerate(cells)
        ]


@dataclass(frozen=True)
class Text:
    """A paragraph; ``muted`` for a remark, such as that something was not measured."""

    kind: ClassVar[str] = "text"
    text: str
    muted: bool = False


@dataclass(frozen=True)
class Sayings:
    """Sentences that each stand beside a word that says what they are about."""

    kind: ClassVar[str] = "sayings"
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Points:
    """A list of remarks, each under a word that says how grave it is, or under none."""

    kind: ClassVar[str] = "points"
    items: Sequence[tuple[str, str, Sequence[str]]]
    """(grade, what, further lines); the grades error, warning and note have signs of their own."""


@dataclass(frozen=True)
class Code:
    """Text as it is written, folded away under its title."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Token:
    """A token with a figure below it; ``shade`` is one of the classes that ``Tokens`` explains, empty for none."""

    text: str
    shade: str = ""
    below: str = ""


@dataclass(frozen=True)
class Tokens:
    """A text token by token, shaded, with figures below the tokens."""

    kind: ClassVar[str] = "tokens"
    title: str
    tokens: Sequence[Token]
    legend: Sequence[tuple[str, str]]
    """(shade, what it means)."""
    caption: str = ""


class Drawing(str):
    """Text that is not escaped: a picture drawn by ``drawing.svg``, whose texts matplotlib has escaped."""

    def __html__(self) -> str:
        return self


@dataclass
class Section:
    """A chapter of a page; blocks stand in the order in which they are added."""

    title: str
    lead: str = ""
    key: str = ""
    blocks: list[Any] = field(default_factory=list)

    def add(self, block: Any) -> None:
        """Adds a block of any kind."""
        self.blocks.append(block)

    def text(self, text: str) -> None:
        """Adds a paragraph."""
        self.add(Text(text))

    def note(self, text: str) -> None:
        """Adds a remark, such as that something was not measured."""
        self.add(Text(text, muted=True))

    def table(self, table: Table) -> None:
        """Adds a table; one that is wider than the screen scrolls in a box of its own."""
        self.add(table)

    def chart(self, *chart: charts.Chart) -> None:
        """Adds charts, which stand side by side where there is room; their numbers are folded away below each."""
        self.add(Charts([Figure(one) for one in chart]))

    def code(self, title: str, text: str) -> None:
        """Adds a text as it is written, folded away."""
        self.add(Code(title, text))


@dataclass
class Figure:
    """A chart in its place in the page."""

    chart: charts.Chart
    key: str = ""

    @property
    def drawing(self) -> Drawing:
        """The picture, with names that no other picture of the page has."""
        return Drawing(svg(self.chart.figure, self.key, f"{self.chart.title}. {self.chart.caption}"))

    @property
    def table(self) -> Table:
        """The numbers that are drawn."""
        return Table(self.chart.title, self.chart.columns, self.chart.rows)


@dataclass
class Charts:
    """Charts side by side."""

    kind: ClassVar[str] = "charts"
    figures: list[Figure]


@dataclass
class Page:
    """A page under construction.

    Args:
        title: its heading, and the title of the window.
        lead: one line below it.
        facts: (name, value) pairs that stand above the first section.
        foot: the last line.
    """

    title: str
    lead: str = ""
    facts: Sequence[tuple[str, str]] = ()
    foot: str = ""
    sections: list[Section] = field(default_factory=list)

    def section(self, title: str, lead: str = "") -> Section:
        """Begins a section; its link is its number."""
        self.sections.append(Section(title, lead, f"section-{len(self.sections) + 1}"))
        return self.sections[-1]

    def html(self) -> str:
        """The whole file; the same for the same content."""
        blocks = [block for section in self.sections for block in section.blocks]
        figures = [figure for block in blocks if isinstance(block, Charts) for figure in block.figures]
        for number, figure in enumerate(figures, 1):
            figure.key = f"chart-{number}"
        return _environment().get_template("page.html").render(page=self)

    def write(self, path: Path) -> None:
        """Writes the page whole or not at all."""
        write_text(path, self.html())


def _short(cells: Sequence[str]) -> bool:
    return all(len(cell) <= 36 and "\n" not in cell for cell in cells)


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("lamina.report"),
        autoescape=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
