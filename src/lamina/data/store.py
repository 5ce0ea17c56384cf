"""Rendered examples on disk: as many as the disk holds, read back by index.

Four bytes a token in a temporary file without a name, which vanishes with the process however it ends. A token that is
a target is stored as its bitwise complement, a negative number. In memory stay sixteen bytes an example.
"""

import hashlib
import tempfile
from array import array
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lamina.data.render import Rendered
from lamina.errors import DataError


class TokenStore:
    """Examples by index, in the order of the data; a view of those that one part of a run uses."""

    def __init__(self, values: NDArray[np.int32], ends: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        self._values = values
        self._starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        self._ends = ends
        self._rows = rows

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Rendered:
        """The example at ``index``, from 0; an IndexError beyond the last."""
        values = np.array(self._values[self._starts[index] : self._ends[index]])
        trained = values < 0
        return Rendered(np.where(trained, ~values, values), trained, int(self._rows[index]))

    def __iter__(self) -> Iterator[Rendered]:
        return (self[index] for index in range(len(self)))

    def part(self, chosen: NDArray[np.bool_]) -> "TokenStore":
        """The chosen examples, in the same order, of the same file."""
        view = TokenStore(self._values, self._ends[chosen], self._rows[chosen])
        view._starts = self._starts[chosen]
        return view

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row that each example came from."""
        return self._rows

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return self._ends - self._starts

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens, marks and lengths in their order: equal stores give equal batches."""
        digest = hashlib.sha256()
        for start, end in zip(self._starts.tolist(), self._ends.tolist(), strict=True):
            digest.update((end - start).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(self._values[start:end], dtype="<i4").data)
        return digest.hexdigest()


class TokenWriter:
    """Takes examples one by one and becomes a store; a context, because the store outlives the file's handle."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        self._ends, self._rows, self._end = array("q"), array("q"), 0

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, example: Rendered) -> None:
        """Adds an example at the end.

        Raises:
            DataError: the disk of the temporary folder is full.
        """
        values = np.where(example.trained, ~example.tokens, example.tokens).astype(np.int32)
        try:
            self._file.write(values.tobytes())
        except OSError as error:
            raise _no_room(error) from None
        self._end += len(values)
        self._ends.append(self._end)
        self._rows.append(example.row)

    def store(self) -> TokenStore:
        """What was written; nothing can be added any more."""
        try:
            self._file.flush()
        except OSError as error:
            raise _no_room(error) from None
        values: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        if self._end:
            values = np.memmap(self._file, dtype=np.int32, mode="r", shape=(self._end,))
        return TokenStore(values, np.array(self._ends, dtype=np.int64), np.array(self._rows, dtype=np.int64))


def _no_room(error: OSError) -> DataError:
    return DataError(
        f"{tempfile.gettempdir()}: the tokenised data cannot be written ({error.strerror or error}); it takes 4 bytes a "
        "token; TMPDIR names another folder"
    )
