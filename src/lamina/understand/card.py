"""The card that closes every run: the untouched base beside the adapter, on rows that neither was trained on."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from lamina.adapter import adapter_scale
from lamina.data.render import Rendered
from lamina.data.store import TokenStore
from lamina.evaluation import Answers, Evaluating, Evaluation, answers, evaluate
from lamina.model.decoder import Decoder

SHOWN = 3
"""Answers that are shown side by side in the console; the record holds them all."""


@dataclass(frozen=True)
class Measured:
    """One model's side of the card; a part that could not be measured is None."""

    held_out: Evaluation | None
    answers: Answers | None
    neutral: Evaluation | None


@dataclass(frozen=True)
class Card:
    """Base and adapter, measured in the same way on the same rows."""

    base: Measured
    adapter: Measured

    def measures(self) -> list[tuple[str, str, str]]:
        """The measures as (name, base, adapter), in the order of their worth to a reader."""
        return [(name, before, after) for name, before, after in map(self._row, _MEASURES) if before]

    def answers(self) -> list[tuple[str, str, str, str]]:
        """Some answers side by side: (prompt, expected, the base's answer, the adapter's)."""
        if self.base.answers is None or self.adapter.answers is None:
            return []
        pairs = zip(self.base.answers.rows[:SHOWN], self.adapter.answers.rows[:SHOWN], strict=True)
        return [(before.prompt, before.reference, before.answer, after.answer) for before, after in pairs]

    def as_json(self) -> dict[str, Any]:
        """The card for machines."""
        return {"base": _json(self.base), "adapter": _json(self.adapter)}

    def _row(self, measure: tuple[str, str, str, str]) -> tuple[str, str, str]:
        name, part, value, form = measure
        before, after = (_format(getattr(side, part), value, form) for side in (self.base, self.adapter))
        return name, before, after


_MEASURES = (
    ("held-out loss (nats per answer token)", "held_out", "loss", ".4f"),
    ("held-out perplexity", "held_out", "perplexity", ",.2f"),
    ("answer tokens predicted", "held_out", "accuracy", ".1%"),
    ("answers that are the data's, word for word", "answers", "exact_match", ".1%"),
    ("answers that end by themselves", "answers", "stop_rate", ".1%"),
    ("mean length of an answer (tokens)", "answers", "mean_tokens", ".1f"),
    ("perplexity of neutral text", "neutral", "perplexity", ",.2f"),
)


def measure(
    model: Decoder,
    tokenizer: Any,
    stop: AbstractSet[int],
    held_out: TokenStore | Sequence[Rendered],
    neutral: Sequence[Rendered],
    settings: Evaluating,
    budget: int,
) -> Measured:
    """Measures a model as it stands: with its adapter, without it, or a plain one.

    Args:
        held_out: rows that it was not trained on; none, and nothing is measured on them.
        neutral: windows of text that has nothing to do with the task, for what was forgotten.
        budget: tokens computed at one time.
    """
    some = len(held_out) > 0  # the rows themselves stay on disk and are gone through
    asked = settings.eval_samples and some
    return Measured(
        held_out=evaluate(model, held_out, budget) if some else None,
        answers=answers(model, held_out, tokenizer, stop, settings.eval_samples, settings.eval_max_new_tokens)
        if asked
        else None,
        neutral=evaluate(model, neutral, budget) if neutral else None,
    )


def both(model: Decoder, *arguments: Any) -> Card:
    """The card of an adapted model; arguments as for ``measure``."""
    with adapter_scale(model, 0.0):
        base = measure(model, *arguments)
    return Card(base, measure(model, *arguments))


def _format(part: Any, value: str, form: str) -> str:
    return "" if part is None else format(getattr(part, value), form)


def _json(side: Measured) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(("held_out", "answers", "neutral"))
    for name in ("held_out", "neutral"):
        if (part := getattr(side, name)) is not None:
            found[name] = {key: getattr(part, key) for key in ("loss", "perplexity", "accuracy", "tokens")}
    if side.answers is not None:
        measures = {key: getattr(side.answers, key) for key in ("exact_match", "stop_rate", "mean_tokens")}
        rows = [
            {"row": a.row, "prompt": a.prompt, "reference": a.reference, "answer": a.answer, "stopped": a.stopped}
            for a in side.answers.rows
        ]
        found["answers"] = measures | {"rows": rows}
    return found
