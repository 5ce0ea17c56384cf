"""The rows of a data set before anything was cut: what each length would cost, without reading the data again."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.data.render import Rendered

Integers = NDArray[np.int64]


def _none() -> Integers:
    return np.zeros(0, dtype=np.int64)


class Cut(NamedTuple):
    """What is lost where rows are cut at the end after ``limit`` tokens; a cut answer loses its end, a lost one all of it."""

    limit: int
    rows: int
    tokens: int
    cut_answers: int
    lost_answers: int


@dataclass(frozen=True)
class Lengths:
    """Rows and their answers (or plain texts), in tokens.

    Args:
        rows: number of each row in its file; ``tokens`` its length.
        answer_of: row number of each answer; ``starts`` and ``stops`` its token range, ``ended`` whether that holds an end token.
    """

    rows: Integers = field(default_factory=_none)
    tokens: Integers = field(default_factory=_none)
    answer_of: Integers = field(default_factory=_none)
    starts: Integers = field(default_factory=_none)
    stops: Integers = field(default_factory=_none)
    ended: Integers = field(default_factory=_none)

    def cut_at(self, limit: int) -> Cut:
        """What cutting at ``limit`` tokens loses."""
        over = np.maximum(self.tokens - limit, 0)
        cut = (self.starts < limit) & (self.stops > limit)
        lost = int((self.starts >= limit).sum())
        return Cut(limit, int((over > 0).sum()), int(over.sum()), int(cut.sum()), lost)

    def rows_where(self, chosen: NDArray[np.bool_]) -> tuple[int, ...]:
        """The numbers of the chosen rows, in their order."""
        return tuple(self.rows[chosen].tolist())

    def rows_of_answers(self, chosen: NDArray[np.bool_]) -> tuple[int, ...]:
        """The numbers of the rows that hold a chosen answer, in their order, each once."""
        return tuple(dict.fromkeys(self.answer_of[chosen].tolist()))


class LengthsWriter:
    """Takes rows one by one: eight bytes a number."""

    def __init__(self) -> None:
        self._rows, self._tokens, self._answer_of = array("q"), array("q"), array("q")
        self._starts, self._stops, self._ended = array("q"), array("q"), array("q")

    def append(self, row: Rendered) -> None:
        """Adds a row as it is before any cut."""
        self._rows.append(row.row)
        self._tokens.append(len(row.tokens))
        for turn in row.turns:
            self._answer_of.append(row.row)
            self._starts.append(turn.start)
            self._stops.append(turn.stop)
            self._ended.append(turn.ended)

    def lengths(self) -> Lengths:
        """What was taken."""
        return Lengths(
            *map(_integers, (self._rows, self._tokens, self._answer_of, self._starts, self._stops, self._ended))
        )


def _integers(numbers: Iterable[int]) -> Integers:
    return np.array(numbers, dtype=np.int64)
