"""The page as Chromium shows it: silent, self-sufficient, every chart drawn, no wider than the screen, usable by keyboard."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser
from kept_run import write_kept

from lamina.reporting import report

pytestmark = pytest.mark.slow

HOSTILE = '<script>document.title="run"</script><img src=x onerror=alert(1)>{{7*7}} ' + "unbroken" * 40
DRAWN = """[...document.querySelectorAll('.chart svg')].map(svg => {
    const box = svg.getBoundingClientRect();
    return [box.width, box.height, svg.querySelectorAll('path').length, svg.querySelectorAll('text').length];
})"""
# Elements that stick out of the screen and lie in no box that scrolls.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(e =>
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, svg, .skip')).map(e => e.outerHTML.slice(0, 90))"""

# Tables that are wider than their place.
BESIDE = """[...document.querySelectorAll('section > .scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e =>
    e.getAttribute('aria-label').slice(0, 60))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(write_kept(tmp_path_factory.mktemp("page") / "run", text=HOSTILE))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1440, 1280, 390])
def test_the_page_shows_whole_and_asks_for_nothing(chromium: Browser, page: Path, width: int, dark: bool) -> None:
    chromium.show(page, width, dark)
    assert chromium.complaints == []
    assert chromium.requests == [page.resolve().as_uri()]
    drawn = chromium.evaluate(DRAWN)
    assert len(drawn) == 15
    assert all(w > 200 and h > 80 and paths > 3 and texts > 3 for w, h, paths, texts in drawn)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate(OUTSIDE) == []


def test_before_and_after_stand_on_a_phone(chromium: Browser, page: Path) -> None:
    chromium.show(page, 390)
    assert not {"The measures", "Answers side by side"} & set(chromium.evaluate(BESIDE))


def test_colours_follow_the_reader_and_can_be_told_apart(chromium: Browser, page: Path) -> None:
    """Text against its ground by WCAG's contrast: 4.5 and more; in both schemes."""
    for dark in (False, True):
        chromium.show(page, 1280, dark)
        ground = _rgb(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (sum(ground) < 384) == dark
        for what in (
            "p",
            ".lead",
            ".muted, .remark",
            ".chart svg text",
            "summary",
            ".error .grade",
            ".t.much",
            "nav a",
        ):
            style = chromium.evaluate(
                f"(e => [getComputedStyle(e).color, getComputedStyle(e).fill, e.tagName])(document.querySelector('{what}'))"
            )
            colour = _rgb(style[1] if style[2] == "text" else style[0])
            assert _contrast(colour, ground) >= 4.5, (what, colour, ground)


def test_keyboard_and_screen_reader(chromium: Browser, page: Path) -> None:
    chromium.show(page)
    key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
    chromium.call("Input.dispatchKeyEvent", type="keyDown", **key)
    assert chromium.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert chromium.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    assert chromium.evaluate("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
    wide = "[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0 && e.getAttribute('aria-label'))"
    assert chromium.evaluate(wide)
    assert chromium.evaluate("document.title") != "run"
    names = chromium.call("Accessibility.getFullAXTree")["nodes"]
    pictures = [n for n in names if n.get("role", {}).get("value") in ("image", "img")]
    assert len(pictures) == 15 and all(n["name"]["value"] for n in pictures)


def test_it_prints(chromium: Browser, page: Path) -> None:
    chromium.show(page)
    data = chromium.call("Page.printToPDF", printBackground=False)["data"]
    assert len(data) > 50_000
    chromium.call("Emulation.setEmulatedMedia", media="print")
    assert chromium.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    whole = "[...document.querySelectorAll('.code pre, section > .scroll')].every(e => e.scrollHeight <= e.clientHeight + 1)"
    assert chromium.evaluate(whole), "the whole job is on paper"
    assert chromium.evaluate(BESIDE) == [], "and no table sticks out of it"
    chromium.call("Emulation.setEmulatedMedia", media="")


def _rgb(colour: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", colour)[:3]]


def _contrast(one: list[int], other: list[int]) -> float:
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(rgb: list[int]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
