"""The run's record: ``metrics.jsonl``, one object per step and per evaluation, and the same numbers for TensorBoard; and
``samples.jsonl``, one object per answer to a sample prompt."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any

from lamina.errors import CheckpointError
from lamina.evaluation import Answers
from lamina.training.loop import Step


class Record:
    """Appends to a run's record. A resumed run first cuts it back to the step of its saved state.

    Args:
        run: the run's folder.
        after: keep the records up to this step; None starts a new record.
    """

    def __init__(self, run: Path, after: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = _opened(run / "metrics.jsonl", after)
        purge = None if after is None else after + 1
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=purge, max_queue=1000)

    def step(self, step: Step) -> None:
        """Records an optimiser step."""
        self._write(asdict(step), "train")

    def evaluation(self, step: int, loss: float, tokens: int) -> None:
        """Records an evaluation on the held-out rows; step 0 is the untouched base."""
        self._write({"step": step, "eval_loss": loss, "eval_tokens": tokens}, "held_out")

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        """Draws points of other curves in TensorBoard, all in one event: a tenth of what an event for each would take."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._board.file_writer.add_summary(Summary(value=points), step)  # type: ignore[attr-defined]

    def _write(self, record: dict[str, Any], group: str) -> None:
        _append(self._file, record)
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


class SampleRecord:
    """Appends to ``samples.jsonl``, the answers to the same few prompts at every evaluation; cut back like ``Record``."""

    def __init__(self, run: Path, after: int | None = None) -> None:
        path = run / "samples.jsonl"
        self._file = _opened(path, after if path.exists() else None)  # runs of older versions have none

    def add(self, step: int, answers: Answers) -> None:
        """Records the answers at a step; those at step 0 are the untouched base's."""
        for a in answers.rows:
            said = {"prompt": a.prompt, "reference": a.reference, "answer": a.answer, "stopped": a.stopped}
            _append(self._file, {"step": step, "row": a.row} | said)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; a last line cut short by a kill is left out.

    Raises:
        CheckpointError: there is no record, or a damaged one.
    """
    return _read(run / "metrics.jsonl")


def read_samples(run: Path) -> list[dict[str, Any]]:
    """All answers to the sample prompts of a run, in order; none where it asked none.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = run / "samples.jsonl"
    return _read(path) if path.exists() else []


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); the run's record is lost, start a new run") from None


def _opened(path: Path, after: int | None) -> TextIOWrapper:
    """The file, new or cut back to the records up to step ``after``, to append to."""
    if after is not None:
        kept = [record for record in _read(path) if record["step"] <= after]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return path.open("w" if after is None else "a", encoding="utf-8")


def _append(file: TextIOWrapper, record: dict[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all: to a temporary name, then renamed."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:  # a full disk does not say which file it could not take
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
