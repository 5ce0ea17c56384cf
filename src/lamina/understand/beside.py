"""What a tuned model does on held-out rows, kept row by row, so that two tuned models can be compared and not only one with its base.

All is measured as the card measures it, and the difference of two outcomes has the card's interval: rows are drawn again, both models'
together. How large the difference would be with another seed of the training, that does not tell.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.data.render import Rendered
from lamina.evaluation import Answer, Answers, Evaluating, answers, score_both
from lamina.model.decoder import Decoder
from lamina.understand.bootstrap import Paired, by_row
from lamina.understand.budget import SAMPLES
from lamina.understand.card import KINDS, Measuring, means

LOSSES = Measuring(("loss", "kl"), means)
MEASURES = (*LOSSES.names, *KINDS["answers"].names)
"""What two outcomes are compared by."""

_Sums = dict[int, NDArray[np.float64]]


class Row(NamedTuple):
    """One held-out row, or a piece of it: sums over its answer tokens, in nats."""

    row: int
    loss: float
    """Of -log p under the tuned model."""
    kl: float
    """Of KL(base‖tuned)."""
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """What a tuned model does on held-out rows, and how far it has gone from its base."""

    rows: tuple[Row, ...]
    answers: tuple[Answer, ...]

    @property
    def measures(self) -> dict[str, float | None]:
        """The mean of each of ``MEASURES``, loss and KL in nats a token; None for those of answers where nothing was asked."""
        found: dict[str, float | None] = dict.fromkeys(MEASURES)
        for kind, sums in _kinds(self):
            if sums:
                found |= zip(kind.names, means(np.sum([*sums.values()], axis=0)).tolist(), strict=True)
        return found

    def losses(self) -> _Sums:
        """Loss, KL and tokens of each row."""
        columns = np.array([row[1:] for row in self.rows], dtype=np.float64).reshape(-1, 3)
        return _by_row([row.row for row in self.rows], columns)

    def asked(self) -> _Sums:
        """What each row's answers have, as ``Answers.per_row`` has it."""
        return _by_row([answer.row for answer in self.answers], Answers(self.answers).per_row())

    def as_json(self) -> dict[str, Any]:
        """For machines: the measures, and the rows they are made of."""
        return self.measures | {
            "rows": [row._asdict() for row in self.rows],
            "answers": [asdict(answer) for answer in self.answers],
        }

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> "Outcome":
        """The outcome that ``as_json`` wrote."""
        rows = tuple(Row(**row) for row in found["rows"])
        return cls(rows, tuple(Answer(**answer) for answer in found["answers"]))


def changes(before: Outcome, after: Outcome) -> dict[str, Paired]:
    """How each of ``MEASURES`` differs between two outcomes, over the rows that both have; without those that have no such row."""
    found = dict[str, Paired]()
    for (kind, first), (_, second) in zip(_kinds(before), _kinds(after), strict=True):
        if rows := sorted(first.keys() & second.keys()):
            found |= kind.measures(*(np.stack([sums[row] for row in rows]) for sums in (first, second)))
    return found


def outcome(
    model: Decoder,
    held_out: Sequence[Rendered],
    tokenizer: Any,
    stop: AbstractSet[int],
    settings: Evaluating,
    budget: int,
) -> Outcome:
    """Measures an adapted model beside its base; a model without an adapter is its own base.

    Args:
        held_out: rows on which all models that are to be compared are measured.
        budget: tokens computed at one time.
    """
    _, tuned, apart = score_both(model, held_out, budget)
    sums = zip(held_out, tuned.per_row().tolist(), tuned.sums(apart).tolist(), strict=True)
    rows = tuple(Row(of.row, loss, kl, int(tokens)) for of, (loss, _, tokens), kl in sums)
    samples = SAMPLES[1] if settings.eval_samples is None else settings.eval_samples
    found = answers(model, held_out, tokenizer, stop, samples, settings.eval_max_new_tokens)
    return Outcome(rows, found.rows if found else ())


def _kinds(of: Outcome) -> list[tuple[Measuring, _Sums]]:
    return [(LOSSES, of.losses()), (KINDS["answers"], of.asked())]


def _by_row(rows: Sequence[int], columns: NDArray[np.float64]) -> _Sums:
    """The sums [K] of each row."""
    numbers, sums = by_row(rows, columns)
    return dict(zip(numbers.tolist(), sums, strict=True))
