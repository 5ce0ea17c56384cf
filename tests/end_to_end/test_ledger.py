"""A run's ledger and its sample answers: what lies in the folder, that neither touches the training, and that both survive a kill."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from tiny import write_tiny
from tokens import pieces

from lamina.adapter import LoRA
from lamina.data.examples import DataSettings
from lamina.errors import CheckpointError
from lamina.evaluation import Evaluating
from lamina.job import Job, Watching
from lamina.jobfile import Head
from lamina.model.weights import ModelSettings
from lamina.report.ledger import History, LedgerFile, read_ledger
from lamina.report.record import read_metrics, read_samples
from lamina.run import Silent, fine_tune, resume
from lamina.training.loop import Step, Training
from lamina.understand.ledger import COLUMNS, Place, Row

pytestmark = pytest.mark.usefixtures("no_page", "untimed")

STEPS, MATRICES = 6, 14


class Heard(Silent):
    """Keeps what a run says, and breaks it off at a step; ``test_resume`` kills the process."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.lines: list[str] = []
        self.killed_at = killed_at

    def line(self, text: str) -> None:
        self.lines.append(text)

    def step(self, step: Step) -> None:
        if step.step == self.killed_at:
            raise RuntimeError("killed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    tokenizer = pieces()
    size = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # whole blocks of four bits
    write_tiny(folder / "base", vocab_size=len(tokenizer), **size)
    tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": f"the cat {n}", "completion": "sat on a mat " * (n % 4 + 1)} for n in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def job(place: Path, out: Path, **sections: Any) -> Job:
    """A job of six steps; keyword arguments replace whole sections."""
    return Job(
        **{
            "head": Head(out=str(out)),
            "model": ModelSettings(model=str(place / "base"), dtype="fp32", device="cpu"),
            "data": DataSettings(data=str(place / "rows.jsonl"), eval_fraction=0.25),
            "adapter": LoRA(rank=2, dropout=0.1),
            "train": Training(steps=STEPS, batch_size=3, learning_rate=1e-2),
            "watch": Watching(eval_every=1, save_every=2, sample_tokens=5),
            "evaluate": Evaluating(eval_samples=0, neutral=None),
            **sections,
        }
    )


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="module")
def whole(place: Path, heard: Heard) -> Path:
    """The run that nothing interrupts."""
    return fine_tune(job(place, place / "whole"), heard).folder


def ledger_of(run: Path) -> History:
    found = read_ledger(run)
    assert found is not None
    return found


def assert_same_adapter(one: Path, other: Path) -> None:
    found, expected = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    losses = [[record["loss"] for record in read_metrics(run) if "loss" in record] for run in (one, other)]
    assert losses[0] == losses[1]


def test_the_ledger_is_a_parquet_file_of_a_row_for_every_step_and_matrix(whole: Path) -> None:
    table = pyarrow.parquet.read_table(whole / "ledger.parquet")
    kinds = {name: pyarrow.float32() for name in COLUMNS}
    names = pyarrow.dictionary(pyarrow.int16(), pyarrow.string())
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == {
        "step": pyarrow.int32(),
        "layer": pyarrow.int16(),
        "module": names,
        **kinds,
    }
    rows = table.to_pylist()
    assert len(rows) == STEPS * MATRICES
    assert {row["step"] for row in rows} == set(range(1, STEPS + 1))
    assert {(row["layer"], row["module"]) for row in rows[:MATRICES]} == {
        (layer, f"{part}_proj")
        for layer in (0, 1)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert all(row[name] > 0 for row in rows for name in COLUMNS)
    # The last row is of the adapter as it is saved: a norm of 2·64 squares or more, in fp32.
    saved = load_file(whole / "adapter" / "adapter_model.safetensors")
    b = saved["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].double().norm()
    assert rows[-1]["b_norm"] == pytest.approx(float(b), rel=130 * 2**-24)


def test_the_gradients_of_a_step_add_up_to_the_one_in_the_metrics(whole: Path) -> None:
    norms = [record["grad_norm"] for record in read_metrics(whole) if "loss" in record]
    found = np.linalg.norm(ledger_of(whole)["grad_norm"].astype(np.float64), axis=1)
    assert found == pytest.approx(norms, rel=1e-5)  # 28 squares of norms of up to 256 numbers, in fp32


def test_curves_by_module_and_layer_are_in_tensorboard(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("ledger")]
    assert len(tags) == 3 * 7 + 2
    curve = events.Scalars("ledger_relative/mlp.up_proj")
    assert [event.step for event in curve] == list(range(1, STEPS + 1))
    assert curve[-1].value > curve[0].value


def test_the_same_prompts_are_answered_at_every_evaluation(whole: Path, heard: Heard) -> None:
    samples = read_samples(whole)
    assert [(sample["step"]) for sample in samples] == [step for step in range(STEPS + 1) for _ in range(2)]
    first = {(sample["row"], sample["prompt"], sample["reference"]) for sample in samples if sample["step"] == 0}
    assert len(first) == 2
    assert {(sample["row"], sample["prompt"], sample["reference"]) for sample in samples} == first
    assert list(samples[0]) == ["step", "row", "prompt", "reference", "answer", "stopped"]
    shown = [line for line in heard.lines if line.startswith(f"  held-out row {samples[0]['row']}: “")]
    assert len(shown) == STEPS + 1
    assert all("\n" not in line and len(line) < 200 for line in shown)


def test_neither_touches_the_training(place: Path, whole: Path, tmp_path: Path) -> None:
    watch = Watching(eval_every=1, save_every=2, ledger_every=0, samples=0)
    run = fine_tune(job(place, tmp_path / "run", watch=watch)).folder
    assert_same_adapter(run, whole)
    assert not (run / "ledger.parquet").exists()
    assert read_samples(run) == []
    assert read_ledger(run) is None
    assert json.loads((run / "card.json").read_text())["ledger_notes"] == []


def test_an_entry_every_third_step(place: Path, whole: Path, tmp_path: Path) -> None:
    watch = Watching(save_every=2, ledger_every=3, samples=0)
    run = fine_tune(job(place, tmp_path / "run", watch=watch)).folder
    found, every = ledger_of(run), ledger_of(whole)
    assert found.steps.tolist() == [3, 6]
    assert np.array_equal(found.values, every.values[[2, 5]])


def test_nothing_held_out_asks_nothing(place: Path, tmp_path: Path) -> None:
    data = DataSettings(data=str(place / "rows.jsonl"), eval_fraction=0.0)
    run = fine_tune(job(place, tmp_path / "run", data=data)).folder
    assert read_samples(run) == []
    assert len(ledger_of(run).steps) == STEPS


def test_rows_without_a_prompt_ask_nothing(place: Path, tmp_path: Path) -> None:
    data = DataSettings(data=str(place / "rows.jsonl"), eval_fraction=0.25, train_on="everything")
    run = fine_tune(job(place, tmp_path / "run", data=data)).folder
    assert read_samples(run) == []
    assert json.loads((run / "card.json").read_text())["counted"] == "tokens"


@pytest.mark.parametrize("killed_at", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 5))])
def test_a_run_that_broke_off_goes_on_to_the_same_ledger(
    killed_at: int, place: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed"):
        fine_tune(job(place, run), Heard(killed_at))
    assert ledger_of(run).steps.tolist() == list(range(1, killed_at + 1))  # also what led to the error
    resume(run)
    assert_same_adapter(run, whole)
    assert_same_record(run, whole)


class Interrupting(Heard):
    """A user who loses patience."""

    def step(self, step: Step) -> None:
        if step.step == self.killed_at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), STEPS])
def test_an_interrupt_counts_after_every_step_the_last_too(step: int, place: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=f"interrupted after step {step} of {STEPS}; everything is saved"):
        fine_tune(job(place, run), Interrupting(step))
    resume(run)
    assert_same_adapter(run, whole)
    assert_same_record(run, whole)


def test_what_was_written_after_the_saved_state_is_cut_away(place: Path, whole: Path, tmp_path: Path) -> None:
    """A kill between writing the ledger and writing the state leaves a ledger that is ahead."""
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed"):
        fine_tune(job(place, run), Heard(killed_at=3))
    shutil.copyfile(whole / "ledger.parquet", run / "ledger.parquet")
    (run / "ledger.parquet.partial").write_bytes(b"half a ledger")
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "row"')
    resume(run)
    assert_same_record(run, whole)


def assert_same_record(run: Path, whole: Path) -> None:
    found, expected = ledger_of(run), ledger_of(whole)
    assert found.places == expected.places
    assert np.array_equal(found.steps, expected.steps)
    assert np.array_equal(found.values, expected.values)
    assert read_samples(run) == read_samples(whole)
    notes = [json.loads((folder / "card.json").read_text())["ledger_notes"] for folder in (run, whole)]
    assert notes[0] == notes[1]


@pytest.mark.slow
def test_a_run_that_never_kept_a_ledger_begins_one_where_it_goes_on(place: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed"):
        fine_tune(job(place, run), Heard(killed_at=3))
    (run / "ledger.parquet").unlink()
    (run / "samples.jsonl").unlink()
    resume(run)
    assert ledger_of(run).steps.tolist() == [3, 4, 5, 6]
    assert np.array_equal(ledger_of(run).values, ledger_of(whole).values[2:])


@pytest.mark.slow
def test_notes_are_said_once_and_kept_in_the_card_over_a_kill(place: Path, tmp_path: Path) -> None:
    """Every step is clipped; the note of it comes at step 50, before the kill, and is still known at the end."""
    training = Training(steps=66, batch_size=2, clip=1e-6)
    watch = Watching(eval_every=60, save_every=60, samples=0)
    lines: list[str] = []
    for run, killed_at in ((tmp_path / "whole", None), (tmp_path / "run", 63)):
        heard = Heard(killed_at)
        if killed_at is None:
            fine_tune(job(place, run, train=training, watch=watch), heard)
        else:
            with pytest.raises(RuntimeError, match="killed"):
                fine_tune(job(place, run, train=training, watch=watch), heard)
            heard.killed_at = None
            resume(run, show=heard)
        lines += [line for line in heard.lines if "the gradient was clipped in 50 of the last 50 steps" in line]
        notes = json.loads((run / "card.json").read_text())["ledger_notes"]
        assert [note for note in notes if "was clipped" in note] == lines[-1:]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith("note, step 50: ")


@pytest.mark.parametrize("base", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_over_a_quantised_base_the_update_is_compared_with_the_value_it_computes_with(
    base: Any, place: Path, whole: Path, tmp_path: Path
) -> None:
    model = ModelSettings(model=str(place / "base"), dtype="fp32", device="cpu", base=base)
    found, dense = ledger_of(fine_tune(job(place, tmp_path / "run", model=model)).folder), ledger_of(whole)
    weight, expected = found["update_norm"] / found["relative"], dense["update_norm"] / dense["relative"]
    assert weight == pytest.approx(weight[:1].repeat(STEPS, 0), rel=1e-6)  # the weight is frozen
    assert weight == pytest.approx(expected, rel=0.02)  # four bits keep the norm to a hundredth or so
    assert not np.array_equal(weight, expected)


def test_a_ledger_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    where = (Place(0, "self_attn.q_proj"), Place(11, "mlp.up_proj"), Place(11, "self_attn.q_proj"))
    values = [np.random.default_rng(n).normal(size=(len(COLUMNS), 3)).astype(np.float32) for n in range(4)]
    file = LedgerFile(tmp_path, where, [])
    file.save()
    assert read_ledger(tmp_path) is None  # of nothing there is no file
    for number, some in enumerate(values, 1):
        file.add(Row(10 * number, some))
    file.save()
    found = ledger_of(tmp_path)
    assert (found.places, found.steps.tolist()) == (where, [10, 20, 30, 40])
    assert np.array_equal(found.values, np.stack(values))
    assert np.array_equal(found["ratio"], np.stack(values)[:, 5])
    assert [row.step for row in found.rows(until=25)] == [10, 20]

    path = tmp_path / "ledger.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        CheckpointError, match=r"ledger.parquet: cannot be read .*; take it away to go on with a ledger"
    ):
        read_ledger(tmp_path)
