"""What it cost, what the doctor said, and the job itself."""

from collections.abc import Mapping

from lamina.report import charts
from lamina.report.chapters.words import GIB, lasting, percent, size
from lamina.report.charts import Chart
from lamina.report.forms import Finding, Memory
from lamina.report.kept import Kept
from lamina.report.page import Page, Points

PARTS = {
    "data": "reading the data",
    "planning": "planning the memory",
    "check": "the doctor's check",
    "load": "loading the base",
    "base_evaluation": "evaluating the base",
    "training": "training steps",
    "evaluations": "evaluations",
    "saving": "saving",
    "card": "card",
    "explanation": "explanation",
}
"""How the page calls the parts of a run's time."""

ROWS = 12
"""Rows that a finding names."""


def cost(page: Page, kept: Kept) -> None:
    """Adds the chapter of memory and time."""
    section = page.section(
        "What it cost", "Memory as it was planned before the run and measured in it, and where the time went."
    )
    card = kept.card
    drawn = [] if card is None or card.memory is None else [_memory(card.memory)]
    if card is not None and card.seconds:
        drawn.append(_time(card.seconds))
    if drawn:
        section.chart(*drawn)
    if card is None or card.memory is None:
        section.note("There is no card.json with the memory plan and its measurement.")
    if card is None or not card.seconds:
        trained = lasting(sum(step.seconds for step in kept.steps))
        section.note(f"The run's time was not split into its parts; its training steps took {trained}.")


def findings(page: Page, kept: Kept) -> None:
    """Adds the chapter of the doctor."""
    section = page.section(
        "The doctor's findings", "What lamina check saw in job, model and data before the first step."
    )
    if kept.check is None:
        section.note("There is no check.json: the job was not checked before the run.")
    elif not kept.check.findings:
        section.text("Nothing was found.")
    else:
        section.add(Points([_finding(finding) for finding in kept.check.findings]))


def job(page: Page, kept: Kept) -> None:
    """Adds the chapter of the job."""
    section = page.section(
        "The job",
        "Everything that decides the run. Saved as job.toml it makes the same run again: lamina train job.toml",
    )
    section.code(f"job.toml, {len(kept.job.splitlines()):,} lines", kept.job)


def _memory(memory: Memory) -> Chart:
    plan = memory.planned
    share = memory.measured_bytes / plan.total_bytes if plan.total_bytes else 0.0
    large = plan.total_bytes >= GIB
    unit, by = ("GiB", GIB) if large else ("MiB", 2**20)
    items = [(name, amount) for name, amount in plan.items.items() if amount]
    names = [*(name for name, _ in items), "planned, all", "measured peak"]
    planned = [*(amount / by for _, amount in items), plan.total_bytes / by, memory.measured_bytes / by]
    when = f" The peak was expected at: {plan.moment}." if plan.moment else ""
    return charts.bars(
        "Memory",
        f"The plan item by item, and the peak that was measured: {size(memory.measured_bytes)}, {percent(share)} of the plan.{when}",
        names,
        {unit: planned},
        f"memory ({unit})",
    )


def _time(seconds: Mapping[str, float]) -> Chart:
    total = sum(seconds.values())
    known = [name for name in PARTS if name in seconds] + [name for name in seconds if name not in PARTS]
    largest = max(seconds, key=lambda name: seconds[name])
    share = seconds[largest] / total if total else 0.0
    return charts.bars(
        "Time",
        f"{lasting(total)} in all; {percent(share)} of it {PARTS.get(largest, largest)}.",
        [PARTS.get(name, name) for name in known],
        {"seconds": [seconds[name] for name in known]},
        "time (s)",
    )


def _finding(finding: Finding) -> tuple[str, str, list[str]]:
    rows = ", ".join(map(str, finding.rows[:ROWS])) + (
        f" and {len(finding.rows) - ROWS:,} more" if len(finding.rows) > ROWS else ""
    )
    further = [
        finding.why,
        f"To mend it: {finding.mend}" if finding.mend else "",
        f"Rows: {rows}" if finding.rows else "",
    ]
    grade = finding.grade if finding.grade in ("error", "warning", "note") else "note"
    return grade, f"{finding.found} ({finding.rule})", [line for line in further if line]
