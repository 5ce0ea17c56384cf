"""How a diagnosis and its examples look: on a terminal in colour, in a pipe as plain text."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from lamina.data.render import Rendered, show
from lamina.doctor.finding import Diagnosis, Finding, Grade
from lamina.report.console import clean
from lamina.report.opening import marked

COLOURS: dict[Grade, str] = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}

# Neighbouring tokens differ in shade, so that every token can be seen; what is learnt is green, what only is read is grey.
_LEARNT, _READ, _SPECIAL = (
    ("black on green", "black on bright_green"),
    ("white on bright_black", "bright_white on black"),
    "bold white on magenta",
)
SHOWN = 320
"""Tokens of an example that are shown, the middle of longer ones left out."""


def told(diagnosis: Diagnosis) -> Iterator[Text]:
    """Every finding, in a paragraph each."""
    for finding in diagnosis.findings:
        yield _finding(finding)


def _finding(finding: Finding) -> Text:
    text = Text.assemble(
        (f"{finding.grade} ", COLOURS[finding.grade]), (finding.rule, "bold"), f": {clean(finding.found)}\n"
    )
    for name, said in (("rows", finding.place.partition(" ")[2]), ("why", finding.why), ("mend", finding.mend)):
        if said:
            text.append(f"  {name:<5} ", "dim").append(f"{clean(said)}\n")
    return text


def example(row: Rendered, tokenizer: Any, coloured: bool) -> Text:
    """A row as the model sees it: every token, learnt or not, special tokens visible."""
    tokens = show(row, tokenizer)
    if not coloured:
        return Text(clean(f"row {row.row}: {marked(tokens)}"))
    specials = {int(token) for token in tokenizer.all_special_ids}
    text = Text(f"row {row.row}: ", style="bold")
    for place, ((piece, learnt), token) in enumerate(zip(tokens, row.tokens.tolist(), strict=True)):
        if SHOWN // 2 <= place < len(tokens) - SHOWN // 2:
            if place == SHOWN // 2:
                text.append(f" … {len(tokens) - SHOWN:,} tokens … ", "not bold dim")
            continue
        shade = (_LEARNT if learnt else _READ)[place % 2]
        if token in specials:
            shade = _SPECIAL + (" underline" if learnt else "")
        text.append(clean(piece).replace("\n", "⏎\n"), f"not bold {shade}" if token not in specials else shade)
    return text


def legend() -> Text:
    """What the colours mean."""
    return Text.assemble(
        "two rows as the model sees them: ", (" learnt ", _LEARNT[0]), " ", (" read only ", _READ[0]), " ",
        (" special ", _SPECIAL), " ", (" special, learnt ", f"{_SPECIAL} underline"),
    )  # fmt: skip
