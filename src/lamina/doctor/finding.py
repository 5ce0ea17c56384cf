"""What the doctor finds, and all that it found."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lamina.data.lengths import Cut

Grade = Literal["error", "warning", "note"]
GRADES: tuple[Grade, ...] = ("error", "warning", "note")
LISTED = 10
"""Row numbers written out for people; the record holds them all."""


def counted(number: int, name: str) -> str:
    """A number of things: 1 row, 2 rows."""
    return f"{number:,} {name}{'s' * (number != 1)}"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a job, or worth knowing.

    Args:
        rule: its name, which stays the same.
        grade: ``error``: the run fails, or cannot give what it is for; ``warning``: it gives less than it could; ``note``: worth
            knowing, and perhaps meant.
        found: what was found, with numbers.
        why: why it matters.
        mend: the exact setting or step that mends it.
        rows: numbers of the rows concerned.
    """

    rule: str
    grade: Grade
    found: str
    why: str
    mend: str
    rows: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        """The rows concerned in words, or nothing."""
        more = f" and {len(self.rows) - LISTED:,} more" if len(self.rows) > LISTED else ""
        name = "row" if len(self.rows) == 1 else "rows"
        return f"{name} {', '.join(map(str, self.rows[:LISTED]))}{more}" if self.rows else ""

    def line(self) -> str:
        """The finding in a line: what, and how to mend it."""
        place = f" ({self.place})" if self.rows else ""
        return f"doctor: {self.grade} {self.rule}: {self.found}{place}; {self.mend}"


@dataclass(frozen=True)
class Diagnosis:
    """All findings, errors first, and what cutting the rows at several lengths would lose."""

    findings: tuple[Finding, ...]
    lengths: tuple[Cut, ...] = ()

    @classmethod
    def of(cls, findings: Iterable[Finding], lengths: Iterable[Cut] = ()) -> "Diagnosis":
        """Puts the findings in order: by grade, and within a grade as they were found."""
        return cls(tuple(sorted(findings, key=lambda finding: GRADES.index(finding.grade))), tuple(lengths))

    def graded(self, grade: Grade) -> tuple[Finding, ...]:
        """The findings of a grade."""
        return tuple(finding for finding in self.findings if finding.grade == grade)

    def summary(self) -> str:
        """How many of which grade."""
        count = Counter(finding.grade for finding in self.findings)
        parts = [counted(count[grade], grade) for grade in GRADES if count[grade]]
        return ", ".join(parts) or "a clean bill: nothing found"

    def short(self) -> Iterator[str]:
        """Errors and warnings in a line each, for the beginning of a run; which says by itself when memory does not suffice."""
        yield from (f.line() for f in self.findings if f.grade != "note" and f.rule != "memory")

    def as_json(self) -> dict[str, Any]:
        """The diagnosis for machines."""
        return {
            "findings": [asdict(finding) | {"rows": list(finding.rows)} for finding in self.findings],
            "lengths": [cut._asdict() for cut in self.lengths],
        }
