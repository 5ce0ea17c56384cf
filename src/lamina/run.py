"""A whole run, from a job to its folder: everything below is composed here, in the order in which it happens.

``fine_tune`` and ``resume`` share ``_go``: read the data, load the base, lay on the adapter, evaluate the base, train, and
close with the card. What happens between two steps (evaluation, saving, stopping) is the body of one loop.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lamina import jobfile, jobs
from lamina.adapter import adapted, attach
from lamina.adapter_files import fingerprint, save_adapter
from lamina.data.prepare import Prepared
from lamina.errors import ConfigError, Error, TrainingError
from lamina.evaluation import evaluate
from lamina.job import SECTIONS, Job, base_folder, check, new_folder, prepare_data, read_job, settings_fingerprint
from lamina.model.decoder import Decoder
from lamina.model.tokenizer import load_tokenizer
from lamina.model.weights import pick_device
from lamina.opened import Opened, card_of, measured, open_run, stops
from lamina.planning import Planned, compared, plan_run
from lamina.report.opening import data_lines, training_lines
from lamina.report.record import Record, read_metrics, write_json, write_text
from lamina.reporting import write_explanation, write_page
from lamina.training.available import Meter
from lamina.training.finite import damage
from lamina.training.interrupt import Interrupts
from lamina.training.loop import State, Step, memory_told, rehearse, start, train
from lamina.training.resume import Progress, has_state, load_state, locked, save_state
from lamina.understand.card import Card

CHANGEABLE = ("read_ahead", "save_every", "memory_gib", "checkpoint_layers", "offload_checkpoints")
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


@dataclass(frozen=True)
class Result:
    """A finished run: its folder and its card, the base beside the adapter."""

    folder: Path
    card: Card


def fine_tune(job: Job, show: Show | None = None) -> Result:
    """Runs a job in a new folder.

    Raises:
        Error: whatever of the job, its model or its data is wrong, in one line; nothing of an earlier run is lost.
    """
    given = job.head.out is not None and Path(job.head.out).exists()
    folder = new_folder(job.head)
    with locked(folder):
        try:
            write_text(folder / "job.toml", jobfile.dump(job.sections()))
            return _go(job, folder, show or Silent(), resuming=False)
        except (Error, KeyboardInterrupt) as error:
            if (folder / "state").exists():
                raise _with_the_way_on(error, folder) from None
            _clear(folder)  # refused before it began: there is nothing to keep
            if not given:
                folder.rmdir()
            raise


def resume(folder: Path, changes: Mapping[str, Any] | None = None, show: Show | None = None) -> Result:
    """Goes on with a run exactly where its last saved state stands.

    Args:
        changes: other values for settings named in ``CHANGEABLE``.

    Raises:
        CheckpointError: no run there, one in use, or one whose data, base or version is another.
    """
    job = read_job(folder)
    for part in ("data", "train", "watch"):
        section = getattr(job, part)
        own = {name: value for name, value in (changes or {}).items() if name in {f.name for f in fields(section)}}
        job = replace(job, **{part: replace(section, **own)})
    with locked(folder):
        try:
            return _go(job, folder, show or Silent(), resuming=has_state(folder))
        except KeyboardInterrupt as interrupt:
            raise _with_the_way_on(interrupt, folder) from None


def _with_the_way_on(error: BaseException, folder: Path) -> BaseException:
    """An interrupt without a word, as a second Ctrl-C is, gets one; what says something already is left as it is."""
    if isinstance(error, KeyboardInterrupt) and not str(error):
        return KeyboardInterrupt(f"interrupted; go on from the last saved state with: lamina train --resume {folder}")
    return error


def _clear(folder: Path) -> None:
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()


def _go(job: Job, folder: Path, show: Show, resuming: bool) -> Result:
    base = base_folder(job.model)
    check(job, base)
    tokenizer = load_tokenizer(base)
    data = prepare_data(job, base, tokenizer)
    for line in data_lines(data, tokenizer):
        show.line(line)
    if job.watch.patience and not len(data.held_out):
        raise ConfigError("watch.patience: counts evaluations, but nothing is held out; set eval_fraction or eval_data")
    planned = plan_run(job, base, data)
    for line in planned.lines():
        show.line(line)
    planned.check()
    job = replace(job, train=planned.training)
    write_text(
        folder / "job.toml", jobfile.dump(job.sections())
    )  # with what was chosen: resumed, it is cut in the same way
    meter = Meter(pick_device(job.model.device))
    with memory_told():
        model = job.model.load(base)
    attach(model, job.adapter, job.head.seed)
    run = _Run(job, folder, base, model, data, start(model, job.train), show)
    for line in training_lines(model, job.model.model, job.train, run.steps, run.every if len(data.held_out) else None):
        show.line(line)
    with memory_told():
        run.train(resuming, planned)
        measured_peak = meter.peak()
        show.line(compared(planned, measured_peak))
        card = measured(model, tokenizer, stops(base, tokenizer, job.data.template), data, job)
    memory = {"planned": planned.as_json(), "measured_bytes": measured_peak}
    write_json(folder / "card.json", _about(job, model, folder) | {"memory": memory} | card.as_json())
    write_explanation(model, folder, base, data.held_out, job.train.portion, show.line)
    write_page(folder, show.line)
    return Result(folder, card)


class _Run:
    """A run under way: what the loop's body needs at hand."""

    def __init__(
        self, job: Job, folder: Path, base: Path, model: Decoder, data: Prepared, state: State, show: Show
    ) -> None:
        self.job, self.folder, self.model, self.data, self.state, self.show = job, folder, model, data, state, show
        shipped = job.model.model.startswith(jobs.PREFIX)
        self.base_name = str(base.resolve()) if shipped else job.model.model  # PEFT knows nothing of what Lamina ships
        self.progress = Progress()
        self.steps = job.train.total_steps(len(data.train))
        self.every = job.watch.eval_every or max(1, -(-self.steps // 5))
        self.origin = {
            "training rows": data.train.fingerprint,
            "held-out rows": data.held_out.fingerprint,
            "base model": fingerprint(model),
            "settings": settings_fingerprint(job, CHANGEABLE),
        }

    def train(self, resuming: bool, planned: Planned) -> None:
        """Trains to the end, from the beginning or from the saved state."""
        if resuming:
            self.progress = load_state(self.folder, self.model, self.state, self.origin)
            self.show.line(f"resuming {self.folder} after step {self.state.step} of {self.steps}")
        with Record(self.folder, after=self.state.step if resuming else None) as record:
            self.show.start(self.steps, self.state.step)
            if not resuming:
                self.before_first_step(record, planned)
            with Interrupts() as interrupts:
                self.steps_to_the_end(record, interrupts)
        if self.progress.best_loss is not None:
            best = f"best held-out loss {self.progress.best_loss:.4f}, at step {self.progress.best_step}"
            self.show.line(f"{best}: {self.folder / 'best'}")

    def steps_to_the_end(self, record: Record, interrupts: Interrupts) -> None:
        """The loop: what happens between two steps, in order."""
        patience = self.job.watch.patience
        steps = train(self.model, self.data.train, self.job.train, self.state, self.job.head.seed)
        for step in () if self.progress.out_of(patience) else steps:
            record.step(step)
            self.show.step(step)
            last = step.step == self.steps
            if step.step % self.every == 0 or last:
                self.evaluate(record)
            stop = self.progress.out_of(patience)
            if last or stop or interrupts.requested or step.step % self.job.watch.save_every == 0:
                self.save()
            if stop:
                self.show.line(f"stopped early: {patience} evaluations without a better one")
                break
            if interrupts.requested and not last:
                raise KeyboardInterrupt(
                    f"interrupted after step {step.step} of {self.steps}; everything is saved; "
                    f"go on with: lamina train --resume {self.folder}"
                )

    def before_first_step(self, record: Record, planned: Planned) -> None:
        """Meets the longest examples now rather than hours later, and measures the untouched base."""
        rehearse(self.model, planned.heaviest, self.job.train)
        self.show.line(
            f"the heaviest micro-batch of the run ({len(planned.heaviest.tokens):,} tokens) was computed once: it fits"
        )
        self.evaluate(record)
        save_state(self.folder, self.model, self.state, self.progress, self.origin)

    def evaluate(self, record: Record) -> None:
        """Measures the held-out loss, records it, and keeps the adapter if it is the best so far."""
        if not len(self.data.held_out):
            return
        found = evaluate(self.model, self.data.held_out, self.job.train.portion)
        if not math.isfinite(found.loss):
            advice = damage(self.model) or "lower the learning rate, or look at the held-out rows"
            raise TrainingError(
                f"step {self.state.step}: the held-out loss is not finite; nothing of this step is saved; {advice}"
            )
        record.evaluation(self.state.step, found.loss, found.tokens)
        self.show.evaluation(self.state.step, found.loss)
        if self.state.step:
            self.progress = self.progress.after(self.state.step, found.loss)
            if self.progress.best_step == self.state.step:
                self.save_adapter("best")

    def save(self) -> None:
        """Saves the adapter as it is, and everything that decides the next step."""
        self.save_adapter("adapter")
        save_state(self.folder, self.model, self.state, self.progress, self.origin)

    def save_adapter(self, name: str) -> None:
        """Saves the adapter in PEFT's format."""
        settings = self.job.model
        save_adapter(self.model, self.folder / name, self.job.adapter, self.base_name, settings.revision)


def _about(job: Job, model: Decoder, folder: Path) -> dict[str, Any]:
    """What the card says beside the measures: of what, with what, at which cost."""
    steps = [record for record in read_metrics(folder) if "loss" in record]
    return {
        "job": job.head.name,
        "model": job.model.model,
        "revision": job.model.revision,
        "base_fingerprint": fingerprint(model),
        "adapter_parameters": sum(m.a.numel() + m.b.numel() for m in adapted(model).values()),
        "steps": len(steps),
        "tokens": sum(step["tokens"] for step in steps),
        "supervised_tokens": sum(step["supervised_tokens"] for step in steps),
        "training_seconds": sum(step["seconds"] for step in steps),
        "memory_bytes": max(step["memory_bytes"] for step in steps),
        "versions": {name: version(name) for name in ("lamina", "torch", "transformers")},
        "device": str(model.vocabulary.device),
    }


__all__ = ["CHANGEABLE", "SECTIONS", "Job", "Opened", "Result", "Show", "card_of", "fine_tune", "open_run", "resume"]
