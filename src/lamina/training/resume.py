"""Resume is the same run: everything that decides the next step, in one file, written whole or not at all.

``state/state.safetensors`` holds the fp32 masters of A and B, AdamW's moments, and in its header the step, the best
evaluation and what the run was computed from. Data order and dropout are functions of (seed, step), so there is no
generator to save. The file is written under a temporary name, flushed to the disk and renamed: whenever the process is
killed, the file there is a complete one.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lamina.adapter import adapted
from lamina.adapter_files import write_tensors
from lamina.errors import CheckpointError
from lamina.model.decoder import Decoder
from lamina.training.loop import State
from lamina.training.optimizer import moments, remember

VERSION = 2
"""Of the run folder's layout."""


@dataclass(frozen=True)
class Progress:
    """What the caller's loop must know to go on: the best evaluation so far, and how many have passed since."""

    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent on each part of the run up to this state."""

    def after(self, step: int, loss: float) -> "Progress":
        """The progress after one more evaluation; of equal ones the first is the best."""
        if self.best_loss is None or loss < self.best_loss:
            return replace(self, best_loss=loss, best_step=step, evaluations_since_best=0)
        return replace(self, evaluations_since_best=self.evaluations_since_best + 1)

    def out_of(self, patience: int | None) -> bool:
        """Whether so many evaluations have passed without a better one."""
        return patience is not None and self.evaluations_since_best >= patience


@torch.no_grad()
def save_state(run: Path, model: Decoder, state: State, progress: Progress, origin: Mapping[str, str]) -> None:
    """Writes the state of a run atomically.

    Args:
        origin: what the run is computed from, as fingerprints by name: ``training rows``, ``base model``, …
    """
    folder = run / "state"
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _tensors(model, state).items()}
    header = {"version": VERSION, "step": state.step, "origin": dict(origin), "progress": asdict(progress)}
    write_tensors(folder / "state.safetensors", tensors, {"lamina": json.dumps(header)})


@torch.no_grad()
def load_state(run: Path, model: Decoder, state: State, origin: Mapping[str, str]) -> Progress:
    """Puts the saved state of a run into the adapter of ``model`` and into ``state``.

    Raises:
        CheckpointError: no state, a damaged one, one of a newer version, or one of other data, another base or adapter.
    """
    path = run / "state" / "state.safetensors"
    header = read_header(run)
    check_origin(run, header, origin)
    state.step = header["step"]
    if state.step:
        remember(state.optimizer, state.step)
    tensors = _tensors(model, state)
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        misfits = [name for name, tensor in tensors.items() if shapes.get(name) != tensor.shape]
        misfits += sorted(shapes.keys() - tensors.keys())
        if misfits:
            raise CheckpointError(
                f"{run}: the saved adapter is another than the job's: {len(misfits)} tensors differ in name or shape, the "
                f"first {misfits[0]}; bring back the settings under [adapter], or start a new run"
            )
        for name, tensor in tensors.items():
            tensor.copy_(file.get_tensor(name))
    return Progress(**header["progress"])


def check_origin(run: Path, header: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    """Passes when everything named in ``origin`` is what the run was computed from.

    Raises:
        CheckpointError: names all that is not.
    """
    others = [name for name, found in origin.items() if header["origin"].get(name) != found]
    if others:
        raise CheckpointError(
            f"{run}: the {' and the '.join(others)} are not those this run was trained with; bring them back as they were, "
            f"or start a new run"
        )


def has_state(run: Path) -> bool:
    """Whether a run has come as far as its first saved state."""
    return (run / "state" / "state.safetensors").is_file()


def read_header(run: Path) -> dict[str, Any]:
    """What the state's header says: version, step, fingerprints, progress.

    Raises:
        CheckpointError: no state, a damaged one, or one of a newer version.
    """
    path = run / "state" / "state.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{run}: found no saved state to resume from (expected {path})")
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("lamina")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error}); start a new run, or from adapter/ by hand") from None
    if written is None:
        raise CheckpointError(f"{path}: not written by Lamina; start a new run, or from adapter/ by hand")
    header: dict[str, Any] = json.loads(written)
    if header["version"] < VERSION:
        raise CheckpointError(
            f"{path}: written by an older version of Lamina (layout {header['version']}, this one reads {VERSION}), whose steps this "
            f"one does not repeat bit for bit; start a new run, or go on with that version"
        )
    if header["version"] > VERSION:
        raise CheckpointError(
            f"{path}: written by a newer version of Lamina (layout {header['version']}, this one reads {VERSION})"
        )
    return header


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds a run folder for this process; the system lets go of it however the process ends.

    Raises:
        CheckpointError: another process holds it.
    """
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{run}: another process is training in this folder; wait for it, or choose another --out"
            ) from None
        yield


def _tensors(model: Decoder, state: State) -> dict[str, Tensor]:
    """All tensors of the state by name; the moments are there once a step is done."""
    tensors: dict[str, Tensor] = {}
    for path, module in adapted(model).items():
        for factor, parameter in (("a", module.a), ("b", module.b)):
            tensors[f"{path}.{factor}"] = parameter.detach()
            if state.step:
                found = moments(state.optimizer, parameter)
                tensors |= {f"{path}.{factor}.{name}": moment for name, moment in found.items()}
    return tensors
