"""The code in the pages runs: README.md and docs/*.md, each page's blocks in order, in a folder of its own.

* ``python`` blocks run, and share their names along a page; ``<!-- not run: reason -->`` before a block leaves it out.
* ``bash`` blocks, and the lines with ``$`` of ``console`` blocks, run after ``<!-- run -->``; most take too long, or a GPU.
* The ``$ lamina …`` lines of a ``console`` block after ``<!-- refused -->`` run, end with status 2 and say the line below them.
* A page's pictures are drawn by its code: a block writes ``images/name.svg`` where the page shows ``images/name.svg``. That it
  is written is checked, and not that it has the bytes of the one beside the page, which another version may draw otherwise.
  benchmarks.md is written by a program, pictures and all: test_benchmarks.py.
* Every ``lamina …`` line, run or not, is a command with flags that exist; every relative link leads to a file, and to a
  heading where it names one.
"""

import contextlib
import importlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from lamina import cli
from lamina.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = (ROOT / "docs" / "benchmarks.md",)
MARK = re.compile(r"<!-- (run|refused|not run: \S.*) -->")


class Block(NamedTuple):
    """A fenced block: its language, its text, the line of its fence (from 0), and the mark before it."""

    language: str
    text: str
    line: int
    mark: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page in order."""
    mark = ""
    for token in MarkdownIt().parse(text):
        if token.type == "html_block" and (found := MARK.fullmatch(token.content.strip())):
            mark = found[1]
        elif token.type == "fence":
            assert token.map is not None, "markdown-it gives block tokens their lines"
            yield Block(token.info.split(" ")[0], token.content, token.map[0], mark)
            mark = ""
        elif token.nesting == 0:
            mark = ""


def script(block: Block) -> str:
    """The commands of a block in a shell's language; the rest of a console block is output."""
    if block.language in ("bash", "sh"):
        return block.text
    return "\n".join(line[2:] for line in block.text.splitlines() if line.startswith("$ "))


def refuse(block: Block, where: str) -> None:
    """Runs the commands of a block, each of which must be refused with the line that the block shows."""
    for command, expected in itertools.pairwise(block.text.splitlines()):
        if command.startswith("$ lamina "):
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                status = cli.main(shlex.split(command)[2:])
            assert (status, said.getvalue().strip()) == (2, expected), f"{where}: {command}"


def run_page(page: Path) -> None:
    """Runs a page's blocks in the current folder."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python" and not block.mark.startswith("not run"):
            source = "\n" * (block.line + 1) + block.text  # so that a traceback names the page's lines
            exec(compile(source, str(page), "exec"), names)
        elif block.mark == "refused":
            refuse(block, f"{page.name}:{block.line + 1}")
        elif block.language in ("bash", "sh", "console") and block.mark == "run":
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script(block)],
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{page.name}:{block.line + 1}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """The line (from 1) and the words of each ``lamina …`` command in a page's blocks, up to a pipe or redirection."""
    for block in blocks(text):
        if block.language in ("bash", "sh", "console") and block.mark != "refused":
            for number, line in enumerate(block.text.replace("\\\n", "  ").splitlines(), block.line + 2):
                for found in re.finditer(r"(?:^|[|;&] )(?:\$ )?(?:\S*/)?lamina (?=[a-z])([^|>;&]*)", line):
                    yield number, shlex.split(found[1], comments=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)
    assert page in WRITTEN or undrawn(page, tmp_path) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    for line, (name, *arguments) in commands(page.read_text(encoding="utf-8")):
        assert name in cli.COMMANDS, f"{page.name}:{line}: lamina {name} is no command"
        parser = cli.parser_of(name, importlib.import_module(f"lamina.commands.{name}"))
        try:
            parser.parse(arguments)
        except ConfigError as error:
            pytest.fail(f"{page.name}:{line}: {error}")


def anchors(text: str) -> set[str]:
    """The headings of a page as links name them: in lower case, without punctuation, hyphens for spaces."""
    tokens = MarkdownIt().parse(text)
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline(page: Path) -> Iterator[Token]:
    """What stands in the paragraphs of a page: text, links, pictures."""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        yield from token.children or ()


def pictures(page: Path) -> list[str]:
    """The pictures that a page shows."""
    return [unquote(str(token.attrs["src"])) for token in inline(page) if token.type == "image"]


def undrawn(page: Path, folder: Path) -> list[str]:
    """The pictures of a page that its code, run in a folder, did not draw there."""
    drawn = {str(file.relative_to(folder)) for file in folder.rglob("*.svg") if is_picture(file)}
    return [picture for picture in pictures(page) if picture not in drawn]


def is_picture(file: Path) -> bool:
    """Whether a file is an SVG that draws something."""
    return any(part.tag.endswith("}path") for part in ElementTree.parse(file).iter())


def lost(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere, and its pictures that are not there."""
    links = [unquote(str(token.attrs["href"])) for token in inline(page) if token.type == "link_open"]
    bad = []
    for link in links + pictures(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    assert lost(page) == []


def test_what_is_lost(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Why α/R: a `title`\n[a](#why-αr-a-title) [b](#why) [c](page.md#why-αr-a-title) [d](none.md) [e](https://none.x/#y)\n"
        "![f](images/none.svg)\n",
        encoding="utf-8",
    )
    assert lost(page) == ["#why", "none.md", "images/none.svg"]


def test_what_is_undrawn(tmp_path: Path) -> None:
    page, images = tmp_path / "page.md", tmp_path / "run" / "images"
    page.write_text("![a](images/a.svg)\n\n![b](images/b.svg) ![c](images/c.svg)\n", encoding="utf-8")
    images.mkdir(parents=True)
    root = '<svg xmlns="http://www.w3.org/2000/svg">{}</svg>'
    (images / "a.svg").write_text(root.format('<path d="M 0 0"/>'), encoding="utf-8")
    (images / "b.svg").write_text(root.format(""), encoding="utf-8")
    assert undrawn(page, tmp_path / "run") == ["images/b.svg", "images/c.svg"]


PAGE = """\
<!-- not run: it needs a GPU -->
```python
1 / 0
```

```python
from pathlib import Path
x = 1
```

Text between.

<!-- run -->
```console
$ echo one > one.txt
this is output
```

```bash
exit 1
lamina train demo --rank 8 | tee log   # a comment
printf 'Hello' | lamina chat runs/demo-1
```

```python
assert Path("one.txt").read_text() == "one\\n" and x == 1
```
"""


def test_what_runs_and_what_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    run_page(page)
    assert list(commands(PAGE)) == [(21, ["train", "demo", "--rank", "8"]), (22, ["chat", "runs/demo-1"])]

    page.write_text(PAGE + "```python\nx / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError) as error:
        run_page(page)
    assert error.traceback[-1].lineno + 1 == 29

    said = "lamina: found command 'trian', which is unknown; did you mean {}?; see `lamina --help`"
    refusal = f"<!-- refused -->\n```console\n$ lamina trian\n{said}\n```\n"
    page.write_text(refusal.format("train"), encoding="utf-8")
    run_page(page)
    page.write_text(refusal.format("chat"), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"page\.md:2: \$ lamina trian"):
        run_page(page)

    page.write_text("<!-- run -->\n```bash\nfalse\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"page\.md:2"):
        run_page(page)
