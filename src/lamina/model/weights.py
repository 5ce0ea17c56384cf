"""A model's weights, from safetensors straight into place.

The decoder is made on the ``meta`` device, which holds shapes and no memory; its parameters are allocated once, in the
dtype and on the device where they stay, and each is read from its bytes in the file. So the peak is the weights and one
piece of a tensor that is being converted, never two copies of the model.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from lamina.errors import ConfigError, ModelError
from lamina.model.architecture import Architecture, read_config
from lamina.model.checkpoint import Stored, stored_tensors, summary
from lamina.model.decoder import Decoder
from lamina.model.locate import locate
from lamina.section import section

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LATER = {"nf4": "NF4", "int8": "INT8", "fp8": "FP8"}
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")  # a buffer that old checkpoints hold
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@section
class ModelSettings:
    """The base model: which one, in which precision, where."""

    model: Annotated[str, Field(min_length=1)]
    """Folder of a model (config.json, safetensors, tokenizer) or its id on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub; a commit pins it."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the computation; norms, softmax and the loss are reduced in fp32 either way."""
    base: Literal["bf16", "fp32", "nf4", "int8", "fp8"] | None = None
    """Form in which the frozen weights are kept; as dtype when left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes: auto takes a GPU when there is one."""

    @model_validator(mode="after")
    def _computed(self) -> "ModelSettings":
        if self.base in _LATER:
            raise ValueError(f"base: {_LATER[self.base]} comes with a later version; run with --base {self.dtype}")
        if self.base not in (None, self.dtype):
            raise ValueError(f"base: found {self.base} with dtype {self.dtype}, expected the same; leave base out")
        return self


def pick_device(device: str) -> torch.device:
    """Turns ``auto``, ``cpu`` or ``cuda`` into a device.

    Raises:
        ConfigError: ``cuda`` where PyTorch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: found cuda, but PyTorch sees no GPU; run with --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load_model(
    name: str | Path,
    dtype: Literal["bf16", "fp32"] | torch.dtype = "bf16",
    device: str | torch.device = "auto",
    revision: str | None = None,
) -> Decoder:
    """Loads a base model: frozen, in evaluation mode.

    Args:
        name: folder, or id on the hub.
        dtype: of the weights in memory, whatever it is in the file.
        device: ``auto``, ``cpu``, ``cuda`` or a torch device.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: the model is not found, damaged, not computed here, or its tensors do not fit its config; all
            misfits in one message.
    """
    model, stored = outline(locate(name, revision), DTYPES[dtype] if isinstance(dtype, str) else dtype)
    model.to_empty(device=pick_device(device) if isinstance(device, str) else device)
    for key, parameter in model.named_parameters():
        stored[key].read_into(parameter.data)
    return model


def outline(folder: Path, dtype: torch.dtype) -> tuple[Decoder, dict[str, Stored]]:
    """The model of a folder on the ``meta`` device: frozen, in evaluation mode, and where its weights are stored.

    Raises:
        ModelError: as ``load_model``.
    """
    architecture = read_config(folder)
    stored = used_tensors(folder, architecture)
    with torch.device("meta"):
        model = Decoder(architecture)
    _check_fit(folder, {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}, stored)
    return model.to(dtype).requires_grad_(False).eval(), stored


def used_tensors(folder: Path, architecture: Architecture) -> dict[str, Stored]:
    """Lists the stored tensors under the names of the decoder's parameters, without those that it computes or ties.

    Where embedding and head are tied, a file may hold either or both; the embedding wins, as in transformers.
    """
    stored = {name: tensor for name, tensor in stored_tensors(folder).items() if not _COMPUTED.fullmatch(name)}
    if architecture.tied and _HEAD in stored:
        head = replace(stored.pop(_HEAD), name=_EMBEDDING)
        stored.setdefault(_EMBEDDING, head)
    return stored


def _check_fit(folder: Path, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]) -> None:
    missing, unexpected = shapes.keys() - stored.keys(), stored.keys() - shapes.keys()
    problems = []
    if missing:
        problems.append(f"missing {len(missing)}: {summary(name for name in shapes if name in missing)}")
    if unexpected:
        problems.append(f"unexpected {len(unexpected)}: {summary(name for name in stored if name in unexpected)}")
    for name in (name for name in shapes if name in stored):
        if stored[name].shape != shapes[name]:
            problems.append(f"{name} has shape {list(stored[name].shape)}, expected {list(shapes[name])}")
        if not stored[name].dtype.is_floating_point or stored[name].dtype.itemsize < 2:
            problems.append(f"{name} is stored as {stored[name].code}, expected F64, F32, F16 or BF16")
    if problems:
        raise ModelError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")
