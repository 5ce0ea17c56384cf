"""The reference jobs again, faithful and mended, and each fault by itself: what it did, on one base and the same rows.

A variant is a job (``variants``), and runs through ``fine_tune`` in a folder of its own as any run does: it has a card, every command
can look at it, and it goes on after an interrupt. What the variants share is laid down once: the held-out rows, in the mended job's
form whatever a variant trains on, and the frozen base, which is loaded once and carries one fresh adapter after another.

Rejected: all variants in one batch, as sweeps that share a base do it. It would be faster, and another training loop, of which nobody
could say that it is the one whose faults are shown.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina import jobfile
from lamina.adapter import adapted, detach
from lamina.adapter_files import load_adapter
from lamina.data.prepare import Prepared
from lamina.errors import CheckpointError, ConfigError, DataError, Error, OutOfMemoryError, TrainingError, memory_told
from lamina.job import SECTIONS, Job, base_folder, check, new_folder, prepare_data, take_back
from lamina.merging import merge
from lamina.model.decoder import Decoder
from lamina.model.quantised import form_of
from lamina.model.tokenizer import load_tokenizer
from lamina.model.weights import pick_device
from lamina.opened import stops
from lamina.policies import Update, add
from lamina.report.record import read_metrics, write_json, write_text
from lamina.report.replay import UNFINISHED, Entry, as_json, page
from lamina.run import Show, Silent, fine_tune, resume
from lamina.training.available import available
from lamina.training.resume import locked
from lamina.understand.beside import Outcome, outcome
from lamina.variants import LETTERS, Variant, own_rows, variants

VERSION = 1
ROWS = 256
"""Held-out rows that every variant is measured on, the first of them, at most."""

_READABLE = 20  # steps below which a curve has no shape


@dataclass(frozen=True)
class Replayed:
    """A finished replay: its folder, and its rows, the untouched base first."""

    folder: Path
    entries: tuple[Entry, ...]


def replay(letter: str, mended: Job, faithful: Job, show: Show | None = None) -> Replayed:
    """Runs a reference job mended, faithful, and mended with each fault by itself, in a new folder.

    Args:
        letter: of the job, for the record.
        mended, faithful: as ``variants.pair`` makes them.

    Raises:
        Error: whatever of the job, its model or its data is wrong, or nothing is held out.
    """
    check(mended, base_folder(mended.model))
    given = mended.head.out is not None and Path(mended.head.out).exists()
    folder = new_folder(mended.head)
    try:
        mended, faithful = own_rows(mended, faithful, folder)
        for name, job in (("mended", mended), ("faithful", faithful)):
            write_text(folder / f"{name}.toml", jobfile.dump(job.sections()))
        write_json(folder / "replay.json", {"version": VERSION, "letter": letter, "entries": []})
    except (Error, OSError, KeyboardInterrupt):
        take_back(folder, given)  # nothing has begun in it
        raise
    return resume_replay(folder, show)


def resume_replay(folder: Path, show: Show | None = None) -> Replayed:
    """Goes on with a replay: finished variants are left as they are, the one that was interrupted goes on where it stood.

    Those that memory ended, or that were refused before their first step, are tried again.

    Raises:
        CheckpointError: there is no replay, a damaged one, one of a newer version, or one that another process goes on with.
    """
    _read(folder)  # that it is one, before anything is written into it
    with locked(folder):
        letter, entries = _read(folder)
        jobs = (jobfile.load(str(folder / f"{name}.toml"), SECTIONS) for name in ("mended", "faithful"))
        mended, faithful = map(Job.of, jobs)
        try:
            with memory_told("free some memory"):  # beside the runs, which say so themselves
                under_way = _Replay(folder, mended, letter, show or Silent())
                under_way.entries = [entry for entry in entries if not _again(entry, folder)]
                under_way.go(list(variants(letter, mended, faithful)))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; go on with: lamina replay --resume {folder}") from None
        except OutOfMemoryError:
            told = f"out of memory; free some memory, and go on with: lamina replay --resume {folder}"
            raise OutOfMemoryError(told) from None
    return Replayed(folder, tuple(under_way.entries))


def _again(entry: Entry, folder: Path) -> bool:
    """Whether a variant is tried again that did not finish: memory ended it, or it was refused before its first step."""
    return entry.unfinished and (entry.out_of_memory or not (folder / entry.name / "state").exists())


class _Replay:
    """A replay under way: what every variant shares."""

    def __init__(self, folder: Path, mended: Job, letter: str, show: Show) -> None:
        self.folder, self.mended, self.letter, self.show = folder, mended, letter, show
        self.entries: list[Entry] = []
        self.base = base_folder(mended.model)
        self.tokenizer = load_tokenizer(self.base)
        self.stop = stops(self.base, self.tokenizer, mended.data.template)
        self.data = prepare_data(mended, self.base, self.tokenizer)
        # What is free before the base is there: every variant's plan counts the base itself.
        free = round(available(pick_device(mended.model.device)) / 2**30, 2)
        self.memory_gib = mended.train.memory_gib or max(0.01, free)

    def go(self, every: list[Variant]) -> None:
        """Runs what is not finished, and writes the record after each."""
        done = {entry.name for entry in self.entries}
        self.show.line(
            f"replay of job {self.letter} on {self.mended.model.model}, in {self.folder}: {len(every)} variants"
        )
        model = self.mended.model.load(self.base)
        if "base" not in done:
            self.add(Entry("base", "untouched", self.measure(model, self.data)))
        for number, variant in enumerate(every, 1):
            if variant.name not in done:
                self.show.line(f"{number}/{len(every)} {variant.name}: {variant.what}")
                self.add(self.entry(variant, model))
        job = (self.folder / "mended.toml").read_text(encoding="utf-8")
        page(self.letter, self.facts(), self.entries, job).write(self.folder / "replay.html")

    def facts(self) -> list[tuple[str, str]]:
        """What the page says first."""
        return [
            ("base", self.mended.model.model),
            ("data", self.mended.data.data),
            ("steps", f"{self.mended.train.total_steps(len(self.data.train)):,}"),
            ("held-out rows", f"{min(ROWS, len(self.data.held_out)):,}"),
        ]

    def add(self, entry: Entry) -> None:
        """Writes the record with one more entry."""
        self.entries.append(entry)
        record = {"version": VERSION, "letter": self.letter, "entries": as_json(self.entries)}
        write_json(self.folder / "replay.json", record)

    def entry(self, variant: Variant, model: Decoder) -> Entry:
        """What a variant did. A run that must not go on is a finding, told in its own words."""
        try:
            if variant.kind == "told":
                return Entry(variant.name, variant.what, reason=variant.reason)
            if variant.kind == "merged":
                return Entry(variant.name, variant.what, facts=self.merged())
            with _detached(model):
                if variant.kind == "asked":
                    return self.asked(variant, model)
                return self.trained(variant, model)
        except (ConfigError, DataError, OutOfMemoryError, TrainingError) as error:
            if variant.name == "mended":
                raise
            return Entry(variant.name, variant.what, reason=f"{UNFINISHED}{error}")

    def trained(self, variant: Variant, model: Decoder) -> Entry:
        """Trains a variant, or goes on with it, and measures it."""
        assert variant.job is not None, "it is trained"
        folder = self.folder / variant.name
        if (folder / "job.toml").is_file():
            resume(folder, show=_Steps(self.show), loaded=model)
        else:
            if folder.exists():  # a process that was killed has made no more of it than the folder
                shutil.rmtree(folder)
            job = replace(
                variant.job,
                head=replace(variant.job.head, name=variant.name, out=str(folder)),
                train=replace(variant.job.train, memory_gib=self.memory_gib),
                evaluate=replace(variant.job.evaluate, eval_samples=0, neutral=None),  # asked below, on the common rows
            )
            fine_tune(job, _Steps(self.show), loaded=model)
        facts = _facts(read_metrics(folder)) | _survival(model)
        return Entry(variant.name, variant.what, self.measure(model, self.data), facts)

    def asked(self, variant: Variant, model: Decoder) -> Entry:
        """The mended job's adapter on held-out rows that are asked in another way."""
        assert variant.job is not None, "it says how they are asked"
        load_adapter(model, self.folder / "mended" / "adapter")
        data = prepare_data(variant.job, self.base, self.tokenizer)
        return Entry(variant.name, variant.what, self.measure(model, data))

    def merged(self) -> dict[str, float]:
        """The mended job's adapter merged into the stored weights, beside the merge into those that training saw."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="merged-") as place:
            other = merge(self.folder / "mended", Path(place) / "stored", policy="original").difference
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="merged-") as place:
            seen = merge(self.folder / "mended", Path(place) / "seen", policy="dequantised").difference
        assert other is not None and seen is not None, "there are held-out rows"
        return {
            "kl": other.kl,
            "kl_seen": seen.kl,
            "tokens": other.tokens,
            "loss_merged": other.loss_merged,
            "loss_trained": other.loss_adapter,
        }

    def measure(self, model: Decoder, data: Prepared) -> Outcome:
        """What a model does on the held-out rows."""
        rows = list(islice(data.held_out, ROWS))
        return outcome(model, rows, self.tokenizer, self.stop, self.mended.evaluate, self.mended.train.portion)


class _Steps:
    """Shows of a variant's run the steps only: what it says in words is in its folder, or the same for all."""

    def __init__(self, show: Show) -> None:
        self.start, self.step = show.start, show.step

    def line(self, text: str) -> None: ...
    def evaluation(self, step: int, loss: float) -> None: ...


@contextmanager
def _detached(model: Decoder) -> Iterator[None]:
    """Leaves the base untouched, whatever was laid on it and however the block ends."""
    try:
        yield
    finally:
        detach(model)


def _facts(records: list[dict[str, Any]]) -> dict[str, float]:
    """What the record of a run says of its training: how much it learnt from, and whether its loss can be read.

    ``waves`` is the correlation of the losses of neighbouring steps around their trend (a parabola, from the first quarter on): near
    zero where batches are drawn at random, for then only the trend connects them.
    """
    steps = [record for record in records if "loss" in record]
    loss = np.array([step["loss"] for step in steps[len(steps) // 4 :]])
    waves = 0.0
    if len(loss) > _READABLE:
        place = np.arange(len(loss))
        around = loss - np.polyval(np.polyfit(place, loss, 2), place)
        waves = float(np.corrcoef(around[1:], around[:-1])[0, 1])
    return {
        "steps": len(steps),
        "supervised_tokens": sum(step["supervised_tokens"] for step in steps),
        "waves": waves,
    }


def _survival(model: Decoder) -> dict[str, float]:
    """How large the update is against the weights that training saw, and which share of it is left when both are merged in bf16."""
    found = []
    with torch.no_grad():
        for path, module in adapted(model).items():
            seen = form_of(module.base).dense()
            found.append(add(path, seen.to(torch.bfloat16, copy=True), seen, Update(module.a, module.b, module.scale)))
    return {
        "survived": float(np.mean([matrix.survived for matrix in found])),
        "relative": float(np.median([matrix.relative for matrix in found])),
    }


def _read(folder: Path) -> tuple[str, list[Entry]]:
    """The letter of a replay, and its rows so far."""
    path = folder / "replay.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] > VERSION:
            raise CheckpointError(
                f"{path}: written by a newer version of Lamina (layout {record['version']}, this one reads {VERSION})"
            )
        LETTERS[record["letter"]]  # one that is known
        return record["letter"], [Entry.of_json(entry) for entry in record["entries"]]
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: found no replay.json, expected the folder of a replay") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); start a new replay") from None
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}), expected the record of a replay; start a new one") from None
