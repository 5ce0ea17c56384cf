"""All rules, in the order in which findings of one grade are told: declared faults, the text, the rows, the learning, the machine."""

from collections.abc import Callable, Iterator

from lamina.doctor import declared, learning, machine, rows, text
from lamina.doctor.case import Case
from lamina.doctor.finding import Finding

Rule = Callable[[Case], Iterator[Finding]]

RULES: tuple[Rule, ...] = (*declared.RULES, *text.RULES, *rows.RULES, *learning.RULES, *machine.RULES)


def findings(case: Case) -> Iterator[Finding]:
    """What every rule finds in a case."""
    for rule in RULES:
        yield from rule(case)
