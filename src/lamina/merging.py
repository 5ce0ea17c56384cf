"""The adapter added to the weights it was trained on, tensor by tensor, and proof of what that did.

W + s·B·A is computed in fp32 and rounded to the dtype W is stored in. A weak update can vanish in that rounding, so the
share that survived is measured in every matrix; and the merged folder is read again and compared, on held-out rows, with
the base and adapter it was made from.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.adapter import AdaptedLinear, adapted
from lamina.adapter_files import outline_adapter
from lamina.data.pack import Batch, pack
from lamina.data.render import Rendered
from lamina.errors import CheckpointError, DataError
from lamina.job import base_folder, read_job
from lamina.model.fingerprint import stored_fingerprint
from lamina.model.merged import free_place, write_merged
from lamina.model.tokenizer import load_tokenizer
from lamina.model.weights import DTYPES, outline, pick_device
from lamina.opened import Opened, adapter_folder, held_out_of
from lamina.ops.loss import IGNORED
from lamina.report.record import write_json
from lamina.understand.difference import Difference, compare
from lamina.understand.streamed import streamed_logits, weights_of

COMPARED = 256
"""Answer tokens whose whole distributions are compared; at V = 32,000 they take 33 MB."""

_SLICE = 1 << 20  # numbers of a matrix that are in fp32 at one time


@dataclass(frozen=True)
class Matrix:
    """What merging did to one matrix."""

    name: str
    relative: float
    """‖ΔW‖/‖W‖, Frobenius norms of the update and of the base."""
    survived: float
    """Share of the update that is left after rounding: ⟨W' - W, ΔW⟩/‖ΔW‖²; 1 when nothing is lost, 0 when all is."""


@dataclass(frozen=True)
class MergeRecord:
    """What was written and what was proved; also in ``lamina_merge.json`` beside the weights."""

    folder: Path
    adapter: str
    matrices: tuple[Matrix, ...]
    difference: Difference | None
    not_compared: str = ""
    """Why there is no difference."""

    @property
    def survived(self) -> float:
        """Mean over the matrices of the share of the update that survived rounding."""
        return sum(matrix.survived for matrix in self.matrices) / len(self.matrices)

    def lines(self) -> list[str]:
        """The record in sentences."""
        largest = max(self.matrices, key=lambda matrix: matrix.relative)
        weakest = min(self.matrices, key=lambda matrix: matrix.survived)
        said = [
            f"merged {self.adapter} into {len(self.matrices)} matrices: {self.folder}",
            f"largest update: {100 * largest.relative:.3g} % of the norm of {largest.name}",
            f"share of the update that survived rounding: {self.survived:.1%} on average, {weakest.survived:.1%} in {weakest.name}",
        ]
        if self.difference is None:
            return [*said, f"not compared: {self.not_compared}"]
        return said + self.difference.lines()

    def as_json(self) -> dict[str, Any]:
        """The record for machines."""
        return {
            "adapter": self.adapter,
            "survived": self.survived,
            "difference": None if self.difference is None else self.difference.as_json(),
            "not_compared": self.not_compared or None,
            "matrices": [asdict(matrix) for matrix in self.matrices],
        }


def merge(run: Path, out: Path, best: bool = False, changes: dict[str, Any] | None = None) -> MergeRecord:
    """Writes the base of a run with its adapter added, and compares the result with what it was made from.

    Neither model is ever in memory: tensors are added one by one, and the comparison holds a layer at a time. Where the
    run's data cannot be read any more or has changed, the merged model is written all the same, and the record says that it was not
    compared.

    Args:
        out: a new or empty folder; loads in transformers and here as a plain model.
        best: the adapter of the best evaluation instead of the last.
        changes: other values for the run's settings of the model, such as the device of the comparison.

    Raises:
        CheckpointError: no such run or adapter, or ``out`` is not empty or cannot be written.
        ModelError, AdapterError: base or adapter cannot be read, or do not belong together.
    """
    job = read_job(run)
    job = replace(job, model=replace(job.model, **(changes or {})))
    folder, base = adapter_folder(run, best), base_folder(job.model)
    out = free_place(out)
    if out.resolve().is_relative_to(base.resolve()):
        raise CheckpointError(f"{out}: lies in the base's own folder, expected another place as --out")
    dtype, device = DTYPES[job.model.dtype], pick_device(job.model.device)
    model, stored = outline(base, dtype)
    adapter = outline_adapter(model, folder, stored_fingerprint(model.architecture, stored))
    batches, why_not = _batches(Opened(str(run), model, load_tokenizer(base), set(), base, job, run))

    matrices: list[Matrix] = []
    merged = write_merged(base, out, _add(adapted(model), adapter, matrices)).folder
    difference = None
    if batches:
        rows = [(batch.targets != IGNORED).nonzero().squeeze(1)[:COMPARED] for batch in batches]
        before = streamed_logits(model, weights_of(stored, adapter), batches, rows, device)
        model, stored = outline(merged, dtype)
        after = streamed_logits(model, weights_of(stored, {}), batches, rows, device)
        targets = [batch.targets[chosen] for batch, chosen in zip(batches, rows, strict=True)]
        difference = compare(torch.cat(before), torch.cat(after), torch.cat(targets))
    record = MergeRecord(merged, str(folder), tuple(matrices), difference, why_not)
    write_json(merged / "lamina_merge.json", record.as_json())
    return record


def _add(
    modules: Mapping[str, AdaptedLinear], adapter: Mapping[str, Tensor], matrices: list[Matrix]
) -> Callable[[str, Tensor], Tensor]:
    """The update of a stored tensor: its own value plus s·B·A where the adapter has one; notes what that did."""

    def update(name: str, stored: Tensor) -> Tensor:
        path = name.removesuffix(".weight")
        if path not in modules or path == name:
            return stored
        a, b = adapter[f"{path}.a"].float(), adapter[f"{path}.b"].float()
        size, norm, kept = 0.0, 0.0, 0.0  # ‖W‖², ‖ΔW‖², ⟨W' - W, ΔW⟩
        for rows in torch.arange(len(stored)).split(max(1, _SLICE // stored.shape[1])):
            part = stored[rows[0] : rows[-1] + 1]
            delta = (b[rows] @ a).mul_(modules[path].scale)
            wide = part.to(torch.float32, copy=True)
            part.copy_(wide + delta)  # rounded to the stored dtype
            size += float(torch.linalg.vector_norm(wide)) ** 2
            norm += float(torch.linalg.vector_norm(delta)) ** 2
            kept += float((part.float() - wide).mul_(delta).sum())
        relative = (norm / size) ** 0.5 if size else float("inf")
        matrices.append(Matrix(path, relative, kept / norm if norm else 1.0))
        return stored

    return update


def _batches(run: Opened) -> tuple[list[Batch], str]:
    """Held-out rows, up to ``COMPARED`` answer tokens: short ones first, so that many rows count; or why there are none."""
    try:
        held_out = held_out_of(run).held_out
    except (DataError, CheckpointError) as error:  # they cannot be read any more, or are others than in training
        return [], str(error)
    chosen: list[Rendered] = []
    tokens = 0
    for index in np.argsort(held_out.lengths, kind="stable").tolist():
        row = held_out[index]
        tokens += int(row.trained.sum())
        if chosen and tokens > COMPARED:
            break
        chosen.append(row)
    return pack(chosen, 4096), "" if chosen else "the run held out no rows"
