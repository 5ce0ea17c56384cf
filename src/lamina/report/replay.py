"""What a replay found, as a table, as sentences made from its numbers, and as a page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamina.report.charts import Chart, bars
from lamina.report.page import Page, Points, Sayings, Table
from lamina.understand.beside import Outcome, changes
from lamina.understand.bootstrap import Paired

COLUMNS = ("variant", "held-out loss", "ends by itself", "word for word", "tokens", "KL from base", "left in bf16")

UNFINISHED = "did not finish: "
"""Begins the reason of a variant whose run ended before it could be measured."""

_NAMES = {
    "stop_rate": "answers that end by themselves",
    "exact_match": "answers that are the data's word for word",
    "mean_tokens": "the mean length of an answer",
    "loss": "the held-out loss",
    "kl": "the distance from the base (KL)",
}
_PLURAL = ("stop_rate", "exact_match")
_ASKED = 3  # prompts whose answers stand side by side
_LEAD = (
    "Every variant is the mended job with one thing as the original has it, over the same frozen base. A difference is named where it goes "
    "beyond the chance of which rows are held out (95 %, paired) and beyond what another seed did to the mended job."
)
_CAPTION = (
    "Loss and KL in nats per answer token; answers that end by themselves, and that are the data's word for word; their mean length in "
    "tokens; and the share of the update that is left after a merge in bf16."
)
_SLIGHT = 0.02  # relative, of what is no share: below it a difference is not worth a word, however sure
_UNCHANGED = 0.05  # share of answers that training left as they were, above which it is told
_WAVES = 0.3  # of a correlation: some 250 steps at random stay within 0.13 of zero
_FADING = 0.95  # share of the update that is left after rounding, below which it is told


@dataclass(frozen=True)
class Entry:
    """A row of a replay.

    Attributes:
        outcome: what was measured; None where nothing was.
        facts: numbers of the run or of the merge, by name.
        reason: why nothing was measured.
    """

    name: str
    what: str
    outcome: Outcome | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def unfinished(self) -> bool:
        """Whether it was committed, and its run ended before it could be measured."""
        return self.reason.startswith(UNFINISHED)

    @property
    def out_of_memory(self) -> bool:
        """Whether the machine ended it, and not its fault."""
        return self.reason.startswith(f"{UNFINISHED}out of memory")

    def as_json(self) -> dict[str, Any]:
        """The entry for machines."""
        measured = None if self.outcome is None else self.outcome.as_json()
        return {
            "name": self.name,
            "what": self.what,
            "facts": dict(self.facts),
            "reason": self.reason,
            "outcome": measured,
        }

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> "Entry":
        """The entry that ``as_json`` wrote."""
        measured = None if found["outcome"] is None else Outcome.of_json(found["outcome"])
        return cls(found["name"], found["what"], measured, found["facts"], found["reason"])


def rows(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """The cells of the table, a row an entry."""
    return [_cells(entry) for entry in entries]


def _cells(entry: Entry) -> tuple[str, ...]:
    if entry.outcome is None:
        return (entry.name, *["-"] * (len(COLUMNS) - 1))
    found = entry.outcome.measures
    shown = [_shown(measure, found[measure]) for measure in ("loss", "stop_rate", "exact_match", "mean_tokens", "kl")]
    left = entry.facts.get("survived")
    return (entry.name, *shown, "-" if left is None else f"{left:.0%}")


def _shown(measure: str, value: float | None) -> str:
    if value is None:
        return "-"
    if measure in _PLURAL:
        return f"{value:.1%}"
    return f"{value:.1f}" if measure == "mean_tokens" else f"{value:.4f}"


def sentence(entry: Entry, entries: Sequence[Entry]) -> str:
    """What a variant did, made from its numbers: what differs from the mended job beyond chance.

    Chance is that of the held-out rows, a 95 % interval of the paired differences, and that of the training: what another seed did to the
    mended job.
    """
    mended, chance = (next((one for one in entries if one.name == name), None) for name in ("mended", "other-seed"))
    if entry.reason:
        return entry.reason
    if entry.outcome is None:
        return _merged(entry.facts)
    if mended is None or mended.outcome is None or entry.name in ("base", "mended"):
        return f"{_NAMES['loss']} is {entry.outcome.measures['loss']:.4f}"
    control = chance.outcome if chance is not None and chance is not entry else None
    said = list(_differences(mended.outcome, entry.outcome, control))
    said = said or [f"no effect on the answers beyond chance, on {len(entry.outcome.losses())} held-out rows"]
    return "; ".join([*said, *_like_the_base(entry, entries), *_of_the_run(entry.facts, mended.facts)])


def _like_the_base(entry: Entry, entries: Sequence[Entry]) -> Iterator[str]:
    """How many answers are still the untouched base's: training that did nothing shows here."""
    base = next((one.outcome for one in entries if one.name == "base"), None)
    if base is None or entry.outcome is None:
        return
    before = {answer.row: answer.answer for answer in base.answers}
    same = [answer.answer == before[answer.row] for answer in entry.outcome.answers if answer.row in before]
    if same and sum(same) / len(same) > _UNCHANGED:
        yield f"{sum(same) / len(same):.0%} of its answers are the untouched base's, word for word"


def _differences(before: Outcome, after: Outcome, control: Outcome | None) -> Iterator[str]:
    found, usual = changes(before, after), changes(before, control) if control else {}
    for measure in (name for name in _NAMES if name in found):
        of = found[measure]
        if _beyond_rows(of) and abs(of.difference) > _least(measure, of.base, usual.get(measure)):
            verb = "rise" if of.difference > 0 else "fall"
            verb += "" if measure in _PLURAL else "s"
            yield f"{_NAMES[measure]} {verb} from {_shown(measure, of.base)} to {_shown(measure, of.adapter)}"


def _beyond_rows(of: Paired) -> bool:
    """Whether the difference goes beyond the chance of which rows are held out: its interval leaves out zero."""
    return of.difference_interval is not None and not of.difference_interval[0] <= 0 <= of.difference_interval[1]


def _least(measure: str, before: float, usual: Paired | None) -> float:
    """What a difference must exceed to be told: that of another seed, and a small share of what is no share itself."""
    chance = abs(usual.difference) if usual else 0.0
    return chance if measure in _PLURAL else max(chance, _SLIGHT * before)


def _of_the_run(facts: Mapping[str, float], mended: Mapping[str, float]) -> Iterator[str]:
    """What the training itself shows: whether its loss can be read, how much it learnt from, how much of it a merge keeps."""
    waves, usual = facts.get("waves", 0.0), mended.get("waves", 0.0)
    if waves - usual > _WAVES:
        yield (
            f"the training loss moves in waves, the order of the lengths (neighbouring steps correlate by {waves:.2f}, by {usual:.2f} when "
            "shuffled)"
        )
    learnt, of = facts.get("supervised_tokens"), mended.get("supervised_tokens")
    if learnt and of and abs(learnt / of - 1) > _SLIGHT:
        yield f"trained on {learnt:,.0f} tokens with a loss instead of {of:,.0f}"
    left = facts.get("survived")
    if left is not None and abs(left - 1) > 1 - _FADING:
        yield f"its update is {facts['relative']:.1e} of the weights, and {left:.0%} of it is left in bf16"


def _merged(facts: Mapping[str, float]) -> str:
    return (
        f"the merged model is {facts['kl']:.1e} nats a token (KL) from the one that was trained, and {max(facts['kl_seen'], 0.0):.1e} if "
        f"it is merged into the weights that training saw; its loss on {facts['tokens']:.0f} held-out answer tokens is "
        f"{facts['loss_merged']:.4f}, before the merge {facts['loss_trained']:.4f}"
    )


def lines(entries: Sequence[Entry]) -> list[str]:
    """A sentence an entry."""
    return [f"{entry.name} ({entry.what}): {sentence(entry, entries)}" for entry in entries]


def as_json(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The entries with their sentences and with how each differs from the mended job, with its 95 % interval."""
    mended = next((entry for entry in entries if entry.name == "mended"), None)
    if mended is None or mended.outcome is None:
        return [entry.as_json() for entry in entries]
    found = []
    for entry in entries:
        differences = {
            name: [of.difference, *(of.difference_interval or (None, None))]
            for name, of in (changes(mended.outcome, entry.outcome) if entry.outcome else {}).items()
        }
        found.append(entry.as_json() | {"sentence": sentence(entry, entries), "difference": differences})
    return found


def page(letter: str, facts: Sequence[tuple[str, str]], entries: Sequence[Entry], job: str) -> Page:
    """The page of a replay.

    Args:
        facts: (name, value) pairs that stand above the first chapter.
        job: the mended job's file.
    """
    made = Page(f"What each fault of job {letter} did", _LEAD, facts)
    measured = [entry for entry in entries if entry.outcome is not None]
    unfinished = [entry for entry in entries if entry.unfinished]
    told = [entry for entry in entries if entry.reason and not entry.unfinished]
    chapter = made.section("Fault by fault", "What differs from the mended job, made from the numbers below.")
    shown = [one for one in entries if not one.reason]
    chapter.add(Sayings([(one.name, _whole(one.what, sentence(one, entries))) for one in shown]))
    if unfinished:
        ended = made.section(
            "What did not finish, and why",
            "The reasons are the runs' own. One that diverged shows what its fault did; one that found too little memory shows nothing of "
            "it, and lamina replay --resume tries it again.",
        )
        ended.add(Points([("warning", f"{entry.name}: {entry.what}", [entry.reason]) for entry in unfinished]))
    numbers = made.section(
        "The numbers",
        "Every trained row has a folder of its own beside this page; all are measured on the same held-out rows.",
    )
    numbers.table(Table("Variant by variant", COLUMNS, rows(measured), _CAPTION))
    numbers.chart(*_charts(measured))
    if any(entry.outcome and entry.outcome.answers for entry in measured):
        made.section("The same questions, asked of each").table(_answers(measured))
    if told:
        others = made.section("What was not committed, and why")
        others.add(Points([("note", f"{entry.name}: {entry.what}", [entry.reason]) for entry in told]))
    made.section(
        "The mended job", "A variant differs from it in a single thing; its own job.toml is in its folder."
    ).code("job.toml", job)
    return made


def _whole(*sentences: str) -> str:
    """Sentences with a capital and a full stop."""
    return " ".join(f"{text[:1].upper()}{text[1:]}." for text in sentences)


def _charts(measured: Sequence[Entry]) -> list[Chart]:
    names = [entry.name for entry in measured]

    def values(measure: str, factor: float) -> list[float | None]:
        found = (entry.outcome.measures[measure] for entry in measured if entry.outcome)
        return [None if value is None else round(factor * value, 4) for value in found]

    loss = bars("Held-out loss", "Shorter is better.", names, {"loss": values("loss", 1)}, "nats per answer token")
    if all(value is None for value in values("stop_rate", 1)):
        return [loss]
    shares = {"end by themselves": values("stop_rate", 100), "word for word": values("exact_match", 100)}
    return [bars("Answers", "Longer is better.", names, shares, "% of the answers"), loss]


def _answers(measured: Sequence[Entry]) -> Table:
    """What each variant answers to the first prompts."""
    every = {
        entry.name: {answer.row: answer for answer in entry.outcome.answers} for entry in measured if entry.outcome
    }
    asked = list(every.get("mended", {}).values())[:_ASKED]
    table = [["the data", *(answer.reference for answer in asked)]]
    for name, given in every.items():
        cells = [given[answer.row] for answer in asked if answer.row in given]
        if len(cells) == len(asked):
            table.append([name, *(f"{cell.answer}{'' if cell.stopped else ' …'}" for cell in cells)])
    caption = "… marks an answer that did not end by itself."
    return Table("Side by side", ["", *(answer.prompt for answer in asked)], table, caption)
