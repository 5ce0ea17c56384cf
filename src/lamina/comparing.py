"""Runs side by side, from what they left: their jobs and their cards. No model is loaded.

Two adapters are compared on the same rows or not at all. That the rows are the same is told by their fingerprint; then the
difference of two runs is paired over the groups of rows whose sums a card keeps, as the difference to the base is, and its
interval is that of the difference and not of two separate measures.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.errors import CheckpointError, ConfigError
from lamina.job import Job, read_job
from lamina.understand.bootstrap import three_digits
from lamina.understand.card import ANSWERS, KINDS, MEASURES, TOKENS, held_out_text, named

MISSING = "–"
DIGITS = "three digits"
"""The form of numbers of any size: three digits of the value, and as many decimals of its interval and its difference."""
COLUMNS = {"held_out": 3, "answers": 4, "neutral": 3}
"""Sums that a card keeps of each group of rows."""
_FIGURES = (
    ("steps", "steps", ",.0f"),
    ("supervised tokens", "supervised_tokens", ",.0f"),
    ("adapter's parameters", "adapter_parameters", ",.0f"),
    ("seconds of training", "training_seconds", ",.1f"),
)


@dataclass(frozen=True)
class Cell:
    """What one run has of a measure, with its 95 % interval and its difference from the first run; None where there is none.

    ``difference`` is the value, or the value and the ends of its interval.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    difference: tuple[float, ...] | None = None

    def text(self, form: str) -> str:
        """The cell as a table has it."""
        if self.value is None:
            return MISSING
        form = three_digits(self.value) if form == DIGITS else form
        factor, form, unit = (100, ".1f", " %") if form.endswith("%") else (1, form, "")
        said = format(factor * self.value, form) + unit
        if self.interval:
            said += f" [{', '.join(format(factor * end, form) for end in self.interval)}]"
        if self.difference:
            value, *ends = (format(factor * number, f"+{form}") for number in self.difference)
            said += f"; {value}{f' [{ends[0]}, {ends[1]}]' if ends else ''}"
        return said


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    runs: tuple[str, ...]
    settings: Mapping[str, tuple[Any, ...]]
    """The settings that differ, by name, as each run has them."""
    measures: Mapping[str, tuple[str, str, tuple[Cell, ...]]]
    """By their key in the card: how a measure is called, how it is written, and what each run has."""
    notes: tuple[str, ...]
    """What must be known before two numbers are compared."""

    def tables(self) -> Iterator[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """The settings that differ and the measures, as columns and rows."""
        if self.settings:
            rows = [(name, *map(_setting, values)) for name, values in self.settings.items()]
            yield ("settings that differ", *self.runs), rows
        measures = [
            (name, *(cell.text(form) for cell in cells))
            for name, form, cells in self.measures.values()
            if any(cell.value is not None for cell in cells)
        ]
        yield ("measure [95 % interval]; difference from the first run", *self.runs), measures

    def as_json(self) -> dict[str, Any]:
        """The comparison for machines."""
        return {
            "runs": list(self.runs),
            "settings": {name: list(values) for name, values in self.settings.items()},
            "measures": {
                key: [{"value": c.value, "interval": c.interval, "difference": c.difference} for c in cells]
                for key, (_, _, cells) in self.measures.items()
            },
            "notes": list(self.notes),
        }


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Compares finished runs by their cards, each with the first.

    Args:
        runs: their folders, at least two.

    Raises:
        ConfigError: fewer than two, or one twice.
        CheckpointError: a folder that is no run's, a run without a card, or a damaged card.
    """
    names = tuple(map(str, runs))
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"found {', '.join(names) or 'no runs'}, expected at least two runs, each of them once")
    jobs, cards = [read_job(Path(name)) for name in names], [_Card(Path(name)) for name in names]
    counted = TOKENS if any(map(_all_counted, jobs, cards)) else ANSWERS
    measures = {
        f"{part}.{key}": (named(name, counted), form, tuple(_cell(cards[0], card, part, key) for card in cards))
        for name, part, key, form in MEASURES
    }
    distances = {
        f"kl.{key}": (
            f"KL to the base, {name}",
            DIGITS,
            tuple(Cell(card.number("kl", key, "mean"), card.span("kl", key, "interval")) for card in cards),
        )
        for name, key in ((held_out_text(counted), "answers"), ("neutral text", "neutral"))
    }
    knees = {"dose.knee": ("knee of the dose curve", ".2f", tuple(Cell(card.number("dose", "knee")) for card in cards))}
    figures = {key: (name, form, tuple(Cell(card.number(key)) for card in cards)) for name, key, form in _FIGURES}
    return Comparison(names, _differing(jobs), measures | distances | knees | figures, tuple(_notes(names, cards)))


class _Card:
    """A card as it was written, perhaps by an older version: what it does not hold is None."""

    def __init__(self, run: Path) -> None:
        self.path = run / "card.json"
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error.strerror}), expected the card of a finished run; `lamina train --resume "
                f"{run}` finishes it"
            ) from None
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: damaged ({error}); `lamina train --resume {run}` writes it again"
            ) from None
        self.run, self.found = run, found
        if not isinstance(found, dict):
            raise self.damaged("the card", found, "an object")

    def damaged(self, what: str, found: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: damaged: found {json.dumps(found)[:40]} as {what}, expected {expected}; `lamina train --resume "
            f"{self.run}` writes it again"
        )

    def at(self, *keys: str) -> Any:
        """What stands there; None where anything on the way to it is missing."""
        found = self.found
        for number, key in enumerate(keys):
            if found is None:
                return None
            if not isinstance(found, dict):
                raise self.damaged(".".join(keys[:number]), found, "an object")
            found = found.get(key)
        return found

    def number(self, *keys: str) -> float | None:
        """A number."""
        found = self.at(*keys)
        if found is not None and (isinstance(found, bool) or not isinstance(found, int | float)):
            raise self.damaged(".".join(keys), found, "a number")
        return found

    def span(self, *keys: str) -> tuple[float, float] | None:
        """Two numbers."""
        found = self.at(*keys)
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != 2 or not all(isinstance(end, int | float) for end in found):
            raise self.damaged(".".join(keys), found, "two numbers")
        return found[0], found[1]

    def sums(self, part: str) -> NDArray[np.float64] | None:
        """The adapter's sums over groups of rows, [G, K]."""
        found = self.at("adapter", part, "sums")
        if found is None:
            return None
        try:
            made = np.array(found, dtype=np.float64)
        except (TypeError, ValueError):
            made = np.zeros(0)
        if made.ndim != 2 or made.shape[1] != COLUMNS[part]:
            raise self.damaged(f"adapter.{part}.sums", found, f"rows of {COLUMNS[part]} numbers")
        return made

    def rows(self) -> list[Any]:
        """The numbers of the rows that were asked."""
        found = self.at("adapter", "answers", "rows") or []
        return [answer.get("row") for answer in found if isinstance(answer, dict)]


def _all_counted(job: Job, card: _Card) -> bool:
    """Whether all tokens of the held-out rows were judged, and not only those of the answers; an older card does not tell."""
    return (card.at("counted") or (TOKENS if job.data.train_on == "everything" else ANSWERS)) == TOKENS


def _cell(first: _Card, card: _Card, part: str, key: str) -> Cell:
    value = card.number("adapter", part, key)
    span = card.span("adapter", part, "intervals", key)
    before = first.number("adapter", part, key)
    if card is first or value is None or before is None or not _same_rows(first, card, part):
        return Cell(value, span)
    mine, theirs = card.sums(part), first.sums(part)
    # The last column counts tokens or answers, alike in groups of the same rows; an older card groups pieces of rows.
    if mine is None or theirs is None or not np.array_equal(mine[:, -1], theirs[:, -1]):
        return Cell(value, span, (value - before,))
    ends = KINDS[part].measures(theirs, mine)[key].difference_interval
    return Cell(value, span, (value - before, *(ends or ())))


def _same_rows(first: _Card, card: _Card, part: str) -> bool:
    """Whether two runs were measured on the same rows, as far as their cards tell."""
    if part == "neutral":  # the same base does not find two texts equally hard
        sides = [(one.at("base_fingerprint"), one.number("base", part, "loss")) for one in (first, card)]
        return sides[0] == sides[1] and None not in sides[0]
    prints = [one.at("held_out_fingerprint") for one in (first, card)]
    same = prints[0] is not None and prints[0] == prints[1]
    return same and (part != "answers" or first.rows() == card.rows())


def _notes(names: Sequence[str], cards: Sequence[_Card]) -> Iterator[str]:
    for key, what, so in (
        ("held_out_fingerprint", "held-out rows", "losses and answers cannot be compared with those of"),
        ("base_fingerprint", "base", "what the adapters changed cannot be compared with"),
    ):
        prints = [card.at(key) for card in cards]
        if unknown := [name for name, found in zip(names, prints, strict=True) if found is None]:
            yield f"{', '.join(unknown)}: the card (of an older version?) does not tell which {what} it is about"
        others = [name for name, found in zip(names, prints, strict=True) if found is not None and found != prints[0]]
        if prints[0] is not None and others:
            yield f"other {what} in {', '.join(others)}: {so} {names[0]}"


def _differing(jobs: Sequence[Job]) -> dict[str, tuple[Any, ...]]:
    """The settings that are not the same in all jobs; what a run is called and where it lies is no difference."""
    found = {}
    for name, section in jobs[0].sections().items():
        for setting in (f.name for f in fields(section)):
            values = tuple(getattr(job.sections()[name], setting) for job in jobs)
            if any(value != values[0] for value in values) and (name or setting not in ("name", "out")):
                found[f"{name}.{setting}".lstrip(".")] = values
    return found


def _setting(value: Any) -> str:
    return "none" if value is None else str(value)
