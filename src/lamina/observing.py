"""What a run sees of itself between its steps: the ledger with its notes in words, and answers to the same few prompts."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from lamina.evaluation import Answers
from lamina.job import Job
from lamina.model.decoder import Decoder
from lamina.report.ledger import History, LedgerFile, read_ledger
from lamina.report.record import Record, SampleRecord, read_metrics
from lamina.training.loop import State, Step
from lamina.understand.ledger import Observer, places, summaries
from lamina.understand.notes import Notes

POINTS = 1000
"""Steps that are all drawn in TensorBoard, which shows no more of a curve; beyond them every second, then every third, …"""

_SHOWN = 70
"""Characters of a prompt or an answer that are shown in the console; the record holds them whole."""


class Observing:
    """Observes a run whose state is loaded; a context, entered before the first step and left after the last.

    Args:
        run: the run's folder.
        lengths: tokens of each training row.
        say: told what people should read.
        after: the step of the saved state that a resumed run goes on from; None for a new run.
    """

    def __init__(
        self,
        run: Path,
        job: Job,
        model: Decoder,
        state: State,
        lengths: NDArray[np.int64],
        record: Record,
        say: Callable[[str], None],
        after: int | None = None,
    ) -> None:
        self._record, self._say, self._state = record, say, state
        self._places, every = places(model), job.watch.ledger_every
        before = read_ledger(run) if every and after is not None else None
        self._file = LedgerFile(run, self._places, list(before.rows(after)) if before else [])
        self._notes = Notes(self._places, job.train, lengths)
        if after is not None:
            self._hear_again(run, after, before)
        self._observer = Observer(model, state, every) if every else None
        self._samples = SampleRecord(run, after)

    def __enter__(self) -> "Observing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._observer:
            self._observer.close()
        self._samples.close()
        if error is not None:
            self._file.save()  # what led to an error is worth reading; a resumed run cuts it back

    def step(self, step: Step) -> None:
        """Takes what a step did into the ledger."""
        row = self._observer.row() if self._observer else None
        if row is not None:
            self._file.add(row)
            if row.step % (1 + row.step // POINTS) == 0:
                self._record.curves(row.step, summaries(row, self._places))
        for note in self._notes.step(step, row):
            self._say(note)

    def evaluation(self, found: Answers | None) -> None:
        """Records the answers to the sample prompts, if there are any, and shows the beginning of each."""
        if found is None:
            return
        self._samples.add(self._state.step, found)
        for answer in found.rows:
            ending = "" if answer.stopped else " …"
            self._say(
                f"  held-out row {answer.row}: {_brief(answer.prompt, last=True)} → {_brief(answer.answer)}{ending}"
            )

    def save(self) -> None:
        """Writes the ledger. Before the state, so that it holds every step that the state has seen."""
        self._file.save()

    @property
    def notes(self) -> list[str]:
        """What was said of the ledger, in words; also before the run was resumed."""
        return list(self._notes.said)

    def _hear_again(self, run: Path, after: int, before: History | None) -> None:
        """Goes through the steps up to the saved state, so that notes know what they have said and seen."""
        rows = {row.step: row for row in before.rows(after)} if before else {}
        for record in read_metrics(run):
            if "loss" in record and record["step"] <= after:
                self._notes.step(Step(**record), rows.get(record["step"]))


def _brief(text: str, last: bool = False) -> str:
    """A text in one line, of a long one the beginning or the end."""
    line = "⏎".join(part.strip() for part in text.strip().splitlines())
    if len(line) > _SHOWN:
        line = f"… {line[-_SHOWN:]}" if last else f"{line[:_SHOWN]} …"
    return f"“{line}”"
