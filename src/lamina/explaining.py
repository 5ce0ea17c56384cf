"""What a LoRA adapter is: read from its files matrix by matrix, beside its base tensor by tensor, and judged on a run's rows.

``explain`` opens whatever it is given, and takes its time. ``explain_trained`` closes a run whose model is still in memory, and
is bounded: the held-out rows by a number of tokens, the comparison with the base by a number of weights. Both bounds
are counts and not clocks, so that the same run is always explained in the same way.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lamina.adapter import AdaptedLinear, adapted, adapter_scale
from lamina.data.render import Rendered
from lamina.data.store import TokenStore
from lamina.errors import AdapterError, CheckpointError, ConfigError, DataError
from lamina.evaluation import evaluate
from lamina.job import base_folder, elsewhere, read_job
from lamina.model.architecture import read_config
from lamina.model.checkpoint import stored_tensors, summary
from lamina.model.decoder import Decoder
from lamina.model.fingerprint import stored_fingerprint
from lamina.model.quantised import form_of
from lamina.model.storage import Matrix, form_stored, parts_of
from lamina.model.weights import ModelSettings, used_tensors
from lamina.opened import adapter_folder, held_out_of, open_run
from lamina.ops.frozen import SharedBuffer
from lamina.understand.alignment import relate
from lamina.understand.budget import some
from lamina.understand.explanation import Explanation
from lamina.understand.factors import AdapterFile, Shrunk, open_adapter, save_truncated
from lamina.understand.updates import Ranks, Update, places, powers

COMPARED = 2**22
"""Adapted weights up to which a run's report compares the update with its base: about two seconds of dense SVDs on one core."""

SHARE = 0.05
"""Tokens on which a run's report measures lower ranks, all of them together, as a share of the tokens of its training. A
forward pass costs about half of a training step, so this is a fortieth of the training's time."""


def explain(
    name: str | Path,
    base: str | Path | None = None,
    best: bool = False,
    exact: bool = False,
    losses: bool = True,
    changes: Mapping[str, Any] | None = None,
    tokens: int | None = None,
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
        tokens: of the held-out rows on which each of those losses is measured, at most so many, of rows drawn as those
            of the card's dose curve are; all rows if None.

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
    with elsewhere(name if run and base is None else None, "--base"):
        folder = None if settings is None else base_folder(settings)
    weights = None if folder is None else _stored(_weights(folder, adapter))
    measured = run and losses
    found = _Found(keep=_highest(adapter) if measured else 0)
    found.read(adapter, weights, exact)
    explanation = Explanation(str(adapter.folder), None if folder is None else str(folder), tuple(found.updates))
    if not measured or explanation.nothing:
        return explanation
    opened = open_run(name, best=best, changes=changes)
    assert opened.job is not None, "it has a job.toml"
    try:
        held_out = held_out_of(opened).held_out
    except (DataError, CheckpointError) as error:  # they cannot be read any more, or are others than in training
        return replace(explanation, not_measured=str(error))
    return _judged(explanation, opened.model, held_out, opened.job.train.portion, tokens, found)


def explain_trained(
    model: Decoder, run: Path, base: Path, held_out: TokenStore, portion: int, tokens: int
) -> Explanation:
    """Explains the adapter that a run has just saved, with the model that is in memory still.

    Beside the base, if it is small (``COMPARED``), as training saw it. The model is afterwards as it was.

    Args:
        portion: tokens computed at one time.
        tokens: of the run's training, by which the work is bounded (``SHARE``).
    """
    adapter = open_adapter(adapter_folder(run, best=False))
    modules = adapted(model)
    small = sum(out * inputs for out, inputs in adapter.shapes.values()) <= COMPARED
    found = _Found(keep=_highest(adapter))
    found.read(
        adapter, (lambda path: form_of(modules[path].base).dense().float().cpu()) if small else None, exact=False
    )
    explanation = Explanation(str(adapter.folder), str(base) if small else None, tuple(found.updates))
    if explanation.nothing:
        return explanation
    most = round(tokens * SHARE / (len(powers(adapter.rank)) + 2))
    return _judged(explanation, model, held_out, portion, most, found)


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


def _stored(weights: Mapping[str, Matrix]) -> Callable[[str], Tensor]:
    """Reads a matrix of the base, fp32."""

    def read(path: str) -> Tensor:
        weight = weights[path].dense()
        if not weight.isfinite().all():
            raise AdapterError(f"{weights[path].weight.file}: {path}.weight holds non-finite numbers; check --base")
        return weight

    return read


@dataclass
class _Found:
    """The updates of an adapter, and their factors at the highest rank below the trained one, if any are kept."""

    keep: int
    updates: list[Update] = field(default_factory=list)
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def read(self, adapter: AdapterFile, weights: Callable[[str], Tensor] | None, exact: bool) -> None:
        """Decomposes the updates one after the other, beside their matrices where these can be had."""
        where = places(list(adapter.shapes))
        for factors in adapter.factors():
            path, spectrum = factors.path, factors.spectrum()
            if self.keep:
                self.kept[path] = spectrum.factors(self.keep)
            self.updates.append(
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
                    relation=None if weights is None else relate(weights(path), spectrum, exact),
                )
            )


def _highest(adapter: AdapterFile) -> int:
    """The highest of the lower ranks that are tried; 0 where there is none."""
    return max(powers(adapter.rank), default=0)


def _judged(
    explanation: Explanation, model: Decoder, held_out: TokenStore, portion: int, tokens: int | None, found: _Found
) -> Explanation:
    """The explanation with held-out losses, or with why there are none."""
    if not len(held_out):
        return replace(explanation, not_measured="the run held out no rows")
    rows = held_out if tokens is None else [held_out[place] for place in some(held_out.lengths, tokens).tolist()]
    ranks = _ranks(model, rows, portion, powers(explanation.rank), found.kept)
    return replace(explanation, ranks=replace(ranks, rows=len(rows), held_out=len(held_out)))


def _ranks(
    model: Decoder,
    rows: Iterable[Rendered],
    portion: int,
    lower: list[int],
    kept: Mapping[str, tuple[Tensor, Tensor]],
) -> Ranks:
    """The losses of base, adapter and truncated adapter. Each rank is evaluated as its saved adapter would be."""
    with adapter_scale(model, 0.0):
        base = evaluate(model, rows, portion).loss
    full, modules, losses = evaluate(model, rows, portion).loss, adapted(model), []
    with _restored(modules.values()):
        for rank in lower:
            for path, (a, b) in kept.items():
                module = modules[path]
                device = module.a.device
                module.a, module.b = (
                    nn.Parameter(a[:rank].to(device)),
                    nn.Parameter(b[:, :rank].contiguous().to(device)),
                )
                module.scale = 1.0
            losses.append((rank, evaluate(model, rows, portion).loss))
    return Ranks(base, full, tuple(losses))


@contextlib.contextmanager
def _restored(modules: Iterable[AdaptedLinear]) -> Iterator[None]:
    """Puts the factors of the adapted modules back after a block."""
    before = [(module, module.a, module.b, module.scale) for module in modules]
    try:
        yield
    finally:
        for module, a, b, scale in before:
            module.a, module.b, module.scale = a, b, scale
