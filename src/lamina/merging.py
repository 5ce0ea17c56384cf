"""The adapter added to the weights it was trained on, tensor by tensor, and proof of what that did.

W + s·B·A is computed in fp32 and rounded to the dtype W is stored in. A weak update can vanish in that rounding, so the
share that survived is measured in every matrix; and the merged folder is loaded again and compared, on held-out rows, with
the base and adapter it was made from.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.adapter_files import read_config, read_weights
from lamina.data.pack import Batch, pack
from lamina.data.render import Rendered
from lamina.errors import CheckpointError
from lamina.job import read_job
from lamina.model.decoder import Decoder
from lamina.model.merged import write_merged
from lamina.model.weights import load_model
from lamina.opened import Opened, adapter_folder, held_out_of, open_run
from lamina.ops.attention import Packed
from lamina.ops.loss import IGNORED
from lamina.report.record import write_json

COMPARED = 256
"""Answer tokens whose whole distributions are compared; at V = 32,000 they take 33 MB."""


@dataclass(frozen=True)
class Matrix:
    """What merging did to one matrix."""

    name: str
    relative: float
    """‖ΔW‖/‖W‖, Frobenius norms of the update and of the base."""
    survived: float
    """Share of the update that is left after rounding: ⟨W' - W, ΔW⟩/‖ΔW‖²; 1 when nothing is lost, 0 when all is."""


@dataclass(frozen=True)
class Difference:
    """The merged model against base + adapter, on answer tokens of held-out rows."""

    tokens: int
    largest_logit_difference: float
    kl: float
    """Mean KL(base + adapter ‖ merged) in nats per token."""
    agreement: float
    """Share of tokens where both find the same token most likely."""


@dataclass(frozen=True)
class MergeRecord:
    """What was written and what was proved; also in ``lamina_merge.json`` beside the weights."""

    folder: Path
    adapter: str
    matrices: tuple[Matrix, ...]
    difference: Difference | None

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
        if self.difference is not None:
            d = self.difference
            said.append(
                f"merged against base + adapter on {d.tokens} held-out answer tokens: largest logit difference "
                f"{d.largest_logit_difference:.2e}, KL {d.kl:.2e} nats per token, same most likely token {d.agreement:.1%}"
            )
        return said

    def as_json(self) -> dict[str, Any]:
        """The record for machines."""
        difference = None if self.difference is None else asdict(self.difference)
        matrices = [asdict(matrix) for matrix in self.matrices]
        return {"adapter": self.adapter, "survived": self.survived, "difference": difference, "matrices": matrices}


def merge(run: Path, out: Path, best: bool = False, changes: dict[str, Any] | None = None) -> MergeRecord:
    """Writes the base of a run with its adapter added, and compares the result with what it was made from.

    Args:
        out: a new or empty folder; loads in transformers and here as a plain model.
        best: the adapter of the best evaluation instead of the last.
        changes: other values for the run's settings of the model, such as its device.

    Raises:
        CheckpointError: no such run or adapter, or ``out`` is not empty or cannot be written.
    """
    read_job(run)
    adapter = adapter_folder(run, best)
    opened = open_run(run, best, changes)
    batches = _batches(opened)
    expected = [_logits(opened.model, batch) for batch in batches]
    base, dtype, device = opened.base, opened.model.vocabulary.dtype, opened.model.vocabulary.device
    if out.resolve().is_relative_to(base.resolve()):
        raise CheckpointError(f"{out}: lies in the base's own folder, expected another place as --out")
    del opened

    matrices: list[Matrix] = []
    merged = write_merged(base, out, _add(adapter, matrices))
    difference = None
    if batches:
        model = load_model(merged.folder, dtype, device)
        difference = _compare(expected, [_logits(model, batch) for batch in batches])
    record = MergeRecord(merged.folder, str(adapter), tuple(matrices), difference)
    write_json(merged.folder / "lamina_merge.json", record.as_json())
    return record


def _add(folder: Path, matrices: list[Matrix]) -> Callable[[str, Tensor], Tensor]:
    """The update of a stored tensor: its own value plus s·B·A where the adapter has one; notes what that did."""
    tensors, _ = read_weights(folder)
    lora = read_config(folder)

    def update(name: str, stored: Tensor) -> Tensor:
        path = name.removesuffix(".weight")
        a = tensors.get(f"base_model.model.{path}.lora_A.weight")
        b = tensors.get(f"base_model.model.{path}.lora_B.weight")
        if a is None or b is None:
            return stored
        delta = (b.float() @ a.float()).mul_(lora.scale_of(path))
        wide = stored.float()
        norm, size = float(torch.linalg.vector_norm(delta)), float(torch.linalg.vector_norm(wide))
        summed = (wide + delta).to(stored.dtype)
        moved = torch.sub(summed.float(), wide, out=wide)
        survived = float((moved * delta).sum()) / norm**2 if norm else 1.0
        matrices.append(Matrix(path, norm / size if size else float("inf"), survived))
        return summed

    return update


def _batches(opened: Opened) -> list[Batch]:
    """Held-out rows, up to ``COMPARED`` answer tokens: short ones first, so that many rows count."""
    rows: list[Rendered] = sorted(held_out_of(opened).held_out, key=lambda row: len(row.tokens))
    chosen: list[Rendered] = []
    tokens = 0
    for row in rows:
        tokens += int(row.trained.sum())
        if chosen and tokens > COMPARED:
            break
        chosen.append(row)
    return pack(chosen, 4096) if chosen else []


@torch.no_grad()
def _logits(model: Decoder, batch: Batch) -> Tensor:
    """Logits [S, V] of the supervised tokens, fp32, on the CPU; at most ``COMPARED`` of them."""
    device = model.vocabulary.device
    hidden = model(batch.tokens.to(device), batch.position.to(device), Packed(batch.lengths))
    rows = (batch.targets != IGNORED).nonzero().squeeze(1)[:COMPARED]
    return F.linear(hidden[rows.to(device)], model.vocabulary).float().cpu()


def _compare(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
    before, after = torch.cat(list(expected)), torch.cat(list(found))
    kl = F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="none").sum(1)
    return Difference(
        tokens=len(before),
        largest_logit_difference=float((after - before).abs().max()),
        kl=float(kl.mean()),
        agreement=float((before.argmax(1) == after.argmax(1)).float().mean()),
    )
