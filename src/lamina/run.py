"""A whole run, from a job to its folder: everything below is composed here, in the order in which it happens.

``fine_tune`` and ``resume`` share ``_go``: read the data, load the base, lay on the adapter, evaluate the base, train, and
close with the card. What happens between two steps (evaluation, saving, stopping) is the body of one loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from lamina import jobfile
from lamina.adapter import attach
from lamina.data.prepare import Prepared
from lamina.doctor.checkup import diagnose
from lamina.errors import ConfigError, Error, OutOfMemoryError, memory_told
from lamina.evaluation import answers
from lamina.job import (
    PLACES,
    SECTIONS,
    Job,
    base_folder,
    check,
    elsewhere,
    new_folder,
    prepare_data,
    read_job,
    take_back,
)
from lamina.model.architecture import read_config
from lamina.model.decoder import Decoder
from lamina.model.fingerprint import stored_fingerprint
from lamina.model.tokenizer import load_tokenizer
from lamina.model.weights import pick_device, used_tensors
from lamina.opened import Opened, at_new_place, card_of, measured, neutral_of, open_run, stops
from lamina.planning import compared, plan_run
from lamina.report.about import about
from lamina.report.opening import data_lines, pace_line, time_line, training_lines
from lamina.report.record import write_json, write_text
from lamina.reporting import write_explanation, write_page
from lamina.training.available import Meter
from lamina.training.loop import start
from lamina.training.resume import check_origin, has_state, locked, read_header
from lamina.training.stopwatch import Stopwatch
from lamina.under_way import CHANGEABLE, Show, Silent, UnderWay, origin_of
from lamina.understand.card import Asked, Card
from lamina.ways_out import Way, of_run


@dataclass(frozen=True)
class Result:
    """A finished run: its folder and its card, the base beside the adapter."""

    folder: Path
    card: Card


def fine_tune(job: Job, show: Show | None = None, loaded: Decoder | None = None) -> Result:
    """Runs a job in a new folder.

    Args:
        loaded: the job's base without an adapter, where it is in memory already; it keeps the trained adapter.

    Raises:
        Error: whatever of the job, its model or its data is wrong, in one line; nothing of an earlier run is lost.
    """
    given = job.head.out is not None and Path(job.head.out).exists()
    folder = new_folder(job.head)
    with locked(folder):
        try:
            write_text(folder / "job.toml", jobfile.dump(job.sections()))
            return _told(job, folder, show, resumed=False, loaded=loaded)
        except (Error, OSError, KeyboardInterrupt):
            if (folder / "state").exists():
                raise
            take_back(folder, given)  # refused before it began: there is nothing to keep
            raise


def resume(
    folder: Path,
    changes: Mapping[str, Any] | None = None,
    show: Show | None = None,
    loaded: Decoder | None = None,
) -> Result:
    """Goes on with a run exactly where its last saved state stands.

    Args:
        changes: other values for settings named in ``CHANGEABLE``. A ``model`` without a ``revision`` has none.
        loaded: as for ``fine_tune``.

    Raises:
        CheckpointError: no run there, one in use, or one whose data, base or version is another.
    """
    job = _changed(read_job(folder), at_new_place(changes or {}))
    with locked(folder):
        return _told(job, folder, show, resumed=True, loaded=loaded)


def _changed(job: Job, changes: Mapping[str, Any]) -> Job:
    for part in ("model", "data", "train", "watch"):
        section = getattr(job, part)
        own = {name: value for name, value in changes.items() if name in {f.name for f in fields(section)}}
        job = replace(job, **{part: replace(section, **own)})
    return job


def _told(job: Job, folder: Path, show: Show | None, resumed: bool, loaded: Decoder | None) -> Result:
    """Goes, and where a second Ctrl-C or the end of the memory ends the run, says how it goes on; other ends say it themselves."""
    watch = Stopwatch()
    try:
        with memory_told("free some memory"):
            return _go(job, folder, show or Silent(), watch, resumed, loaded)
    except OutOfMemoryError:
        part = watch.stopped or "start"
        raise OutOfMemoryError(f"out of memory ({part.replace('_', ' ')}); {_way_on(job, folder, part)}") from None
    except KeyboardInterrupt as error:
        if str(error) or not (folder / "state").exists():
            raise
        told = f"interrupted; go on from the last saved state with: lamina train --resume {folder}"
        raise KeyboardInterrupt(told) from None


def _way_on(job: Job, folder: Path, part: str) -> str:
    """What to do about a run that memory ended in this part: in the steps, and nowhere else, recomputation takes less."""
    if not (folder / "state").exists():
        return _before_it_began(job, part)
    flags = ""
    if part == "training":
        job = read_job(folder)  # as it was planned
        layers = read_config(base_folder(job.model)).layers
        flags = sum(of_run(job, pick_device(job.model.device).type, layers), Way()).flags
    command = f"go on with: lamina train --resume {folder}"
    return f"what was saved is untouched; {f'{command} {flags}' if flags else f'free some memory, and {command}'}"


def _before_it_began(job: Job, part: str) -> str:
    """The same of a run of which nothing is saved, so that everything may be another."""
    cut = "lower --micro-batch-tokens or --max-length"
    if part == "training":
        return f"{cut}, or raise --checkpoint-layers (the result stays the same but for --max-length)"
    if part == "base_evaluation":
        return f"{cut} (the result stays the same but for --max-length)"
    fewer = part == "load" and job.model.base not in ("nf4", "fp4")
    return f"free some memory{', or keep the base in fewer bits: --base nf4' if fewer else ''}"


def _read(job: Job, watch: Stopwatch, resumed: Path | None) -> tuple[Path, Any, Prepared]:
    """The folder of a job's base, its tokenizer, and the data; ``resumed`` is the folder of a run that goes on."""
    with elsewhere(resumed):
        base = base_folder(job.model)
    check(job, base)
    with watch("data"):
        tokenizer = load_tokenizer(base)
        neutral_of(job, tokenizer, read_config(base))  # read for the card; what is wrong with it is better told now
        with elsewhere(resumed, data="--data or --eval-data"):
            return base, tokenizer, prepare_data(job, base, tokenizer)


def _keep_places(job: Job, folder: Path, base: Path, data: Prepared) -> None:
    """Writes where base and data of a resumed run lie now into its job, once they are known to be what they were.

    Raises:
        CheckpointError: they are not.
    """
    architecture = read_config(base)
    found = stored_fingerprint(architecture, used_tensors(base, architecture))
    check_origin(folder, read_header(folder), origin_of(job, data, found))
    places = {name: value for part in (job.model, job.data) for name, value in vars(part).items() if name in PLACES}
    write_text(folder / "job.toml", jobfile.dump(_changed(read_job(folder), places).sections()))


def _go(job: Job, folder: Path, show: Show, watch: Stopwatch, resumed: bool, loaded: Decoder | None) -> Result:
    resuming = resumed and has_state(folder)
    base, tokenizer, data = _read(job, watch, folder if resumed else None)
    if resuming:
        _keep_places(job, folder, base, data)
    for line in data_lines(data, tokenizer):
        show.line(line)
    if job.faults.commit:
        show.line(job.faults.line())
    if job.watch.patience and not len(data.held_out):
        raise ConfigError("watch.patience: counts evaluations, but nothing is held out; set eval_fraction or eval_data")
    with watch("planning"):
        planned = plan_run(job, base, data, resumed=folder if resumed else None)
    if not resuming:
        with watch("check"):
            diagnosis = diagnose(job, base, tokenizer, data, planned)
        write_json(folder / "check.json", diagnosis.as_json())
        for line in diagnosis.short():
            show.line(line)
    for line in planned.lines():
        show.line(line)
    planned.check()
    job = replace(job, train=planned.training)
    write_text(
        folder / "job.toml", jobfile.dump(job.sections())
    )  # with what was chosen: resumed, it is cut in the same way
    meter = Meter(pick_device(job.model.device))
    with watch("load"):
        model = loaded or job.model.load(base)
        attach(model, job.adapter, job.head.seed)
        run = UnderWay(job, folder, base, model, data, start(model, job.train), show, watch)
    for line in training_lines(model, job.model.model, job.train, run.steps, run.every if len(data.held_out) else None):
        show.line(line)
    stop = stops(base, tokenizer, job.data.template)
    ask = partial(answers, model, data.held_out, tokenizer, stop, job.watch.samples, job.watch.sample_tokens)
    notes = run.train(resuming, planned, ask)
    measured_peak = meter.peak()
    show.line(compared(planned, measured_peak))
    told = about(job, model, folder)
    time = None  # of a resumed run, whose measured seconds are other processes' too
    if not resuming:
        time = {"planned_seconds": planned.seconds_of(told["tokens"]), "measured_seconds": told["training_seconds"]}
        show.line(pace_line(*time.values()))
    with watch("card"):
        card = measured(Asked(model, tokenizer, stop), data, job, run.base_scores, run.last_scores)
    with watch("explanation"):
        write_explanation(model, folder, base, data.held_out, job.train.portion, show.line)
    told |= {"held_out_fingerprint": data.held_out.fingerprint, "seconds": watch.seconds}
    memory = {"planned": planned.as_json(), "measured_bytes": measured_peak}
    more = {"memory": memory, "time": time, "ledger_notes": notes}
    write_json(folder / "card.json", told | more | card.as_json())
    with watch("page"):
        write_page(folder, show.line)
    show.line(time_line(watch.seconds))
    return Result(folder, card)


__all__ = [
    "CHANGEABLE",
    "SECTIONS",
    "Job",
    "Opened",
    "Result",
    "Show",
    "Silent",
    "card_of",
    "fine_tune",
    "open_run",
    "resume",
]
