"""What a model knows and does: loss on held-out rows, answers to held-out prompts, perplexity of neutral text.

All three give the same numbers each time and in whatever batches. The loss is streamed, no logits are kept: a held-out
set as large as the training set is evaluated in the memory of one batch, and nine bytes a supervised token for what is
found. Neutral text is evaluated like a held-out set, so the same function measures learning and forgetting.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from lamina.adapter import adapter_scale
from lamina.data.pack import Batch, pack
from lamina.data.render import Rendered
from lamina.errors import DataError
from lamina.generation import Sampling, evaluating, generate
from lamina.model.decoder import Decoder
from lamina.ops.attention import Packed
from lamina.ops.loss import IGNORED, paired_scores, token_scores
from lamina.section import section

ROWS_AT_ONCE = 1024
"""Rows that are packed into batches together: enough to fill them, few enough to hold."""


@section
class Evaluating:
    """What is measured before and after training, beside the held-out loss."""

    eval_samples: Annotated[int, Field(ge=0)] | None = None
    """Held-out prompts that are answered (greedily) and compared with the data's answers; 0: none. Unset: 64, or fewer
    where that would take too large a share of the run."""

    eval_max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Tokens of such an answer at most; a longer one counts as not stopped."""

    neutral: str | None = "lamina:neutral.txt"
    """Text file on which forgetting is measured: its perplexity before and after training. Unset: plain English prose
    that comes with Lamina; none: it is not measured."""


@dataclass(frozen=True)
class Evaluation:
    """The held-out loss: mean -log p over the supervised tokens, and how many of those were the most likely token."""

    loss: float
    tokens: int
    correct: int

    @property
    def perplexity(self) -> float:
        """e^loss; infinite where that is no longer a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of the supervised tokens that the model, given the right ones before them, would have chosen."""
        return self.correct / self.tokens


@dataclass(frozen=True)
class Scores:
    """Every supervised token of R rows under a model, row after row: nine bytes a token."""

    targets: NDArray[np.int32]
    losses: NDArray[np.float32]
    """-log p of each target, in nats."""
    correct: NDArray[np.bool_]
    """Whether it was the most likely token."""
    ends: NDArray[np.int64]
    """Tokens up to the end of each row, [R]."""

    @property
    def evaluation(self) -> Evaluation:
        """The mean over all tokens; sums are in float64."""
        return Evaluation(float(self.losses.mean(dtype=np.float64)), len(self.losses), int(self.correct.sum()))

    def per_row(self) -> NDArray[np.float64]:
        """Each row's sum of losses, number of hits and number of tokens, [R, 3]."""
        return np.stack(
            [self.sums(column) for column in (self.losses, self.correct, np.ones(len(self.losses)))], axis=1
        )

    def sums(self, column: NDArray[Any]) -> NDArray[np.float64]:
        """Each row's sum of what there is of every token, [R]."""
        starts = np.concatenate([[0], self.ends[:-1]])
        return np.add.reduceat(column, starts, dtype=np.float64)

    def of_row(self, place: int) -> NDArray[np.float32]:
        """The losses of the row at a place, from 0."""
        return self.losses[self.ends[place - 1] if place else 0 : self.ends[place]]

    def part(self, places: NDArray[np.int64]) -> "Scores":
        """The rows at these places, in this order."""
        starts = np.concatenate([[0], self.ends[:-1]])
        lengths = (self.ends - starts)[places]
        tokens = np.concatenate([np.arange(starts[place], self.ends[place]) for place in places])
        return Scores(self.targets[tokens], self.losses[tokens], self.correct[tokens], lengths.cumsum())


def evaluate(model: Decoder, rows: Iterable[Rendered], budget: int) -> Evaluation:
    """Evaluates a model on rendered rows, without dropout.

    Args:
        rows: a store, or any rows; gone through once.
        budget: tokens in a batch at most (a longer row is a batch by itself). Decides memory and speed; the loss
            depends on it by the rounding of fp32 products only, for sums are in float64.

    Raises:
        DataError: there are no rows, or no token that counts.
    """
    return score(model, rows, budget).evaluation


def score(model: Decoder, rows: Iterable[Rendered], budget: int) -> Scores:
    """Scores every supervised token of rendered rows, without dropout; arguments and errors as for ``evaluate``."""
    with evaluating(model.modules()):
        targets, ends, losses, correct = gather(
            rows, budget, lambda batch: token_scores(hidden(model, batch), model.vocabulary, _targets(model, batch))
        )
    return Scores(targets, losses, correct, ends)


def score_both(model: Decoder, rows: Iterable[Rendered], budget: int) -> tuple[Scores, Scores, NDArray[np.float32]]:
    """Scores an adapted model without and with its adapter in one pass, as ``score`` would, and how far they are apart.

    No second model is in memory: the adapter is switched off for a batch, and on again.

    Returns:
        The base's scores, the adapter's, and KL(base‖adapter) at every token that they hold, in nats.
    """

    def both(batch: Batch) -> tuple[Tensor, ...]:
        with adapter_scale(model, 0.0):
            before = hidden(model, batch)
        losses, correct, apart = paired_scores(before, hidden(model, batch), model.vocabulary, _targets(model, batch))
        return *losses, *correct, apart

    with evaluating(model.modules()):
        targets, ends, *columns = gather(rows, budget, both)
    losses, correct, apart = columns[:2], columns[2:4], columns[4]
    base, adapter = (Scores(targets, losses[side], correct[side], ends) for side in (0, 1))
    return base, adapter, apart


def gather(
    rows: Iterable[Rendered], budget: int, of_batch: Callable[[Batch], Iterable[Tensor]]
) -> tuple[NDArray[Any], ...]:
    """Packs rows into batches and brings what is computed of their supervised tokens back into the rows' order.

    Args:
        of_batch: columns [S] over the supervised tokens of a batch.

    Returns:
        The targets, the tokens up to each row's end, and the columns.
    """
    found: list[tuple[NDArray[Any], ...]] = []
    rows, first = iter(rows), 0
    while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
        placed = [Rendered(row.tokens, row.trained, place) for place, row in enumerate(some, first)]
        first += len(some)
        for batch in pack(placed, budget):
            supervised = batch.targets != IGNORED
            place = torch.repeat_interleave(torch.tensor(batch.rows), torch.tensor(batch.lengths))[supervised]
            columns = (place, batch.targets[supervised].to(torch.int32), *of_batch(batch))
            found.append(tuple(column.cpu().numpy() for column in columns))
    if not found:
        raise DataError(
            "found no held-out rows to evaluate, expected at least one; set eval_fraction above 0 or name eval_data"
        )
    places, *values = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(places, kind="stable")  # within a row its tokens already stand in order
    targets, *rest = (value[order] for value in values)
    return targets, np.bincount(places).cumsum(), *rest


def hidden(model: Decoder, batch: Batch) -> Tensor:
    """The last hidden states of a batch."""
    device = model.vocabulary.device
    out: Tensor = model(batch.tokens.to(device), batch.position.to(device), Packed(batch.lengths))
    return out


def _targets(model: Decoder, batch: Batch) -> Tensor:
    return batch.targets.to(model.vocabulary.device)


@dataclass(frozen=True)
class Answer:
    """A held-out prompt, the data's answer and the model's, as text without special tokens."""

    row: int
    prompt: str
    reference: str
    answer: str
    stopped: bool
    tokens: int
    within: bool = True
    """Whether the data's answer is no longer than the model's may be."""

    @property
    def exact(self) -> bool:
        """Whether the model's answer is the data's, but for white space around it."""
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class Answers:
    """Answers to held-out prompts, at least one."""

    rows: tuple[Answer, ...]

    def per_row(self) -> NDArray[np.float64]:
        """What each answer has: whether it stopped, whether it is the data's, its tokens, and 1; [R, 4]."""
        columns = [(row.stopped, row.exact, row.tokens, 1) for row in self.rows]
        return np.array(columns, dtype=np.float64).reshape(-1, 4)

    @property
    def comparable(self) -> bool:
        """Whether any answer could be the data's, word for word: some of those are within the limit of the length."""
        return any(row.within for row in self.rows)


def answers(
    model: Decoder,
    rows: Iterable[Rendered],
    tokenizer: Any,
    stop: AbstractSet[int],
    samples: int,
    max_new_tokens: int,
) -> Answers | None:
    """Answers the first ``samples`` rows that have a prompt, greedily, and puts the data's answers beside them.

    Of a row with several turns it is the first answer that is asked for. A row has no prompt when its text is learnt
    from the beginning (plain text, ``train_on = "everything"``); one whose prompt fills the model's context is not
    asked.

    Returns:
        None where no row has a prompt.
    """
    most = model.architecture.max_position
    asked = list(itertools.islice((turn for turn in map(_first_turn, rows) if turn and len(turn[1]) < most), samples))
    if not asked:
        return None
    sampling = Sampling(max_new_tokens=max_new_tokens)
    given = generate(model, [prompt for _, prompt, _ in asked], sampling, stop, seed=0)

    def text(tokens: Iterable[int]) -> str:
        decoded: str = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded

    return Answers(
        tuple(
            Answer(
                row,
                text(prompt),
                text(reference),
                text(answer.tokens),
                answer.stopped,
                len(answer.tokens),
                len(reference) <= max_new_tokens,
            )
            for (row, prompt, reference), answer in zip(asked, given, strict=True)
        )
    )


def _first_turn(row: Rendered) -> tuple[int, list[int], list[int]] | None:
    """Row number, the tokens before the first that is learnt, and the learnt ones from there on."""
    first = int(row.trained.argmax())
    if first < 2:  # nothing, or the token that begins a text
        return None
    untrained = np.flatnonzero(~row.trained[first:])
    end = first + int(untrained[0]) if len(untrained) else len(row.tokens)
    return row.row, row.tokens[:first].tolist(), row.tokens[first:end].tolist()
