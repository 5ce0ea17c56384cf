"""Lengths and answers of all rows, as the doctor's table reads them, and problems that are kept instead of raised."""

import numpy as np
import pytest

from lamina.data.lengths import Cut, Lengths, LengthsWriter
from lamina.data.problems import ENOUGH, Problems
from lamina.data.render import Rendered, Turn
from lamina.errors import DataError


def row(number: int, length: int, *turns: Turn) -> Rendered:
    return Rendered(np.zeros(length, dtype=np.int32), np.zeros(length, dtype=np.bool_), number, turns)


def test_what_each_length_would_lose() -> None:
    writer = LengthsWriter()
    writer.append(row(3, 10, Turn(4, 10, True)))
    writer.append(row(5, 30, Turn(2, 8, True), Turn(12, 20, True), Turn(24, 30, False)))
    lengths = writer.lengths()
    assert lengths.cut_at(30) == Cut(30, rows=0, tokens=0, cut_answers=0, lost_answers=0)
    assert lengths.cut_at(15) == Cut(15, rows=1, tokens=15, cut_answers=1, lost_answers=1)
    assert lengths.cut_at(8) == Cut(8, rows=2, tokens=24, cut_answers=1, lost_answers=2)
    assert lengths.rows_where(lengths.tokens > 10) == (5,)
    assert lengths.rows_of_answers(lengths.ended == 0) == (5,)
    assert lengths.rows_of_answers(lengths.stops > 8) == (3, 5)


def test_there_may_be_nothing() -> None:
    assert Lengths().cut_at(8) == LengthsWriter().lengths().cut_at(8) == Cut(8, 0, 0, 0, 0)


def test_problems_that_are_kept_are_left_to_the_caller_up_to_a_limit() -> None:
    problems = Problems(kept=True)
    problems.add("a.jsonl:3", "broken", "mend it")
    problems.add("a.jsonl:5", "broken", "mend it")
    problems.check()
    assert (dict(problems.places), problems.hints) == ({"broken": ["a.jsonl:3", "a.jsonl:5"]}, "mend it")
    for number in range(ENOUGH - 3):
        problems.add(f"a.jsonl:{number}", "broken")
    with pytest.raises(DataError, match="reading stopped here"):
        problems.add("a.jsonl:9999", "broken")
