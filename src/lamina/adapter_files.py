"""Adapters on disk, in PEFT's format both ways: ``adapter_model.safetensors`` and ``adapter_config.json``.

The weights' file also carries, in its header, a fingerprint of the base they were trained on. Reading is strict: PEFT
ignores keys that fit nowhere, and an adapter then loads and does nothing; here every misfit is told, all in one message.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamina.adapter import ALL_LINEAR, AdaptedLinear, LoRA, adapted, attach, detach, layers_of, matches
from lamina.errors import AdapterError, CheckpointError, ConfigError
from lamina.model.decoder import Decoder
from lamina.model.fingerprint import fingerprint
from lamina.model.quantised import Linear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_IGNORED = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
_IGNORED |= {"peft_version", "layers_pattern", "runtime_config", "megatron_core", "ensure_weight_tying"}
_IGNORED |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # of ways to draw A and B
_READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "init_lora_weights"}
_READ |= {"rank_pattern", "alpha_pattern", "use_rslora"}
_OFF: dict[str, Any] = {"bias": "none", "qalora_group_size": 16, "megatron_config": None}
"""Settings of PEFT that Lamina does not compute, with the value that means nothing is to be computed."""

_DRAWS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to draw A and B that leave the base as it is. The others (pissa, olora, loftq, ...) take something out of W, and the
adapter is an update of what is left of it."""


def save_adapter(model: Decoder, folder: str | Path, lora: LoRA, base: str, revision: str | None = None) -> None:
    """Writes the adapter of a model as PEFT does, each file to a temporary name first and then renamed.

    Args:
        base: name or folder of the base model, for ``base_model_name_or_path``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for path, module in adapted(model).items():
        tensors[_key(path, "A")], tensors[_key(path, "B")] = module.a.detach().cpu(), module.b.detach().cpu()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "use_rslora": lora.rslora,
        "use_dora": False,
        **_where(list(adapted(model)), lora, model.architecture.layers),
    }
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt", "lamina_base": fingerprint(model)})
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file whole or not at all: under a temporary name, flushed to the disk, renamed.

    Raises:
        CheckpointError: the disk is full or refuses the file; what stood there before still does.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        with partial.open("r+b") as file:
            _in_order(file)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(
            path.parent.stat().st_mode & 0o666
        )  # safetensors writes for the owner alone; who may read the run may read this
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: cannot be saved ({error}); what was saved there before is untouched; make room, then go on with "
            f"lamina train --resume"
        ) from None


def _in_order(file: BinaryIO) -> None:
    """Sorts the metadata in a safetensors header: the library writes it in a random order, and equal runs have equal files."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= size
    file.seek(8)
    file.write(text.ljust(size))


def load_adapter(model: Decoder, folder: str | Path) -> LoRA:
    """Lays an adapter written by Lamina or PEFT over the model.

    Returns:
        Its settings.

    Raises:
        AdapterError: no adapter there, a damaged file, a feature that is not computed, tensors that are missing,
            unexpected or of the wrong shape (all of them), a non-finite number, another base than it was trained on, or
            an adapter that changes nothing.
    """
    return _lay(model, Path(folder), lambda: fingerprint(model))[0]


def outline_adapter(model: Decoder, folder: Path, base: str) -> dict[str, Tensor]:
    """Lays an adapter over the outline of a model, which has shapes and no weights.

    Args:
        base: the fingerprint of the weights that belong to the outline.

    Returns:
        A and B by their names in the model.

    Raises:
        AdapterError: as ``load_adapter``.
    """
    tensors = _lay(model, folder, lambda: base)[1]
    return {f"{path}.{factor.lower()}": tensors[_key(path, factor)] for path in adapted(model) for factor in "AB"}


def _lay(model: Decoder, folder: Path, own: Callable[[], str]) -> tuple[LoRA, dict[str, Tensor]]:
    lora = _for(model, read_config(folder))
    tensors, base = read_weights(folder)
    if base is not None and base != (found := own()):
        raise AdapterError(
            f"{folder}: this adapter was trained on another base (fingerprint {base[:12]}) than the model at hand "
            f"({found[:12]}); load the base it was trained on"
        )
    try:
        modules = attach(model, lora)
    except ConfigError as error:
        raise AdapterError(f"{folder}: this adapter does not fit the model: {error}") from None
    try:
        _fill(modules, tensors, folder)
    except AdapterError:
        detach(model)
        raise
    return lora, tensors


def read_weights(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of an adapter by PEFT's names, and the fingerprint of its base where the file has one.

    Raises:
        AdapterError: no weights, or a damaged file.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle and is not read: save it again with safe_serialization=True)"
        raise AdapterError(
            f"{folder}: found no {WEIGHTS}" + (pickled if (folder / "adapter_model.bin").exists() else "")
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("lamina_base")  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(
            f"{path}: damaged or incomplete ({error}); copy it again from where it was written"
        ) from None


def read_config(folder: Path) -> LoRA:
    """The settings of an adapter from PEFT's config.

    Raises:
        AdapterError: no config, not a LoRA, or features that Lamina does not compute, all of them by name.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder}: found no {CONFIG}, so this is no adapter folder") from None
    except json.JSONDecodeError as error:
        raise AdapterError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterError(f"{path}: found peft_type {found!r}, expected 'LORA'")
    known = _IGNORED | _READ
    foreign = sorted(key for key, value in config.items() if key not in known and value and value != _OFF.get(key))
    if config.get("init_lora_weights") not in _DRAWS:
        foreign.append(f"init_lora_weights {config['init_lora_weights']!r}, which changes the base's own weights")
    if foreign:
        raise AdapterError(f"{path}: asks for what Lamina does not compute: {', '.join(foreign)}")
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    settings: dict[str, Any] = {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout", 0.0),
        "targets": _targets(config.get("target_modules")),
        "layers": ",".join(map(str, layers)) if layers else "all",
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "rslora": config.get("use_rslora", False),
    }
    try:
        return LoRA(**settings)
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from None


def _targets(found: Any) -> Any:
    """PEFT's targets in our words: a text there is an expression for the whole path, a list holds ends of paths."""
    if isinstance(found, str):
        return (found,) if found == ALL_LINEAR else (f"^(?:{found})",)
    return tuple(sorted(re.escape(target) for target in found)) if isinstance(found, list) else found


def _for(model: Decoder, lora: LoRA) -> LoRA:
    """The settings without the names that fit nothing in this model; people list those of several architectures."""
    paths = [path for path, module in model.named_modules() if isinstance(module, Linear)]

    def present(pattern: str) -> bool:
        try:
            return pattern == ALL_LINEAR or any(matches(pattern, path) for path in paths)
        except re.error:
            return True  # attach says what is wrong with it

    return replace(
        lora,
        targets=tuple(filter(present, lora.targets)),
        rank_pattern={pattern: rank for pattern, rank in lora.rank_pattern.items() if present(pattern)},
        alpha_pattern={pattern: alpha for pattern, alpha in lora.alpha_pattern.items() if present(pattern)},
    )


def _key(path: str, factor: str) -> str:
    return f"base_model.model.{path}.lora_{factor}.weight"


@torch.no_grad()
def _fill(modules: dict[str, AdaptedLinear], tensors: dict[str, Tensor], folder: Path) -> None:
    wanted = {_key(path, f): p for path, m in modules.items() for f, p in (("A", m.a), ("B", m.b))}
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    for name, parameter in wanted.items():
        if name not in tensors:
            continue
        if tensors[name].shape != parameter.shape:
            found, expected = list(tensors[name].shape), list(parameter.shape)
            problems.append(f"{name} has shape {found}, the model's takes {expected}")
        elif not tensors[name].isfinite().all():
            problems.append(f"{name} holds non-finite numbers")
        else:
            parameter.copy_(tensors[name])
    if problems:
        raise AdapterError(
            f"{folder}: this adapter does not fit the model ({len(problems)} misfits): {'; '.join(problems)}"
        )
    if not any(tensors[_key(path, "B")].any() for path in modules):
        raise AdapterError(
            f"{folder}: this adapter changes nothing: every B is zero, as before the first step; train it, or use the "
            "base without it"
        )


def _where(paths: list[str], lora: LoRA, layers: int) -> dict[str, Any]:
    """PEFT's words for these modules: names of leaves where they say it exactly, else whole paths."""
    leaves = sorted({path.rsplit(".", 1)[1] for path in paths})
    wanted = layers_of(lora.layers, layers)
    if len(paths) == len(leaves) * len(wanted):
        return {"target_modules": leaves, "layers_to_transform": None if lora.layers == "all" else wanted}
    return {"target_modules": paths, "layers_to_transform": None}


__all__ = [
    "CONFIG",
    "WEIGHTS",
    "fingerprint",
    "load_adapter",
    "outline_adapter",
    "read_config",
    "read_weights",
    "save_adapter",
]
