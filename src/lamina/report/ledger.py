"""``ledger.parquet``: one row for every step and adapted matrix, and the same in a few curves for TensorBoard.

Parquet cannot be appended to, so the whole file is written anew wherever the run saves, under another name and then renamed:
whenever the process is killed, what lies there is a complete file that everything reads, and it holds all steps up to the saved
state, from which the run goes on. What comes after that state is cut away on resuming, as it is in ``metrics.jsonl``.

Writing takes about 90 ns a row and 18 bytes: 20 ms for the first 1,000 steps of a 7B model (224 matrices), 0.2 s at 10,000 steps,
which is little beside the state that the same save writes, and at a save every 50 steps 20 s altogether. Rejected: part files,
which a reader of a killed run has to know of; Arrow's stream format, which can be appended to, but after a kill ends in half a
message that its readers refuse; and both of them need a merge at the end.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.errors import CheckpointError
from lamina.understand.ledger import COLUMNS, Place, Row

NAME = "ledger.parquet"


@dataclass(frozen=True)
class History:
    """The ledger of a run: ``steps`` [S] in rising order, M places, and ``values`` [S, len(COLUMNS), M]."""

    steps: NDArray[np.int32]
    places: tuple[Place, ...]
    values: NDArray[np.float32]

    def __getitem__(self, column: str) -> NDArray[np.float32]:
        """One column, [S, M]."""
        found: NDArray[np.float32] = self.values[:, COLUMNS.index(column)]
        return found

    def rows(self, until: int | None = None) -> Iterator[Row]:
        """Its rows, step by step, up to a step."""
        for step, values in zip(self.steps.tolist(), self.values, strict=True):
            if until is None or step <= until:
                yield Row(step, values)


class LedgerFile:
    """The ledger of a run that is under way.

    Args:
        run: the run's folder.
        places: of the matrices, in the order of the rows.
        rows: what is there already.
    """

    def __init__(self, run: Path, places: tuple[Place, ...], rows: list[Row]) -> None:
        self._path, self._places, self._rows = run / NAME, places, rows

    def add(self, row: Row) -> None:
        """Takes a step's row; it is written with the next save."""
        self._rows.append(row)

    def save(self) -> None:
        """Writes the file whole or not at all."""
        if not self._rows:
            return
        import pyarrow.parquet  # type: ignore[import-untyped]

        partial = self._path.with_name(NAME + ".partial")
        pyarrow.parquet.write_table(
            _table(self._rows, self._places),
            partial,
            compression="zstd",
            use_dictionary=["step", "layer", "module"],
            use_byte_stream_split=list(COLUMNS),
        )
        os.replace(partial, self._path)


def read_ledger(run: Path) -> History | None:
    """The ledger of a run; None where it has none, or an empty one.

    Raises:
        CheckpointError: there is one, and it cannot be read.
    """
    path = run / NAME
    if not path.is_file():
        return None
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        steps, counts = np.unique(table["step"].to_numpy(), return_counts=True)
        if not len(steps):
            return None
        matrices = int(counts[0])
        layers, modules = (table[name].slice(0, matrices).to_pylist() for name in ("layer", "module"))
        values = [table[name].to_numpy().reshape(len(steps), matrices) for name in COLUMNS]
    except (OSError, pyarrow.ArrowException, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); take it away to go on with a ledger that begins here, or to have a page without one"
        ) from None
    return History(steps, tuple(map(Place, layers, modules)), np.stack(values, axis=1))


def _table(rows: list[Row], places: tuple[Place, ...]) -> Any:
    """The rows as Arrow has them, made of buffers: its conversions import pandas, 45 MB for nothing."""
    import pyarrow

    def array(values: NDArray[Any], kind: Any) -> Any:
        return pyarrow.Array.from_buffers(kind, values.size, [None, pyarrow.py_buffer(np.ascontiguousarray(values))])

    modules = list(dict.fromkeys(place.module for place in places))
    ends = np.cumsum([0, *map(len, modules)], dtype=np.int32)
    words = pyarrow.StringArray.from_buffers(
        len(modules), pyarrow.py_buffer(ends), pyarrow.py_buffer("".join(modules).encode("ascii"))
    )
    index = np.array([modules.index(place.module) for place in places], dtype=np.int16)
    layer = np.array([place.layer for place in places], dtype=np.int16)
    step = np.array([row.step for row in rows], dtype=np.int32)
    values = np.stack([row.values for row in rows], axis=1)  # [len(COLUMNS), S, M]
    columns = {
        "step": array(np.repeat(step, len(places)), pyarrow.int32()),
        "layer": array(np.tile(layer, len(rows)), pyarrow.int16()),
        "module": pyarrow.DictionaryArray.from_arrays(array(np.tile(index, len(rows)), pyarrow.int16()), words),
    }
    columns |= {name: array(column, pyarrow.float32()) for name, column in zip(COLUMNS, values, strict=True)}
    return pyarrow.Table.from_arrays(list(columns.values()), names=list(columns))
