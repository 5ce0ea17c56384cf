from collections import Counter

import numpy as np
import pytest

from lamina.data.fit import Long, fit
from lamina.data.render import Rendered, Turn

BOS = 1


def talk() -> Rendered:
    """A prompt of 4 tokens, an answer of 4, a prompt of 2, an answer of 5."""
    trained = np.array([0] * 4 + [1] * 4 + [0] * 2 + [1] * 5, dtype=np.bool_)
    turns = (Turn(4, 8, True), Turn(10, 15, True))
    return Rendered(np.array([BOS, *range(10, 24)], dtype=np.int32), trained, 3, turns)


def run(length: int, long: Long, begins: int | None = BOS) -> tuple[list[Rendered], dict[str, int]]:
    count = Counter[str]()
    return fit(talk(), length, long, begins, count), {name: number for name, number in count.items() if number}


def test_what_fits_stays() -> None:
    (same,), count = run(15, "drop")
    assert (same.tokens == talk().tokens).all() and count == {}


def test_drop() -> None:
    kept, count = run(14, "drop")
    assert kept == []
    assert count == {"long_rows": 1, "lost_tokens": 15, "lost_targets": 9, "lost_answers": 2}


def test_truncate() -> None:
    (piece,), count = run(12, "truncate")
    assert piece.tokens.tolist() == talk().tokens[:12].tolist() and piece.row == 3
    assert piece.turns == (Turn(4, 8, True), Turn(10, 12, False))
    assert count == {"long_rows": 1, "lost_tokens": 3, "lost_targets": 3, "cut_answers": 1}


def test_truncate_before_an_answer() -> None:
    (piece,), count = run(10, "truncate")
    assert piece.turns == (Turn(4, 8, True),)
    assert count == {"long_rows": 1, "lost_tokens": 5, "lost_targets": 5, "lost_answers": 1}


def test_truncate_before_all_answers() -> None:
    kept, count = run(4, "truncate")
    assert kept == []
    assert count == {"long_rows": 1, "lost_tokens": 15, "lost_targets": 9, "lost_answers": 2}


def test_split() -> None:
    pieces, count = run(8, "split")
    assert [piece.tokens.tolist() for piece in pieces] == [[1, *range(10, 17)], [1, *range(17, 24)]]
    assert [piece.trained.astype(int).tolist() for piece in pieces] == [[0] * 4 + [1] * 4, [0, 0, 0] + [1] * 5]
    assert [piece.turns for piece in pieces] == [(Turn(4, 8, True),), (Turn(3, 8, True),)]
    assert count == {"long_rows": 1}


def test_split_loses_pieces_without_a_target() -> None:
    pieces, count = run(4, "split")
    assert [piece.tokens.tolist() for piece in pieces] == [
        [1, 13, 14, 15],
        [1, 16, 17, 18],
        [1, 19, 20, 21],
        [1, 22, 23],
    ]
    assert count == {"long_rows": 1, "lost_tokens": 4}


def test_split_without_a_token_that_begins_a_text() -> None:
    """The first token of a later piece has nothing before it: one target less."""
    pieces, count = run(6, "split", begins=None)
    assert [len(piece.tokens) for piece in pieces] == [6, 6, 3]
    assert not any(piece.trained[0] for piece in pieces)
    assert count == {"long_rows": 1, "lost_targets": 2}


@pytest.mark.parametrize("long", ["drop", "truncate", "split"])
def test_nothing_to_learn(long: Long) -> None:
    count = Counter[str]()
    empty = Rendered(np.array([1, 2], dtype=np.int32), np.zeros(2, dtype=np.bool_), 1)
    assert fit(empty, 8, long, BOS, count) == [] and not count
