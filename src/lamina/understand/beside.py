"""A tuned model beside its base on the same rows, row by row, so that two tuned models can be compared with an interval.

Every measure is kept per row: a difference of two models is then the mean of paired differences, and its interval needs no
assumption about the rows but that they were drawn alike. How large the difference would be with another seed of the training, it
does not tell.
"""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.adapter import adapter_scale
from lamina.data.pack import NONE, Batch, pack
from lamina.data.render import Rendered
from lamina.evaluation import Answer, Evaluating, answers
from lamina.generation import evaluating
from lamina.model.decoder import Decoder
from lamina.ops.attention import Packed
from lamina.understand.budget import SAMPLES

_SLICE = 32  # tokens whose distributions are compared at one time
_Z = 1.96  # of a 95 % interval, normal over rows

MEASURES = ("loss", "kl", "stop_rate", "exact_match", "mean_tokens")
"""What two outcomes are compared by: all that is held per row."""


class Row(NamedTuple):
    """One held-out row: sums over its answer tokens, in nats."""

    row: int
    tokens: int
    loss: float
    """Of -log p under the tuned model."""
    kl: float
    """Of KL(base‖tuned)."""


class Change(NamedTuple):
    """A difference of two outcomes with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def found(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Outcome:
    """What a tuned model does on held-out rows, and how far it has gone from its base."""

    rows: tuple[Row, ...]
    answers: tuple[Answer, ...]

    @property
    def loss(self) -> float:
        """Mean -log p of the answer tokens, in nats."""
        return sum(row.loss for row in self.rows) / sum(row.tokens for row in self.rows)

    @property
    def kl(self) -> float:
        """Mean KL(base‖tuned) over the answer tokens, in nats."""
        return sum(row.kl for row in self.rows) / sum(row.tokens for row in self.rows)

    @property
    def stop_rate(self) -> float | None:
        """Share of the answers that end by themselves; None where nothing was asked."""
        return self._mean("stop_rate")

    @property
    def exact_match(self) -> float | None:
        """Share of the answers that are the data's, word for word."""
        return self._mean("exact_match")

    @property
    def mean_tokens(self) -> float | None:
        """Length of the answers."""
        return self._mean("mean_tokens")

    def _mean(self, measure: str) -> float | None:
        values = self.values(measure).values()
        return sum(total for total, _ in values) / sum(weight for _, weight in values) if values else None

    def values(self, measure: str) -> dict[int, tuple[float, int]]:
        """A measure's (sum, weight) by row; pieces of a row that was cut are added up."""
        match measure:
            case "loss" | "kl":
                found = [(row.row, getattr(row, measure), row.tokens) for row in self.rows]
            case "stop_rate":
                found = [(answer.row, float(answer.stopped), 1) for answer in self.answers]
            case "exact_match":
                found = [(answer.row, float(answer.exact), 1) for answer in self.answers]
            case _:
                found = [(answer.row, float(answer.tokens), 1) for answer in self.answers]
        sums: dict[int, tuple[float, int]] = {}
        for row, value, weight in found:
            before = sums.get(row, (0.0, 0))
            sums[row] = before[0] + value, before[1] + weight
        return sums

    def as_json(self) -> dict[str, Any]:
        """For machines: the measures, and the rows they are made of."""
        measures = {name: getattr(self, name) for name in MEASURES}
        return measures | {
            "rows": [row._asdict() for row in self.rows],
            "answers": [asdict(answer) for answer in self.answers],
        }

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> "Outcome":
        """The outcome that ``as_json`` wrote."""
        rows = tuple(Row(**row) for row in found["rows"])
        return cls(rows, tuple(Answer(**answer) for answer in found["answers"]))


def change(measure: str, before: Outcome, after: Outcome) -> Change | None:
    """How a measure differs between two outcomes, over the rows that both have; None where there are none."""
    first, second = before.values(measure), after.values(measure)
    rows = sorted(first.keys() & second.keys())
    if not rows:
        return None
    weights = np.array([first[row][1] for row in rows])
    means = [np.array([of[row][0] / of[row][1] for row in rows]) for of in (first, second)]
    differences, weight = (means[1] - means[0]) * weights, int(weights.sum())
    half = _Z * float(differences.std()) * math.sqrt(len(rows)) / weight
    mean = float(differences.sum()) / weight
    return Change(mean, mean - half, mean + half)


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
    rows: list[Row] = []
    with evaluating(model.modules()):
        for batch in pack(held_out, budget):
            rows += _rows(model, batch)
    samples = SAMPLES[1] if settings.eval_samples is None else settings.eval_samples
    found = answers(model, held_out, tokenizer, stop, samples, settings.eval_max_new_tokens)
    order = {row.row: place for place, row in enumerate(held_out)}
    return Outcome(tuple(sorted(rows, key=lambda row: order[row.row])), found.rows if found else ())


def _rows(model: Decoder, batch: Batch) -> list[Row]:
    """Loss and KL of each row of a batch."""
    device = model.vocabulary.device
    given = batch.tokens.to(device), batch.position.to(device), Packed(batch.lengths)
    chosen = (batch.targets != NONE).nonzero().squeeze(1)
    with adapter_scale(model, 0.0):
        base = model(*given)[chosen]
    losses, kls = _scores(base, model(*given)[chosen], model.vocabulary, batch.targets[chosen].to(device))
    of = np.repeat(np.arange(len(batch.rows)), batch.lengths)[chosen.numpy()]
    counts, loss, kl = (np.bincount(of, weights, len(batch.rows)) for weights in (None, losses.numpy(), kls.numpy()))
    return [
        Row(number, int(counts[place]), float(loss[place]), float(kl[place])) for place, number in enumerate(batch.rows)
    ]


def _scores(base: Tensor, tuned: Tensor, vocabulary: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target) of the tuned model and KL(base‖tuned), both float64 [S] on the CPU; distributions in fp32, a slice at a time."""
    losses, kls = torch.empty(len(targets), dtype=torch.float64), torch.empty(len(targets), dtype=torch.float64)
    for start in range(0, len(targets), _SLICE):
        now = slice(start, start + _SLICE)
        before, after = (F.linear(hidden[now], vocabulary).float().log_softmax(1) for hidden in (base, tuned))
        losses[now] = F.nll_loss(after, targets[now], reduction="none").double().cpu()
        kls[now] = F.kl_div(after, before, log_target=True, reduction="none").sum(1).double().cpu()
    return losses, kls
