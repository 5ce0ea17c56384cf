import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamina.data.render import Rendered
from lamina.data.store import TokenStore, TokenWriter
from lamina.errors import DataError


def rows(*lengths: int) -> list[Rendered]:
    random = np.random.default_rng(0)
    return [
        Rendered(random.integers(0, 32000, n).astype(np.int32), random.random(n) < 0.5, index + 10)
        for index, n in enumerate(lengths)
    ]


def stored(examples: list[Rendered]) -> TokenStore:
    with TokenWriter() as writer:
        for example in examples:
            writer.append(example)
        return writer.store()


def test_what_is_written_comes_back() -> None:
    examples = rows(3, 1, 500, 7)
    store = stored(examples)
    gc.collect()
    assert len(store) == 4 and store.lengths.tolist() == [3, 1, 500, 7]
    for example, found in zip(examples, store, strict=True):
        assert found.tokens.dtype == np.int32 and found.trained.dtype == np.bool_
        assert (found.tokens == example.tokens).all() and (found.trained == example.trained).all()
        assert found.row == example.row
    with pytest.raises(IndexError):
        store[4]


def test_part() -> None:
    examples = rows(3, 1, 500, 7)
    part = stored(examples).part(np.array([True, False, True, False]))
    assert [found.row for found in part] == [10, 12] and part.lengths.tolist() == [3, 500]
    assert part.fingerprint == stored([examples[0], examples[2]]).fingerprint


def test_empty() -> None:
    store = stored([])
    assert len(store) == 0 and list(store) == [] and store.lengths.tolist() == []


def test_fingerprint() -> None:
    """It changes with every token, mark, border and with the order; not with row numbers."""
    one, two = rows(3, 4)
    base = stored([one, two]).fingerprint
    joined = Rendered(np.concatenate([one.tokens, two.tokens]), np.concatenate([one.trained, two.trained]), 1)
    token = Rendered(one.tokens + np.int32(1), one.trained, 10)
    mark = Rendered(one.tokens, ~one.trained, 10)
    others = [[two, one], [joined], [token, two], [mark, two], [one]]
    prints = {stored(other).fingerprint for other in others}
    assert len(prints) == 5 and base not in prints
    assert stored([Rendered(one.tokens, one.trained, 99), two]).fingerprint == base


def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = stored(rows(5))
    assert list(tmp_path.iterdir()) == [] and len(store[0].tokens) == 5


class Full:
    """A file on a full disk: ``write`` or ``flush`` fails."""

    def __init__(self, fails: str) -> None:
        self.fails = fails

    def write(self, data: bytes) -> None:
        self._fail("write")

    def flush(self) -> None:
        self._fail("flush")

    def close(self) -> None:
        pass

    def _fail(self, name: str) -> None:
        if name == self.fails:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails", ["write", "flush"])
def test_full_disk(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Full:
        return Full(fails)

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    message = (
        r"the tokenised data cannot be written \(No space left on device\); it takes 4 bytes a token; TMPDIR names"
    )
    with pytest.raises(DataError, match=message):
        stored(rows(5))
