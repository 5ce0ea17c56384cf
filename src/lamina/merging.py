"""The adapter added to its base, tensor by tensor, by one of three policies, and proof of what that did.

W + s·B·A is computed in fp32 and rounded to the form that is written. A weak update can vanish in that rounding, and a base
that was trained on in four bits is another one in sixteen, so what became of the update is measured in every matrix; and the
merged folder is read again and compared, on held-out rows, with the base and adapter it was made from.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina.adapter_files import outline_adapter
from lamina.data.pack import Batch, pack
from lamina.data.render import Rendered
from lamina.errors import CheckpointError, ConfigError, DataError
from lamina.job import base_folder, elsewhere, read_job
from lamina.model.fingerprint import stored_fingerprint
from lamina.model.merged import free_place, write_merged
from lamina.model.quantised import quantised_of
from lamina.model.tokenizer import load_tokenizer
from lamina.model.weights import DTYPES, outline, pick_device
from lamina.opened import Opened, adapter_folder, at_new_place, held_out_of
from lamina.ops.loss import IGNORED
from lamina.policies import Pieces, config_of
from lamina.report.record import write_json
from lamina.understand.difference import Difference, compare
from lamina.understand.proof import MergeRecord, Policy
from lamina.understand.streamed import streamed_logits

COMPARED = 256
"""Answer tokens whose whole distributions are compared; at V = 32,000 they take 33 MB."""


def merge(
    run: Path, out: Path, best: bool = False, changes: dict[str, Any] | None = None, policy: Policy | None = None
) -> MergeRecord:
    """Writes the base of a run with its adapter added, and compares the result with what it was made from.

    Neither model is ever in memory: tensors are added one by one, and the comparison holds a layer at a time. Where the
    run's data cannot be read any more or has changed, the merged model is written all the same, and the record says that it was not
    compared.

    Args:
        out: a new or empty folder; loads in transformers and here as a plain model.
        best: the adapter of the best evaluation instead of the last.
        changes: other values for the run's settings of the model, such as the device of the comparison, or where its base
            lies now (``model``).
        policy: to what the update is added (see ``policies``); if unset, to the weights that training saw.

    Raises:
        CheckpointError: no such run or adapter, or ``out`` is not empty or cannot be written.
        ConfigError: a policy that means nothing for this base, or a change of the base's form or precision.
        ModelError, AdapterError: base or adapter cannot be read, or do not belong together.
    """
    if other := (changes or {}).keys() - {"device", "model", "revision"}:
        raise ConfigError(
            f"found another {', '.join(sorted(other))} for a merge, expected those of the run: it is compared with what was trained"
        )
    job = read_job(run)
    job = replace(job, model=replace(job.model, **at_new_place(changes or {})))
    folder = adapter_folder(run, best)
    with elsewhere(run):
        base = base_folder(job.model)
    out = free_place(out)
    if out.resolve().is_relative_to(base.resolve()):
        raise CheckpointError(f"{out}: lies in the base's own folder, expected another place as --out")
    dtype = DTYPES[job.model.dtype]
    model, stored = outline(base, dtype, job.model.base, job.model.double_quant)
    adapter = outline_adapter(model, folder, stored_fingerprint(model.architecture, stored))
    pieces = Pieces(policy or ("dequantised" if quantised_of(model) else "original"), model, stored, adapter, dtype)
    batches, why_not = _batches(Opened(str(run), model, load_tokenizer(base), set(), base, job, run))

    merged = write_merged(base, out, list(pieces), config_of(pieces)).folder
    difference = _difference(pieces, merged, batches, pick_device(job.model.device)) if batches else None
    form = quantised_of(model)[0].form.kind if quantised_of(model) else job.model.dtype
    record = MergeRecord(merged, str(folder), pieces.policy, form, tuple(pieces.matrices), difference, why_not)
    write_json(merged / "lamina_merge.json", record.as_json())
    return record


def _difference(pieces: Pieces, merged: Path, batches: list[Batch], device: torch.device) -> Difference:
    """The merged folder against base and adapter, on the answer tokens of some rows."""
    rows = [(batch.targets != IGNORED).nonzero().squeeze(1)[:COMPARED] for batch in batches]
    before = streamed_logits(pieces.outline, pieces.stored, pieces.adapter, batches, rows, device)
    after = streamed_logits(*outline(merged, pieces.dtype), {}, batches, rows, device)
    targets = [batch.targets[chosen] for batch, chosen in zip(batches, rows, strict=True)]
    return compare(torch.cat(before), torch.cat(after), torch.cat(targets))


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
