"""A run under way: what happens before the first step and between two steps, in order: evaluating, saving, stopping."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from lamina import jobs
from lamina.adapter_files import fingerprint, save_adapter
from lamina.data.prepare import Prepared
from lamina.errors import TrainingError
from lamina.evaluation import Answers, Scores, score
from lamina.job import PLACES, Job, order_of, settings_fingerprint
from lamina.model.decoder import Decoder
from lamina.observing import Observing
from lamina.planning import Planned
from lamina.report.record import Record
from lamina.training.finite import LOWER, damage
from lamina.training.interrupt import Interrupts
from lamina.training.loop import State, Step, rehearse, train
from lamina.training.resume import Progress, load_state, save_state
from lamina.training.stopwatch import Stopwatch

CHANGEABLE = (*PLACES, "read_ahead", "save_every", "memory_gib", "checkpoint_layers", "offload_checkpoints")
"""Settings that a resumed run may change, because they change nothing of its result."""


@runtime_checkable  # so that the tests can check the annotations that name it
class Show(Protocol):
    """Where a run tells what it does."""

    def line(self, text: str) -> None: ...
    def start(self, steps: int, done: int) -> None: ...
    def step(self, step: Step) -> None: ...
    def evaluation(self, step: int, loss: float) -> None: ...


class Silent:
    """Shows nothing."""

    def line(self, text: str) -> None: ...
    def start(self, steps: int, done: int) -> None: ...
    def step(self, step: Step) -> None: ...
    def evaluation(self, step: int, loss: float) -> None: ...


def origin_of(job: Job, data: Prepared, base: str) -> dict[str, str]:
    """What a run is computed from, as fingerprints by name; ``base`` is that of the base."""
    return {
        "training rows": data.train.fingerprint,
        "held-out rows": data.held_out.fingerprint,
        "base model": base,
        "settings": settings_fingerprint(job, CHANGEABLE),
    }


class UnderWay:
    """A run under way: what the loop's body needs at hand."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        base: Path,
        model: Decoder,
        data: Prepared,
        state: State,
        show: Show,
        watch: Stopwatch,
    ) -> None:
        self.job, self.folder, self.model, self.data, self.state, self.show = job, folder, model, data, state, show
        self.watch = watch
        self.base_scores: Scores | None = None  # of the evaluations before the first step and after the last one,
        self.last_scores: Scores | None = None  # as far as this process has made them
        shipped = job.model.model.startswith(jobs.PREFIX)
        self.base_name = str(base.resolve()) if shipped else job.model.model  # PEFT knows nothing of what Lamina ships
        self.progress = Progress()
        self.steps = job.train.total_steps(len(data.train))
        self.every = job.watch.eval_every or max(1, -(-self.steps // 5))
        self.origin = origin_of(job, data, fingerprint(model))

    def train(self, resuming: bool, planned: Planned, ask: Callable[[], Answers | None]) -> list[str]:
        """Trains to the end, from the beginning or from the saved state, and returns what the ledger says in words.

        Args:
            ask: answers the sample prompts with the model as it is; None where there are none.
        """
        self.ask, lengths = ask, self.data.train.lengths
        if resuming:
            self.progress = load_state(self.folder, self.model, self.state, self.origin)
            self.watch.add(self.progress.seconds)
            if self.state.step:  # adapter/ may have been removed, or name the base's former place
                self.save_adapter("adapter")
            self.show.line(f"resuming {self.folder} after step {self.state.step} of {self.steps}")
        after = self.state.step if resuming else None
        with (
            self.watch("training"),  # what is opened for it too; the parts inside count for themselves
            Record(self.folder, after) as record,
            Observing(
                self.folder, self.job, self.model, self.state, lengths, record, self.show.line, after
            ) as self.observing,
        ):
            self.show.start(self.steps, self.state.step)
            if self.state.step < self.steps and not self.progress.out_of(self.job.watch.patience):
                self.rehearse(planned)
            if not resuming:
                self.before_first_step(record)
            with Interrupts() as interrupts:
                self.steps_to_the_end(record, interrupts)
        if self.progress.best_loss is not None:
            best = f"best held-out loss {self.progress.best_loss:.4f}, at step {self.progress.best_step}"
            self.show.line(f"{best}: {self.folder / 'best'}")
        return self.observing.notes

    def steps_to_the_end(self, record: Record, interrupts: Interrupts) -> None:
        """The loop: what happens between two steps, in order."""
        patience = self.job.watch.patience
        order = order_of(self.job, self.data.train.lengths)
        steps = train(self.model, self.data.train, self.job.train, self.state, self.job.head.seed, order)
        for step in () if self.progress.out_of(patience) else steps:
            record.step(step)
            self.observing.step(step)
            self.show.step(step)
            last = step.step == self.steps
            if step.step % self.every == 0 or last:
                with self.watch("evaluations"):
                    self.evaluate(record)
            stop = self.progress.out_of(patience)
            if last or stop or interrupts.requested or step.step % self.job.watch.save_every == 0:
                with self.watch("saving"):
                    self.save()
            if stop:
                self.show.line(f"stopped early: {patience} evaluations without a better one")
                break
            if interrupts.requested:
                raise KeyboardInterrupt(
                    f"interrupted after step {step.step} of {self.steps}; everything is saved; "
                    f"go on with: lamina train --resume {self.folder}"
                )

    def rehearse(self, planned: Planned) -> None:
        """Meets the longest examples now rather than hours later; a resumed run too may have less memory than it needs."""
        moments = 0 if self.state.step else planned.plan.items["optimiser"]  # which the first step makes
        rehearse(self.model, planned.heaviest, self.job.train, self.state.step + 1, moments)
        self.show.line(
            f"the heaviest micro-batch of the run ({len(planned.heaviest.tokens):,} tokens) was computed once: it fits"
        )

    def before_first_step(self, record: Record) -> None:
        """Measures the untouched base, and saves what a run can go on from."""
        with self.watch("base_evaluation"):
            self.evaluate(record)
        with self.watch("saving"):
            self.save_state()

    def evaluate(self, record: Record) -> None:
        """Measures the held-out loss, records it, and keeps the adapter if it is the best so far."""
        if not len(self.data.held_out):
            return
        scores = score(self.model, self.data.held_out, self.job.train.portion)
        found = scores.evaluation
        if not math.isfinite(found.loss):
            advice = damage(self.model) or f"{LOWER}, or look at the held-out rows"
            raise TrainingError(
                f"step {self.state.step}: the held-out loss is not finite; nothing of this step is saved; {advice}"
            )
        record.evaluation(self.state.step, found.loss, found.tokens)
        self.show.evaluation(self.state.step, found.loss)
        self.observing.evaluation(self.ask())
        if not self.state.step:
            self.base_scores = scores
        else:
            self.last_scores = scores
            self.progress = self.progress.after(self.state.step, found.loss)
            if self.progress.best_step == self.state.step:
                self.save_adapter("best")

    def save(self) -> None:
        """Saves the adapter as it is, and everything that decides the next step."""
        self.save_adapter("adapter")
        self.observing.save()
        self.save_state()

    def save_state(self) -> None:
        """Saves everything that decides the next step, and the time that was spent so far."""
        progress = replace(self.progress, seconds=dict(self.watch.seconds))
        save_state(self.folder, self.model, self.state, progress, self.origin)

    def save_adapter(self, name: str) -> None:
        """Saves the adapter in PEFT's format."""
        settings = self.job.model
        save_adapter(self.model, self.folder / name, self.job.adapter, self.base_name, settings.revision)
