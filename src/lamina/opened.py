"""A finished run, or a plain model, opened to be measured, to answer, or to be merged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lamina.adapter_files import load_adapter
from lamina.data.prepare import Prepared
from lamina.data.render import Rendered, end_tokens
from lamina.errors import AdapterError, CheckpointError, ConfigError, ModelError
from lamina.evaluation import Scores
from lamina.job import Job, base_folder, elsewhere, prepare_data, read_job, shipped_path
from lamina.model.architecture import Architecture
from lamina.model.checkpoint import stored_tensors
from lamina.model.decoder import Decoder
from lamina.model.tokenizer import load_tokenizer, stop_tokens
from lamina.model.weights import DTYPES, ModelSettings
from lamina.neutral import read_neutral
from lamina.training.resume import check_origin, has_state, read_header
from lamina.understand.budget import sizes
from lamina.understand.card import Asked, Card, measure
from lamina.understand.difference import difference_on_load

_PROBE = 16  # tokens on which a loaded adapter must make a difference: any will do


@dataclass(frozen=True)
class Opened:
    """A model with its tokenizer; of a run, with its adapter laid on.

    Attributes:
        name: what was opened, as the user named it.
        stop: the ids that end an answer.
        job: the run's; None for a plain model.
        folder: the run's; None for a plain model.
    """

    name: str
    model: Decoder
    tokenizer: Any
    stop: set[int]
    base: Path
    job: Job | None = None
    folder: Path | None = None


def open_run(name: str | Path, best: bool = False, changes: Mapping[str, Any] | None = None) -> Opened:
    """Loads a run with its adapter, a plain model (a folder or a hub id), or a bare adapter with its base.

    Args:
        best: the adapter of the best evaluation instead of the last.
        changes: other values for the run's settings of the model, such as its device; ``model`` where its base lies now,
            and for a bare adapter in PEFT's format, its base.

    Raises:
        CheckpointError: a run that has not saved such an adapter.
        ConfigError: a base for what is a model itself.
        ModelError, AdapterError: the model or the adapter cannot be loaded, do not belong together, or the adapter
            changes nothing.
    """
    folder, changes = Path(name), at_new_place(changes or {})
    if changes.get("base") in DTYPES:  # asked for as numbers: computed in what they are
        changes.setdefault("dtype", changes["base"])
    if not (folder / "job.toml").is_file():
        return _open_plain(str(name), changes)
    job = read_job(folder)
    job = replace(job, model=replace(job.model, **changes))
    adapter = adapter_folder(folder, best)
    with elsewhere(folder):
        base = base_folder(job.model)
    opened = Opened(str(name), *_load(job.model, base, job.data.template), job, folder)
    _lay(opened, adapter)
    return opened


def at_new_place(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a run's settings; a base at another place has a revision there, or none."""
    return ({"revision": None} if "model" in changes else {}) | dict(changes)


def _open_plain(name: str, changes: dict[str, Any]) -> Opened:
    """A plain model, or a bare adapter over the base that ``changes`` names."""
    adapter = (Path(name) / "adapter_config.json").is_file()
    if "model" in changes and not adapter:
        raise ConfigError(
            f"{name}: is neither a run nor an adapter, so it has no base to name as --model; leave --model out"
        )
    if adapter and "model" not in changes and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name}: holds an adapter, not a model; name its base as --model")
    settings = ModelSettings(**{"model": name} | changes)
    base = base_folder(settings)
    if "dtype" not in changes:
        settings = replace(settings, dtype=_stored_dtype(base))
    opened = Opened(name, *_load(settings, base, None))
    if "model" in changes:
        _lay(opened, Path(name))
    return opened


def _lay(opened: Opened, adapter: Path) -> None:
    load_adapter(opened.model, adapter)
    if difference_on_load(opened.model, range(min(_PROBE, opened.model.architecture.vocabulary))) == 0.0:
        raise AdapterError(f"{adapter}: changes no logit of the base; train it anew, or open the base by itself")


def adapter_folder(run: Path, best: bool) -> Path:
    """Where the last or the best adapter of a run is.

    Raises:
        CheckpointError: it has not been saved.
    """
    adapter = run / ("best" if best else "adapter")
    if not adapter.is_dir():
        why = (
            "no evaluation has passed, or nothing was held out"
            if best
            else "it ended before its first save, or was removed"
        )
        raise CheckpointError(f"{run}: found no {adapter.name}/ ({why}); go on with: lamina train --resume {run}")
    return adapter


def held_out_of(opened: Opened) -> Prepared:
    """The data of an opened run: the same rows are held out as in training.

    Raises:
        CheckpointError: they are not the same, because the data has changed; the run may have been trained on them.
        DataError: they cannot be read; with what to do where they lie elsewhere.
    """
    assert opened.job is not None, "a plain model has no data"
    with elsewhere(opened.folder):
        data = prepare_data(opened.job, opened.base, opened.tokenizer)
    if opened.folder is not None and has_state(opened.folder):
        origin = {"held-out rows": data.held_out.fingerprint}
        check_origin(opened.folder, read_header(opened.folder), origin)
    return data


def card_of(opened: Opened) -> Card:
    """Measures an opened run on its held-out rows, the base beside the adapter."""
    assert opened.job is not None, "a plain model has no data"
    return measured(Asked(opened.model, opened.tokenizer, opened.stop), held_out_of(opened), opened.job)


def measured(asked: Asked, data: Prepared, job: Job, base: Scores | None = None, adapter: Scores | None = None) -> Card:
    """The card of an adapted model, by the job's settings.

    Args:
        base, adapter: their scores on the held-out rows, where they are known.
    """
    neutral = neutral_of(job, asked.tokenizer, asked.model.architecture)
    wanted = sizes(job.evaluate, job.train, data.train, data.held_out)
    return measure(asked, data.held_out, neutral, wanted, base, adapter)


def neutral_of(job: Job, tokenizer: Any, architecture: Architecture) -> list[Rendered]:
    """A job's neutral text as rows; none where it is not measured. A row with an id that the model does not know is left out.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is empty.
        ConfigError: Lamina ships no such file.
    """
    if job.evaluate.neutral is None:
        return []
    rows = read_neutral(shipped_path(job.evaluate.neutral), tokenizer, architecture.max_position)
    return [row for row in rows if row.tokens.max() < architecture.vocabulary]


def stops(base: Path, tokenizer: Any, template: str | None) -> set[int]:
    """The ids that end an answer: the model's own, and the one the template writes."""
    return stop_tokens(base, tokenizer) | end_tokens(tokenizer, template)


def _load(settings: ModelSettings, base: Path, template: str | None) -> tuple[Decoder, Any, set[int], Path]:
    tokenizer = load_tokenizer(base)
    model = settings.load(base)
    return model, tokenizer, stops(base, tokenizer, template), base


def _stored_dtype(base: Path) -> Literal["bf16", "fp32"]:
    """A plain model computes in fp32 when that is how its embedding is stored, else in bf16."""
    stored = stored_tensors(base).values()
    embedding = [tensor.dtype.itemsize for tensor in stored if tensor.name.endswith("embed_tokens.weight")]
    return "fp32" if max(embedding, default=2) >= 4 else "bf16"
