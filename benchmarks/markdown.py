"""What the sections of docs/benchmarks.md are made of."""

import re

Row = dict[str, str]
NONE = "No rows yet.\n"


def table(head: str, lines: list[str]) -> str:
    """Cells with `` | `` between; columns of numbers stand to the right."""
    cells = [line.split(" | ") for line in lines]
    numbers = [all(re.match(r"[\d–]", line[column]) for line in cells) for column in range(len(cells[0]))]
    rule = "|".join("---:" if number else "---" for number in numbers)
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {line} |" for line in lines)]) + "\n"


def origin(rows: list[Row]) -> str:
    """When, of which commit, on which machine and with which versions rows were measured."""
    first = rows[0]
    versions = sorted({part for row in rows for part in re.findall(r"\S+ \S+", row["versions"])})
    return f"{first['date']}, commit {first['commit']}, {first['machine']}; {', '.join(versions)}."
