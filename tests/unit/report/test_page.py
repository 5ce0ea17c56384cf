"""The page: what comes from outside is text, whatever it says; the same content gives the same bytes; nothing is fetched."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba

from lamina.report import charts
from lamina.report.drawing import COLOURS, svg, thin
from lamina.report.page import Page, Points, Table, Token, Tokens

HOSTILE = '<script>alert(1)</script>{{7*7}}{% raw %}" onload="x" \'&amp;\x00\x1b[2J\u202e\ud800 $a$ ]]>-->'


class Reader(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def full(text: str = HOSTILE) -> Page:
    """A page with every kind of block, all texts of it the same."""
    page = Page(text, text, [(text, text)], text)
    section = page.section(text, text)
    section.text(text)
    section.note(text)
    section.code(text, text)
    section.table(Table(text, [text, text], [[text, text]], text))
    section.add(Points([("warning", text, [text])]))
    section.add(Tokens(text, [Token(text, "much", text)], [("much", text)], text))
    line = charts.Line(text, [1, 2, 3], [1.0, None, 2.0])
    section.chart(
        charts.lines(text, text, [line, charts.Line("b", [1], [2.0])], text, text),
        charts.bars(text, text, [text], {text: [1.0], "b": [2.0]}, text),
        charts.heat(text, text, ([text], [text]), [[1.0]], (text, text, text)),
    )
    return page


def test_untrusted_text_stays_text() -> None:
    html = full().html()
    plain, hostile = Reader(full("plain").html()), Reader(html)
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert {name for _, attributes in hostile.elements for name in attributes} == {
        name for _, attributes in plain.elements for name in attributes
    }
    assert "script" not in {tag for tag, _ in hostile.elements}
    html.encode("utf-8")
    assert not set("\x00\x1b\u202e\ud800") & set(html)
    assert any("<script>alert(1)</script>{{7*7}}" in word for word in hostile.words)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    page = full("a")
    page.write(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == full("a").html() == page.html()


def test_names_of_elements_are_unique_and_references_lead_somewhere() -> None:
    html = full("a").html()
    names = [attributes["id"] for _, attributes in Reader(html).elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {*re.findall(r'href="#([^"]+)"', html), *re.findall(r"url\(#([^)]+)\)", html)} <= set(names)


def test_nothing_is_fetched_and_nothing_runs() -> None:
    elements = Reader(full("a").html()).elements
    places = [a[name] for _, a in elements for name in ("src", "href", "xlink:href", "action") if name in a]
    assert all(place is not None and place.startswith(("#", "data:")) for place in places)
    policy = next(a["content"] for tag, a in elements if tag == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_a_page_can_be_used_without_a_mouse_and_without_eyes() -> None:
    elements = Reader(full("a").html()).elements
    assert ("html", {"lang": "en"}) in elements
    levels = [int(tag[1]) for tag, _ in elements if tag in {"h1", "h2", "h3"}]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert next(a for tag, a in elements if tag == "a") == {"class": "skip", "href": "#content"}
    assert all("scope" in a for tag, a in elements if tag == "th")
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for _, a in elements if a.get("class") == "scroll")
    pictures = [a for tag, a in elements if tag == "svg"]
    assert len(pictures) == 3 and all(a["role"] == "img" and a["aria-label"] == "a. a" for a in pictures)
    assert sum(tag == "details" for tag, _ in elements) == len(pictures) + 1  # the numbers of each, and the code


def test_colours_are_the_pages() -> None:
    html = full("a").html()
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, re.S))
    assert set(re.findall(r"#[0-9a-f]{6}\b", pictures)) == set()
    style = html[: html.index("</style>")]
    assert set(re.findall(r"var\((--[\w-]+)\)", pictures)) <= set(re.findall(r"(--[\w-]+):", style))


@pytest.mark.parametrize(
    "value",
    [
        None,
        float("nan"),
        *(
            pytest.param(value, marks=pytest.mark.slow)
            for value in (float("inf"), -float("inf"), 1e308, -1e308, 1e-320, 0.0)
        ),
    ],
)
def test_numbers_that_cannot_be_drawn_are_gaps(value: float | None) -> None:
    page = Page("a")
    section = page.section("b")
    line = charts.Line("x", [1, 2], [value, value])
    section.chart(
        charts.lines("l", "", [line], "x", "y"),
        charts.lines("g", "", [line], "x", "y", log="xy", marks=[(1, "here")]),
        charts.bars("b", "", ["x", "y"], {"a": [value, 1.0]}, "y"),
        charts.heat("h", "", (["x"], ["y", "z"]), [[value, value]], ("r", "c", "v")),
    )
    assert page.html().count("<svg") == 4


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    assert thin(range(1000), 5) == [0, 250, 500, 749, 999]
    assert thin([1, 2], 5) == [1, 2]
    x = list(range(100_000))
    chart = charts.lines("l", "", [charts.Line("x", x, [float(n) for n in x])], "step", "loss")
    assert len(chart.rows) == charts.ROWS and chart.rows[-1] == ["99,999", "99,999"]
    assert len(svg(chart.figure, "k", "d")) < 30_000


def test_numbers_stand_to_the_right_and_short_texts_are_not_broken() -> None:
    rows = [["1", "1.5 %", "3 min 20 s", "word", "–"], ["2", "−0.1", "1,024 MiB", "5", "[-1.0, 2.0]"]]
    assert Table("t", ["a", "b"], [["1", "long " * 9]]).kinds == ["s", ""]
    assert Table("t", list("abcde"), rows).kinds == ["s", "n", "n", "s", "s"]


def texts(chart: charts.Chart) -> list[str]:
    """What is written into a drawing, without its axes."""
    return [text.get_text() for text in chart.figure.axes[0].texts]


def test_values_are_written_into_a_map_only_where_they_fit() -> None:
    def drawn(columns: int) -> list[str]:
        names = ["0", "1"], [str(n) for n in range(columns)]
        return texts(charts.heat("a", "b", names, [[1.0] * columns] * 2, ("layer", "step", "norm")))

    assert drawn(10) == ["1"] * 20 and drawn(11) == []


def test_what_hardly_differs_is_drawn_flat() -> None:
    chart = charts.lines("a", "b", [charts.Line("loss", [1, 2], [6.79768625, 6.79768600])], "step", "loss")
    low, high = chart.figure.axes[0].get_ylim()
    assert high - low == pytest.approx(0.01 * 6.7977, rel=1e-3), "a hundredth of the values"
    chart = charts.lines("a", "b", [charts.Line("loss", [1, 2], [1.0, 2.0])], "step", "loss")
    assert chart.figure.axes[0].get_ylim() == pytest.approx((0.95, 2.05)), "matplotlib's own margin"


def test_no_bar_but_the_bases_has_the_bases_colour() -> None:
    chart = charts.bars("a", "b", ["x"], {"stop": [1.0], "exact": [0.5], "other": [0.2]}, "%")
    drawn = {patch.get_facecolor() for patch in chart.figure.axes[0].patches}
    assert len(drawn) == 3 and to_rgba(COLOURS["base"]) not in drawn
