"""The card that closes every run: the untouched base beside the adapter, on rows that neither was trained on.

One model is in memory: the base is the adapted model with its adapter switched off. The loss of every held-out token without
and with the adapter is computed once, or taken from the run's own evaluations, which have computed it already (the first is
the base's, the last the adapter's); mean, intervals, learnt tokens and two points of the dose curve all come from these. How
much of the rest is measured is decided in ``budget``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.adapter import adapter_scale
from lamina.data.render import Rendered
from lamina.data.store import TokenStore
from lamina.evaluation import Answer, Answers, Scores, answers, score, score_both
from lamina.model.decoder import Decoder
from lamina.understand.bootstrap import Interval, Paired, by_row, grouped, interval, paired, three_digits
from lamina.understand.budget import Sizes, lengths_of, numbers_of, some
from lamina.understand.dose import Dose, Known, dose
from lamina.understand.learnt import Learnt, learnt

KEPT = 200
"""Groups of held-out rows whose sums the record keeps."""

ANSWERS, TOKENS = "answer tokens", "tokens"

Sums = tuple[tuple[float, ...], ...]

SHOWN = 3
"""Answers that are shown side by side in the console, and rows that are told token by token; the record holds all answers."""


@dataclass(frozen=True)
class Measuring:
    """How the measures of a part are made of sums over its rows, [..., K] → [..., M]; the first may be shares of rows."""

    names: tuple[str, ...]
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    shares: int = 0

    def measures(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> dict[str, Paired]:
        """Measures two models on the same rows, [R, K] each."""
        return dict(zip(self.names, paired(one, other, self.statistic, shares=self.shares), strict=True))


@dataclass(frozen=True)
class Part:
    """Some measures of base and adapter on the same rows, by name."""

    measures: Mapping[str, Paired]
    rows: int
    tokens: int = 0
    sums: tuple[Sums, ...] = ()
    """Of base and adapter: what is summed of each group of rows, from which runs can be compared row by row."""


@dataclass(frozen=True)
class Divergence:
    """KL(base‖tuned) in nats per token, and on how many tokens it was measured."""

    mean: float
    interval: Interval | None
    tokens: int


@dataclass(frozen=True)
class Card:
    """Base and adapter, measured in the same way on the same rows; a part that could not be measured is missing."""

    parts: Mapping[str, Part] = field(default_factory=dict)
    """``held_out``, ``answers``, ``neutral``."""
    given: tuple[Answers, Answers] | None = None
    """The base's answers and the adapter's."""
    kl: Mapping[str, Divergence] = field(default_factory=dict)
    """On ``answers`` (the tokens of held-out rows that count) and ``neutral`` text."""
    learnt: Learnt | None = None
    dose: Dose | None = None
    counted: str = ANSWERS
    """Which tokens of the held-out rows the losses are a mean of: the answers', or all ``TOKENS`` where whole rows are learnt."""

    def measures(self) -> list[tuple[str, str, str]]:
        """The measures as (name, base, adapter), in the order of their worth to a reader."""
        return [(name, format(of.base, form), format(of.adapter, form)) for name, of, form in self._told()]

    def table(self) -> list[tuple[str, str, str, str]]:
        """The same, each with the change and its 95 % interval."""
        return [(*row, _change(of, form)) for row, (_, of, form) in zip(self.measures(), self._told(), strict=True)]

    def answers(self) -> list[tuple[str, str, str, str]]:
        """Some answers side by side: (prompt, expected, the base's answer, the adapter's)."""
        if self.given is None:
            return []
        pairs = zip(*(side.rows[:SHOWN] for side in self.given), strict=True)
        return [(before.prompt, before.reference, before.answer, after.answer) for before, after in pairs]

    def lines(self) -> list[str]:
        """What else there is to say: distance, learnt tokens, dose."""
        texts = {"answers": held_out_text(self.counted), "neutral": "neutral text"}
        said = [f"{_distance(of)} nats per token of {texts[name]}{_distance_span(of)}" for name, of in self.kl.items()]
        lines = [f"distance from the base, KL(base‖adapter): {'; '.join(said)}"] if said else []
        lines += [] if self.learnt is None else self.learnt.lines()
        return lines + ([] if self.dose is None else [self.dose.line()])

    def as_json(self) -> dict[str, Any]:
        """The card for machines."""
        return {
            "base": self._side(0),
            "adapter": self._side(1),
            "difference": {
                f"{part}.{name}": [of.difference, *(of.difference_interval or (None, None))]
                for part, measured in self.parts.items()
                for name, of in measured.measures.items()
            },
            "kl": {name: _divergence(self.kl.get(name)) for name in ("answers", "neutral")},
            "learnt": None if self.learnt is None else self.learnt.as_json(),
            "dose": None if self.dose is None else self.dose.as_json(),
            "counted": self.counted if "held_out" in self.parts else None,
        }

    def _told(self) -> Iterator[tuple[str, Paired, str]]:
        for name, part, measure, form in MEASURES:
            if part in self.parts and measure in self.parts[part].measures:
                yield named(name, self.counted), self.parts[part].measures[measure], form

    def _side(self, side: int) -> dict[str, Any]:
        found: dict[str, Any] = dict.fromkeys(("held_out", "answers", "neutral"))
        for name, part in self.parts.items():
            values = {key: (of.base, of.adapter)[side] for key, of in part.measures.items()}
            spans = {key: (of.base_interval, of.adapter_interval)[side] for key, of in part.measures.items()}
            found[name] = values | ({"tokens": part.tokens} if part.tokens else {})
            found[name]["intervals"] = {key: span and list(span) for key, span in spans.items()}
            if part.sums:
                found[name]["sums"] = [list(row) for row in part.sums[side]]
        if self.given is not None:
            found["answers"] = (
                {"exact_match": None} | found["answers"] | {"rows": [*map(_answer, self.given[side].rows)]}
            )
        return found


MEASURES = (
    ("held-out loss (nats per {token})", "held_out", "loss", ".4f"),
    ("held-out perplexity", "held_out", "perplexity", ",.2f"),
    ("{tokens} predicted", "held_out", "accuracy", ".1%"),
    ("answers that are the data's, word for word", "answers", "exact_match", ".1%"),
    ("answers that end by themselves", "answers", "stop_rate", ".1%"),
    ("mean length of an answer (tokens)", "answers", "mean_tokens", ".1f"),
    ("perplexity of neutral text", "neutral", "perplexity", ",.2f"),
)


def named(measure: str, counted: str) -> str:
    """The name of one of ``MEASURES`` where so called tokens count: ``Card.counted``."""
    return measure.format(tokens=counted, token=counted.removesuffix("s"))


def held_out_text(counted: str) -> str:
    """What of the held-out rows counts."""
    return "held-out answers" if counted == ANSWERS else "held-out rows"


@dataclass(frozen=True)
class Asked:
    """What answers are asked of: the model, its tokenizer, and the ids that end an answer."""

    model: Decoder
    tokenizer: Any
    stop: AbstractSet[int]


def measure(
    asked: Asked,
    held_out: TokenStore | Sequence[Rendered],
    neutral: Sequence[Rendered],
    sizes: Sizes,
    base: Scores | None = None,
    adapter: Scores | None = None,
) -> Card:
    """Measures an adapted model without and with its adapter.

    Args:
        held_out: rows that it was not trained on; they stay on disk and are gone through. None, and nothing is measured
            on them.
        neutral: windows of text that has nothing to do with the task, for what was forgotten.
        base, adapter: their scores on all held-out rows, where they are known.
    """
    model, parts, kl = asked.model, dict[str, Part](), dict[str, Divergence]()
    given = found = curve = plain = None
    counted = ANSWERS
    if len(held_out):
        if base is None:
            with adapter_scale(model, 0.0):
                base = score(model, held_out, sizes.portion)
        if adapter is None:
            adapter = score(model, held_out, sizes.portion)
        parts["held_out"] = _part("held_out", numbers_of(held_out), base, adapter, len(base.losses))
        if (base.per_row()[:, 2] >= lengths_of(held_out) - 1).all():  # nothing predicts the first one
            counted = TOKENS
        kl["answers"] = _apart(model, _chosen(held_out, sizes.compared), sizes.portion)[0]
        given = _answers(asked, held_out, sizes)
        found = learnt(base, adapter, [held_out[place] for place in range(min(SHOWN, len(held_out)))], asked.tokenizer)
    if given is not None:
        parts["answers"] = _given(*given)
    if neutral:
        rows = _chosen(neutral, sizes.neutral)
        kl["neutral"], plain = _apart(model, rows, sizes.portion)
        parts["neutral"] = _part("neutral", numbers_of(rows), plain.base, plain.adapter, len(plain.base.losses))
    if base is not None and adapter is not None:
        task = Known(held_out, base, adapter)
        curve = dose(model, _dosed(task, sizes.dosed), plain and _dosed(plain, sizes.dosed), sizes.portion)
    return Card(parts, given, kl, found, curve, counted)


def _of_losses(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Loss, perplexity and accuracy from sums of losses, hits and tokens."""
    loss, accuracy = sums[..., 0] / sums[..., 2], sums[..., 1] / sums[..., 2]
    return np.stack([loss, np.exp(np.minimum(loss, 700.0)), accuracy], axis=-1)  # e^709 is the last number


def means(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means from sums of what each answer, or token, has of some measures, and of answers: [..., K] → [..., K-1]."""
    return sums[..., :-1] / sums[..., -1:]


KINDS = {
    "held_out": Measuring(("loss", "perplexity", "accuracy"), _of_losses),
    "answers": Measuring(("stop_rate", "exact_match", "mean_tokens"), means, shares=2),
    "neutral": Measuring(("loss", "perplexity", "accuracy"), _of_losses),
}


def _part(name: str, rows: NDArray[np.int64], base: Scores | Answers, tuned: Scores | Answers, tokens: int = 0) -> Part:
    sides = [by_row(rows, side.per_row())[1] for side in (base, tuned)]
    kept = tuple(tuple(map(tuple, grouped(side, KEPT).round(4).tolist())) for side in sides)
    return Part(KINDS[name].measures(*sides), len(sides[0]), tokens, kept)


def _given(base: Answers, adapter: Answers) -> Part:
    part = _part("answers", numbers_of(base.rows), base, adapter)
    if base.comparable:
        return part
    return replace(part, measures={name: of for name, of in part.measures.items() if name != "exact_match"})


def _apart(model: Decoder, rows: Sequence[Rendered], portion: int) -> tuple[Divergence, Known]:
    base, adapter, kl = score_both(model, rows, portion)
    _, sums = by_row(numbers_of(rows), np.stack([base.sums(kl), base.per_row()[:, 2]], axis=1))
    total, tokens = sums.sum(0).tolist()
    span = interval(sums, means)
    return Divergence(total / tokens, span, int(tokens)), Known(rows, base, adapter)


def _answers(asked: Asked, held_out: TokenStore | Sequence[Rendered], sizes: Sizes) -> tuple[Answers, Answers] | None:
    if not sizes.samples:
        return None
    arguments = (asked.model, held_out, asked.tokenizer, asked.stop, sizes.samples, sizes.new_tokens)
    with adapter_scale(asked.model, 0.0):
        before = answers(*arguments)
    after = answers(*arguments)
    return None if before is None or after is None else (before, after)


def _chosen(rows: TokenStore | Sequence[Rendered], tokens: int) -> list[Rendered]:
    return [rows[place] for place in some(lengths_of(rows), tokens).tolist()]


def _dosed(known: Known, tokens: int) -> Known:
    """Some of the rows with their scores."""
    places = some(lengths_of(known.rows), tokens)
    rows = [known.rows[place] for place in places.tolist()]
    return Known(rows, known.base.part(places), known.adapter.part(places))


def _change(of: Paired, form: str) -> str:
    factor, form, unit = (100, ".1f", " points") if form.endswith("%") else (1, form, "")
    values = [of.difference, *(of.difference_interval or ())]
    said = [format(factor * value, f"+{form}") for value in values]
    return said[0] + (f" [{', '.join(said[1:])}]" if said[1:] else "") + unit


def _distance(of: Divergence) -> str:
    return format(of.mean, three_digits(of.mean))


def _distance_span(of: Divergence) -> str:
    form = three_digits(of.mean)
    return "" if of.interval is None else f" [{', '.join(format(end, form) for end in of.interval)}]"


def _divergence(of: Divergence | None) -> dict[str, Any] | None:
    return None if of is None else {"mean": of.mean, "interval": of.interval and list(of.interval), "tokens": of.tokens}


def _answer(a: Answer) -> dict[str, Any]:
    return {"row": a.row, "prompt": a.prompt, "reference": a.reference, "answer": a.answer, "stopped": a.stopped}
