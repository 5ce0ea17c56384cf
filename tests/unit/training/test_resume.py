"""Resume is the same run; whatever is not this run's state is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import examples, tiny
from safetensors.torch import load_file, save_file

from lamina.adapter import LoRA, adapted, attach
from lamina.errors import CheckpointError
from lamina.model.decoder import Decoder
from lamina.training.loop import State, Step, Training, start, train
from lamina.training.optimizer import Kind
from lamina.training.resume import VERSION, Progress, load_state, locked, read_header, save_state

TRAINING = Training(batch_size=4, epochs=2, learning_rate=1e-2, weight_decay=0.1, clip=0.5)
DATA = examples(18)
ORIGIN = {"training rows": "aa", "base model": "bb"}
PROGRESS = Progress(best_loss=1.25, best_step=3, evaluations_since_best=2)


def fresh(training: Training = TRAINING, **lora: Any) -> tuple[Decoder, State]:
    large = training.optimizer == "adamw8bit"  # bitsandbytes keeps tensors below 4,096 numbers in fp32
    model = tiny(hidden_size=128) if large else tiny()
    attach(model, LoRA(**{"rank": 32 if large else 4, "dropout": 0.3, **lora}), seed=5)
    return model, start(model, training)


def everything(model: Decoder, state: State) -> dict[str, torch.Tensor]:
    """Adapter, moments and AdamW's own step count."""
    found = {}
    for path, module in adapted(model).items():
        for factor in "ab":
            parameter = getattr(module, factor)
            found[f"{path}.{factor}"] = parameter.detach().clone()
            for name, moment in state.optimizer.state[parameter].items():
                found[f"{path}.{factor}.{name}"] = torch.as_tensor(moment).clone()
    return found


def state_file(run: Path) -> Path:
    return run / "state" / "state.safetensors"


def save(
    run: Path, steps: int = 2, progress: Progress = PROGRESS, training: Training = TRAINING
) -> tuple[Decoder, State]:
    model, state = fresh(training)
    going = train(model, DATA, training, state, seed=9)
    for _ in range(steps):
        next(going)
    save_state(run, model, state, progress, ORIGIN)
    return model, state


def rewrite(run: Path, **header: Any) -> None:
    """The same tensors under a changed header."""
    before = read_header(run)
    save_file(load_file(state_file(run)), state_file(run), {"lamina": json.dumps({**before, **header})})


def refusal(run: Path, origin: dict[str, str] | None = None, **lora: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_state(run, *fresh(**lora), {**ORIGIN, **(origin or {})})
    return str(error.value)


@cache
def uninterrupted(training: Training) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
    """What its steps say, and what is there at its end."""
    model, state = fresh(training)
    losses = [told(step) for step in train(model, DATA, training, state, seed=9)]
    return losses, everything(model, state)


def told(step: Step) -> tuple[float, ...]:
    return step.step, step.loss, step.grad_norm, step.learning_rate


@pytest.mark.parametrize(
    ("stop", "optimizer"),
    [
        *((stop, "adamw") for stop in (0, 1, 4, 8)),
        *((stop, "adamw8bit") for stop in (1, 4)),
        *(pytest.param(stop, "adamw8bit", marks=pytest.mark.slow) for stop in (0, 8)),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stop: int, optimizer: Kind, tmp_path: Path) -> None:
    """Nine steps, the last short and across the border of an epoch, with dropout, decay, clipping and a schedule."""
    training = replace(TRAINING, optimizer=optimizer)
    losses, expected = uninterrupted(training)
    assert len(losses) == 9

    save(tmp_path, stop, training=training)
    torch.manual_seed(123)  # another process has another generator
    again, later = fresh(training)
    assert load_state(tmp_path, again, later, ORIGIN) == PROGRESS
    assert later.step == stop
    resumed = [told(step) for step in train(again, DATA, training, later, seed=9)]
    assert resumed == losses[stop:]
    found = everything(again, later)
    assert expected.keys() == found.keys()
    second = {tensor.dtype for name, tensor in found.items() if name.endswith((".exp_avg_sq", ".state2"))}
    assert second >= {torch.uint8 if optimizer == "adamw8bit" else torch.float32}
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_state_is_saved_as_it_was(tmp_path: Path) -> None:
    model, state = save(tmp_path)
    again, later = fresh()
    load_state(tmp_path, again, later, ORIGIN)
    expected, found = everything(model, state), everything(again, later)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["state.safetensors"]
    assert read_header(tmp_path)["step"] == 2


def test_a_half_written_state_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    partial = tmp_path / "state" / "state.safetensors.partial"
    partial.write_bytes(b"half")
    assert refusal(tmp_path) == f"{tmp_path}: found no saved state to resume from (expected {state_file(tmp_path)})"
    save(tmp_path)
    partial.write_bytes(state_file(tmp_path).read_bytes()[:500])
    assert load_state(tmp_path, *fresh(), ORIGIN) == PROGRESS


def test_a_save_that_fails_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    before = state_file(tmp_path).read_bytes()

    def full(_: object, partial: Path, **__: object) -> None:
        partial.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lamina.adapter_files.save_file", full)
    with pytest.raises(
        CheckpointError, match="cannot be saved .*No space left on device.*what was saved there before is untouched"
    ):
        save(tmp_path, 3)
    assert state_file(tmp_path).read_bytes() == before
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("kept", [0, 7, 2000, -1])
def test_a_damaged_state(tmp_path: Path, kept: int) -> None:
    save(tmp_path)
    state_file(tmp_path).write_bytes(state_file(tmp_path).read_bytes()[:kept])
    text = refusal(tmp_path)
    assert text.startswith(f"{state_file(tmp_path)}: damaged (") and text.endswith(
        "start a new run, or from adapter/ by hand"
    )


def test_a_file_of_someone_else(tmp_path: Path) -> None:
    save(tmp_path)
    save_file(load_file(state_file(tmp_path)), state_file(tmp_path))
    assert (
        refusal(tmp_path) == f"{state_file(tmp_path)}: not written by Lamina; start a new run, or from adapter/ by hand"
    )


def test_an_older_version(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path, version=VERSION - 1)
    assert "written by an older version of Lamina (layout 1, this one reads 2)" in refusal(tmp_path)


def test_a_newer_version(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path, version=VERSION + 1)
    assert refusal(tmp_path) == (
        f"{state_file(tmp_path)}: written by a newer version of Lamina (layout {VERSION + 1}, this one reads {VERSION})"
    )


def test_other_data_or_another_base(tmp_path: Path) -> None:
    save(tmp_path)
    other = {"training rows": "xx", "base model": "yy"}
    assert refusal(tmp_path, other) == (
        f"{tmp_path}: the training rows and the base model are not those this run was trained with; "
        "bring them back as they were, or start a new run"
    )
    assert "the base model are not those" in refusal(tmp_path, {"base model": "yy"})


@pytest.mark.parametrize("lora", [{"rank": 1}, {"rank": 8}, {"targets": ("q_proj",)}, {"layers": "1"}])
def test_another_adapter(tmp_path: Path, lora: dict[str, Any]) -> None:
    save(tmp_path)
    text = refusal(tmp_path, **lora)
    assert text.startswith(f"{tmp_path}: the saved adapter is another than the job's: ")
    assert text.endswith("; bring back the settings under [adapter], or start a new run")


def test_progress() -> None:
    progress = Progress()
    assert not progress.out_of(None) and not progress.out_of(1)
    progress = progress.after(2, 1.5)
    assert progress == Progress(1.5, 2, 0)
    worse = progress.after(4, 1.5).after(6, 1.7)
    assert worse == replace(progress, evaluations_since_best=2)
    assert worse.out_of(2) and not worse.out_of(3) and not worse.out_of(None)
    assert worse.after(8, 1.4) == Progress(1.4, 8, 0)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError) as error, locked(tmp_path):
            pass
        assert str(error.value) == (
            f"{tmp_path}: another process is training in this folder; wait for it, or choose another --out"
        )
        other.kill()
    with locked(tmp_path), pytest.raises(CheckpointError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
