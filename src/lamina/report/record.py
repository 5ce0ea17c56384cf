"""The run's record: ``metrics.jsonl``, one object per step and per evaluation, and the same numbers for TensorBoard."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from lamina.errors import CheckpointError
from lamina.training.loop import Step


class Record:
    """Appends to a run's record. A resumed run first cuts it back to the step of its saved state.

    Args:
        run: the run's folder.
        after: keep the records up to this step; None starts a new record.
    """

    def __init__(self, run: Path, after: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        if after is not None:
            _cut(path, after)
        self._file = path.open("w" if after is None else "a", encoding="utf-8")
        purge = None if after is None else after + 1
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=purge, max_queue=1000)

    def step(self, step: Step) -> None:
        """Records an optimiser step."""
        self._write(asdict(step), "train")

    def evaluation(self, step: int, loss: float, tokens: int) -> None:
        """Records an evaluation on the held-out rows; step 0 is the untouched base."""
        self._write({"step": step, "eval_loss": loss, "eval_tokens": tokens}, "held_out")

    def _write(self, record: dict[str, Any], group: str) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(f"{group}/{name}", value, record["step"])

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.close()
        self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; a last line cut short by a kill is left out.

    Raises:
        CheckpointError: there is no record, or a damaged one.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); the run's record is lost, start a new run") from None


def _cut(path: Path, after: int) -> None:
    kept = [record for record in read_metrics(path.parent) if record["step"] <= after]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all: to a temporary name, then renamed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
