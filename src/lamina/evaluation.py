"""What a model knows and does: loss on held-out rows, answers to held-out prompts, perplexity of neutral text.

All three give the same numbers each time and in whatever batches. The loss is streamed, no logits are kept: a held-out
set as large as the training set is evaluated in the memory of one batch. Neutral text is evaluated like a held-out set,
so the same function measures learning and forgetting.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from lamina.data.pack import pack
from lamina.data.render import Rendered
from lamina.errors import DataError
from lamina.generation import Sampling, evaluating, generate
from lamina.model.decoder import Decoder
from lamina.ops.attention import Packed
from lamina.ops.loss import token_scores
from lamina.section import section

ROWS_AT_ONCE = 1024
"""Rows that are packed into batches together: enough to fill them, few enough to hold."""

NEUTRAL_WINDOW = 512
"""Tokens of neutral text that are read together, the one that begins a text included."""

NEUTRAL_TOKENS = 65_536
"""Tokens of neutral text that count, from its beginning: enough for two digits of the perplexity."""


@section
class Evaluating:
    """What is measured before and after training, beside the held-out loss."""

    eval_samples: Annotated[int, Field(ge=0)] = 64
    """Held-out prompts that are answered (greedily) and compared with the data's answers; 0: none."""

    eval_max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Tokens of such an answer at most; a longer one counts as not stopped."""

    neutral: str | None = None
    """Text file on which forgetting is measured: its perplexity before and after training."""


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


def evaluate(model: Decoder, rows: Iterable[Rendered], budget: int) -> Evaluation:
    """Evaluates a model on rendered rows, without dropout.

    Args:
        rows: a store, or any rows; gone through once.
        budget: tokens in a batch at most (a longer row is a batch by itself). Decides memory and speed; the loss
            depends on it by the rounding of fp32 products only, for sums are in float64.

    Raises:
        DataError: there are no rows, or no token that counts.
    """
    device = model.vocabulary.device
    loss, tokens, correct = 0.0, 0, 0
    rows = iter(rows)
    with evaluating(model.modules()):
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            for batch in pack(some, budget):
                hidden = model(batch.tokens.to(device), batch.position.to(device), Packed(batch.lengths))
                scores, right = token_scores(hidden, model.vocabulary, batch.targets.to(device))
                loss += float(scores.double().sum())
                tokens += len(scores)
                correct += int(right.sum())
    if not tokens:
        raise DataError(
            "found no held-out rows to evaluate, expected at least one; set eval_fraction above 0 or name eval_data"
        )
    return Evaluation(loss / tokens, tokens, correct)


@dataclass(frozen=True)
class Answer:
    """A held-out prompt, the data's answer and the model's, as text without special tokens."""

    row: int
    prompt: str
    reference: str
    answer: str
    stopped: bool
    tokens: int

    @property
    def exact(self) -> bool:
        """Whether the model's answer is the data's, but for white space around it."""
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class Answers:
    """Answers to held-out prompts, at least one."""

    rows: tuple[Answer, ...]

    @property
    def stop_rate(self) -> float:
        """Share of the answers that the model ended itself."""
        return sum(row.stopped for row in self.rows) / len(self.rows)

    @property
    def exact_match(self) -> float:
        """Share of the answers that are the data's."""
        return sum(row.exact for row in self.rows) / len(self.rows)

    @property
    def mean_tokens(self) -> float:
        """Length of the answers, without stop tokens."""
        return sum(row.tokens for row in self.rows) / len(self.rows)


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
            Answer(row, text(prompt), text(reference), text(answer.tokens), answer.stopped, len(answer.tokens))
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


def read_neutral(path: Path, tokenizer: Any, max_position: int) -> list[Rendered]:
    """Reads plain text as rows for ``evaluate``: windows of up to ``NEUTRAL_WINDOW`` tokens, each begun as a text is.

    What looks like a special token in the text is taken as text.

    Args:
        max_position: tokens that the model can read.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is empty.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(16 * NEUTRAL_TOKENS)  # hardly a tokenizer makes fewer tokens of it than count
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), expected a text file; check neutral") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}), expected a text file; check neutral") from None
    if not text.strip():
        raise DataError(f"{path}: found no text, expected some for measuring forgetting; check neutral")
    tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    return list(_windows(tokens[:NEUTRAL_TOKENS], tokenizer.bos_token_id, min(NEUTRAL_WINDOW, max_position)))


def _windows(tokens: list[int], bos: int | None, size: int) -> Iterator[Rendered]:
    begin = [] if bos is None else [bos]
    for number, window in enumerate(range(0, len(tokens), size - len(begin)), 1):
        ids = np.array(begin + tokens[window : window + size - len(begin)], dtype=np.int32)
        if len(ids) > 1:  # a single token has nothing before it that could predict it
            yield Rendered(ids, np.arange(len(ids)) > 0, number)
