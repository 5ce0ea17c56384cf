from collections.abc import Sequence

import numpy as np
import pytest

from lamina.data.pack import pack
from lamina.data.render import Rendered
from lamina.errors import DataError


def row(number: int, tokens: Sequence[int], trained: Sequence[int]) -> Rendered:
    return Rendered(np.array(tokens, dtype=np.int32), np.array(trained, dtype=np.bool_), number)


def plain(number: int, length: int) -> Rendered:
    """A text of ``length`` tokens, all learnt but the first: it takes ``length - 1`` inputs."""
    return row(number, range(length), [0] + [1] * (length - 1))


def test_targets_are_shifted_once() -> None:
    (batch,) = pack([row(5, [1, 10, 11, 12, 13, 14], [0, 0, 1, 0, 1, 0])], 100)
    assert batch.tokens.tolist() == [1, 10, 11, 12]  # 13 and 14 predict nothing
    assert batch.targets.tolist() == [-100, 11, -100, 13]
    assert batch.position.tolist() == [0, 1, 2, 3]
    assert (batch.lengths, batch.rows, batch.real_tokens, batch.real_lengths) == ((4,), (5,), 6, (6,))
    assert batch.supervised == 2


def test_examples_stand_side_by_side() -> None:
    (batch,) = pack([plain(1, 3), plain(2, 4)], 5)
    assert batch.tokens.tolist() == [0, 1, 2, 0, 1]
    assert batch.targets.tolist() == [1, 2, 3, 1, 2]
    assert batch.position.tolist() == [0, 1, 2, 0, 1]
    assert (batch.lengths, batch.rows, batch.real_tokens) == ((3, 2), (2, 1), 7)


def test_best_fit() -> None:
    """7 and 5 open bins of 10 with room 3 and 5; 5 fills the second; 3 goes where it fits exactly."""
    batches = pack([plain(1, 4), plain(2, 6), plain(3, 8), plain(4, 6)], 10)
    assert [batch.rows for batch in batches] == [(2, 4), (3, 1)]


def test_heaviest_first_and_long_ones_alone() -> None:
    batches = pack([plain(1, 3), plain(2, 30), plain(3, 9), plain(4, 3)], 10)
    assert [(batch.rows, sum(batch.lengths)) for batch in batches] == [((2,), 29), ((3, 1), 10), ((4,), 2)]


def test_nothing() -> None:
    assert pack([], 10) == []


@pytest.mark.parametrize("trained", [[0, 0, 0], [1, 0, 0]])
def test_nothing_to_learn(trained: list[int]) -> None:
    with pytest.raises(DataError, match="row 3: nothing to learn, expected at least one trained token after the first"):
        pack([row(3, [1, 2, 3], trained)], 10)
