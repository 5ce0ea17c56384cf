"""What a LoRA adapter is: read from its files matrix by matrix, beside its base tensor by tensor, and judged on a run's rows."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lamina.adapter import adapted, adapter_scale
from lamina.errors import AdapterError, CheckpointError, ConfigError, DataError
from lamina.evaluation import evaluate
from lamina.job import base_folder, read_job
from lamina.model.architecture import read_config
from lamina.model.checkpoint import stored_tensors, summary
from lamina.model.fingerprint import stored_fingerprint
from lamina.model.storage import Matrix, form_stored, parts_of
from lamina.model.weights import ModelSettings, used_tensors
from lamina.opened import adapter_folder, held_out_of, open_run
from lamina.ops.frozen import SharedBuffer
from lamina.understand.alignment import relate
from lamina.understand.explanation import Explanation
from lamina.understand.factors import AdapterFile, Shrunk, open_adapter, save_truncated, truncate
from lamina.understand.updates import Ranks, Update, places, powers


def explain(
    name: str | Path,
    base: str | Path | None = None,
    best: bool = False,
    exact: bool = False,
    losses: bool = True,
    changes: Mapping[str, Any] | None = None,
) -> Explanation:
    """Explains the adapter of a run, or any LoRA adapter in PEFT's format.

    ΔW is never formed, and neither adapter nor base is ever in memory as a whole, unless losses are measured. Llama-2-7B with rank
    64 on all linears takes about a minute on two cores without its base.

    Args:
        name: folder of a run, whose base is its job's; or of an adapter, whose base need not be known.
        base: a model to compare with: folder, or id on the hub. Of any family: its matrices are found by their names. Stored
            in four or eight bits, it is compared as the numbers that these stand for.
        best: the run's adapter of the best evaluation instead of the last.
        exact: decompose every matrix of the base fully; otherwise those above ``alignment.DENSE`` are estimated.
        losses: of a run: measure the held-out loss of base, adapter, and adapter truncated to ranks 1, 2, 4, …
        changes: other values for the run's settings of the model, such as its device.

    Raises:
        AdapterError: no adapter there, a damaged one, one with features that are not computed, or of another base.
        ModelError: the base cannot be found or read, or is stored in a form that is not computed.
        ConfigError: ``best`` of what is no run.
        CheckpointError: a run that has not saved such an adapter.
    """
    name, changes = Path(name), dict(changes or {})
    run = (name / "job.toml").is_file()
    adapter = _open(name, best)
    if base is not None:
        changes |= {"model": str(base), "revision": None}
    settings = None
    if run:
        settings = replace(read_job(name).model, **changes)
    elif base is not None:
        settings = ModelSettings(model=str(base))
    folder = None if settings is None else base_folder(settings)
    weights = {} if folder is None else _weights(folder, adapter)
    updates = _updates(adapter, weights, exact)
    found = Explanation(str(adapter.folder), None if folder is None else str(folder), updates)
    if not run or not losses or found.nothing:
        return found
    ranks, why_not = _ranks(name, best, changes, adapter)
    return replace(found, ranks=ranks, not_measured=why_not)


def shrink(name: str | Path, rank: int, out: str | Path, best: bool = False) -> Shrunk:
    """Writes the adapter of a run, or any LoRA adapter, at a lower rank: every update's best approximation of that rank.

    Args:
        out: a new or empty folder; loads in PEFT and here as any adapter.

    Raises:
        AdapterError, CheckpointError: as ``explain``; or something is in ``out``.
        ConfigError: a rank above the adapter's, or none; ``best`` of what is no run.
    """
    return save_truncated(_open(Path(name), best), rank, Path(out))


def _open(name: Path, best: bool) -> AdapterFile:
    if not name.is_dir():
        raise AdapterError(f"{name}: no such folder, expected that of a run or of an adapter")
    if (name / "job.toml").is_file():
        return open_adapter(adapter_folder(name, best))
    if best:
        raise ConfigError(f"--best: {name} is not the folder of a run, so it has no best adapter; leave --best out")
    return open_adapter(name)


def _weights(folder: Path, adapter: AdapterFile) -> dict[str, Matrix]:
    """The adapted matrices of a base by the path of their module, as they are stored: as numbers, or quantised."""
    stored = stored_tensors(folder)
    form_stored(folder, stored)  # forms that are not computed are refused
    packed, scratch = parts_of(stored), SharedBuffer()
    found = {
        path: Matrix(path, stored[f"{path}.weight"], packed.get(path, {}), scratch)
        for path in adapter.shapes
        if f"{path}.weight" in stored
    }
    missing = [f"{path}.weight" for path in adapter.shapes if path not in found]
    problems = [f"missing {len(missing)}: {summary(missing)}"] if missing else []
    for path, matrix in found.items():
        tensor, shape = matrix.weight, adapter.shapes[path]
        if matrix.shape != shape:
            problems.append(f"{tensor.name} has shape {list(matrix.shape)}, the adapter's is {list(shape)}")
        elif not matrix.parts and (not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2):
            problems.append(f"{tensor.name} is stored as {tensor.code}, expected F64, F32, F16 or BF16")
    if problems:
        raise AdapterError(f"{folder}: this base does not fit the adapter {adapter.folder}: {'; '.join(problems)}")
    if adapter.base is not None:  # written by Lamina, so it computes the base
        architecture = read_config(folder)
        if (own := stored_fingerprint(architecture, used_tensors(folder, architecture))) != adapter.base:
            raise AdapterError(
                f"{adapter.folder}: this adapter was trained on another base (fingerprint {adapter.base[:12]}) than {folder} "
                f"({own[:12]}); name the base it was trained on as --base"
            )
    return found


def _updates(adapter: AdapterFile, weights: Mapping[str, Matrix], exact: bool) -> tuple[Update, ...]:
    where, updates = places(list(adapter.shapes)), []
    for factors in adapter.factors():
        path, spectrum, relation = factors.path, factors.spectrum(), None
        if path in weights:
            weight = weights[path].dense()
            if not weight.isfinite().all():
                raise AdapterError(f"{weights[path].weight.file}: {path}.weight holds non-finite numbers; check --base")
            relation = relate(weight, spectrum, exact)
        updates.append(
            Update(
                name=path,
                layer=where[path][0],
                module=where[path][1],
                shape=adapter.shapes[path],
                rank=len(factors.a),
                numerical_rank=spectrum.rank,
                scale=factors.scale,
                norm=spectrum.norm,
                effective_rank=spectrum.effective_rank,
                stable_rank=spectrum.stable_rank,
                singular_values=tuple(spectrum.values.tolist()),
                relation=relation,
            )
        )
    return tuple(updates)


def _ranks(name: Path, best: bool, changes: Mapping[str, Any], adapter: AdapterFile) -> tuple[Ranks | None, str]:
    """The losses on a run's held-out rows, or why there are none. Each rank is evaluated as its saved adapter would be."""
    opened = open_run(name, best=best, changes=changes)
    assert opened.job is not None, "it has a job.toml"
    try:
        held_out = held_out_of(opened).held_out
    except (DataError, CheckpointError) as error:  # they cannot be read any more, or are others than in training
        return None, str(error)
    if not len(held_out):
        return None, "the run held out no rows"
    model, budget = opened.model, opened.job.train.portion
    with adapter_scale(model, 0.0):
        base = evaluate(model, held_out, budget).loss
    full = evaluate(model, held_out, budget).loss
    modules, lower, losses = adapted(model), powers(adapter.rank), []
    kept = truncate(adapter, lower[-1]) if lower else {}
    for rank in lower:
        for path, (a, b) in kept.items():
            module = modules[path]
            device = module.a.device
            module.a, module.b = nn.Parameter(a[:rank].to(device)), nn.Parameter(b[:, :rank].contiguous().to(device))
            module.scale = 1.0
        losses.append((rank, evaluate(model, held_out, budget).loss))
    return Ranks(base, full, tuple(losses)), ""
