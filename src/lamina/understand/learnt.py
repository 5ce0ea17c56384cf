"""Which tokens were learnt: the held-out loss taken apart, token by token and by kinds of tokens.

A mean of the loss hides where it went. A model that was taught a form has learnt the words of the form and the end token, and
the rest is as it was; one that was taught facts has learnt the words of the facts. A kind is a token of the vocabulary, in
whatever context it is the right next one. Kinds are ordered by what they add to the whole gain, Σ (before - after), so that
the list adds up to the loss: the order by mean gain would be led by what occurs but once. A kind that is met fewer than
``LEAST`` times is not listed: of hundreds of those some are much better or worse by chance. Nor is one whose loss has changed by
less than ``NOTHING``.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.data.render import Rendered, show
from lamina.evaluation import Scores

LEAST = 5
NOTHING = 0.01
"""Nats a token."""
LISTED = 20
SAID = 6


@dataclass(frozen=True)
class Token:
    """A token of a row and its loss without and with the adapter, in nats; None where it was not trained on."""

    text: str
    trained: bool
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Kind:
    """A token of the vocabulary as the right next one: how often, and its mean loss without and with the adapter.

    Its text tells it from the others of a list: where two look the same, it is the piece in the vocabulary.
    """

    text: str
    count: int
    before: float
    after: float


@dataclass(frozen=True)
class Learnt:
    """Some rows token by token, by their number in the data; and the kinds that gained most, and those that lost most."""

    rows: tuple[tuple[int, tuple[Token, ...]], ...]
    most: tuple[Kind, ...]
    least: tuple[Kind, ...]

    def lines(self) -> Iterator[str]:
        """What was learnt most, and what became worse, in a line each."""
        for what, kinds in (("learnt most", self.most), ("became worse", self.least)):
            if kinds:
                said = (f"{kind.text!r} {kind.before:.2f} → {kind.after:.2f} (×{kind.count})" for kind in kinds[:SAID])
                yield f"{what} (loss before → after): {', '.join(said)}"

    def as_json(self) -> dict[str, Any]:
        """The tokens for machines."""
        rows = [{"row": row, "tokens": [asdict(token) for token in tokens]} for row, tokens in self.rows]
        return {
            "rows": rows,
            "most": [asdict(kind) for kind in self.most],
            "least": [asdict(kind) for kind in self.least],
        }


def learnt(base: Scores, adapter: Scores, shown: Sequence[Rendered], tokenizer: Any) -> Learnt:
    """Takes the held-out loss apart.

    Args:
        shown: the first held-out rows, which are told token by token.
    """
    rows = tuple((row.row, tuple(_tokens(row, base, adapter, place, tokenizer))) for place, row in enumerate(shown))
    ids, counts, before, after = kinds(base, adapter)
    gain = before - after
    order = np.argsort(-gain, kind="stable")
    order = order[(counts[order] >= LEAST) & (abs(gain[order]) >= NOTHING * counts[order])]

    most, least = order[gain[order] > 0][:LISTED].tolist(), order[gain[order] < 0][::-1][:LISTED].tolist()
    texts = dict(zip(most + least, _distinct(ids[most + least], tokenizer), strict=True))

    def listed(places: list[int]) -> tuple[Kind, ...]:
        return tuple(
            Kind(texts[k], int(counts[k]), float(before[k] / counts[k]), float(after[k] / counts[k])) for k in places
        )

    return Learnt(rows, listed(most), listed(least))


def kinds(base: Scores, adapter: Scores) -> tuple[NDArray[Any], ...]:
    """The kinds of tokens in rising order: ids, counts, and sums of the losses without and with the adapter."""
    ids, kind, counts = np.unique(base.targets, return_inverse=True, return_counts=True)
    return ids, counts, *(np.bincount(kind, side.losses, len(ids)) for side in (base, adapter))


def _distinct(ids: NDArray[Any], tokenizer: Any) -> list[str]:
    """The tokens' texts; of tokens that look the same, as ``a`` and the byte ``<0x61>`` do, their pieces in the vocabulary."""
    texts = [text for text, _ in show(Rendered(ids, np.ones(len(ids), dtype=np.bool_), 0), tokenizer)]
    looks = Counter(map(_look, texts))
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    return [piece if looks[_look(text)] > 1 else text for text, piece in zip(texts, pieces, strict=True)]


def _look(text: str) -> str:
    """What is seen of a text: characters that cannot be printed look alike, but for those for which there are signs."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _tokens(row: Rendered, base: Scores, adapter: Scores, place: int, tokenizer: Any) -> Iterator[Token]:
    losses = zip(base.of_row(place).tolist(), adapter.of_row(place).tolist(), strict=True)
    for number, (text, trained) in enumerate(show(row, tokenizer)):
        trained = trained and number > 0  # nothing stands before the first one that could predict it
        before, after = next(losses) if trained else (None, None)
        yield Token(text, trained, before, after)
