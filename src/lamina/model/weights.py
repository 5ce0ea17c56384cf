"""A model's weights, from safetensors straight into place.

The decoder is made on the ``meta`` device, which holds shapes and no memory; its parameters are allocated once, in the
dtype and on the device where they stay, and each is read from its bytes in the file. A linear that is kept quantised is
quantised as soon as it is read. So the peak is the weights as they are kept and one tensor, never two copies of the model.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lamina import native
from lamina.errors import ConfigError, ModelError
from lamina.model.architecture import Architecture, read_config
from lamina.model.checkpoint import Stored, stored_tensors, summary
from lamina.model.decoder import Decoder
from lamina.model.fingerprint import stored_fingerprint
from lamina.model.locate import locate
from lamina.model.quantised import Base, QuantisedLinear, device_of, linears_of, quantise_leaves, quantised_of
from lamina.model.storage import StoredForm, fill, form_stored, parts_of
from lamina.section import section

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
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
    base: Literal["bf16", "fp32", "nf4", "fp4", "int8", "fp8"] | None = None
    """Form in which the frozen linears are kept: nf4 or fp4 (bitsandbytes, QLoRA) in four bits, computed with in dtype; int8
    or fp8, which round the activations too and are approximate. Left out: as the checkpoint stores them, in dtype where
    those are plain numbers. Embeddings, norms and head are always kept in dtype."""
    double_quant: bool = True
    """Whether the scales of 4-bit blocks are quantised too: 4.13 bits a weight instead of 4.5."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes: auto takes a GPU when there is one."""

    @model_validator(mode="after")
    def _computed(self) -> "ModelSettings":
        if self.base in DTYPES and self.base != self.dtype:
            raise ValueError(
                f"base: found {self.base} with dtype {self.dtype}, expected the same; set dtype to {self.base}, or leave base out"
            )
        return self

    @property
    def form(self) -> Base | None:
        """The form that the linears are to be quantised into; None leaves them as they are stored."""
        return None if self.base is None or self.base in DTYPES else cast(Base, self.base)

    def load(self, folder: Path) -> Decoder:
        """Loads the model that lies in ``folder`` as these settings say; errors as of ``load_model``."""
        return load_model(folder, self.dtype, self.device, base=self.base, double_quant=self.double_quant)


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
    base: str | None = None,
    double_quant: bool = True,
) -> Decoder:
    """Loads a base model: frozen, in evaluation mode.

    Args:
        name: folder, or id on the hub.
        dtype: in which it computes, and in which it keeps what is not quantised, whatever it is in the file.
        device: ``auto``, ``cpu``, ``cuda`` or a torch device.
        revision: branch, tag or commit on the hub.
        base: form of the linears, as in ``ModelSettings``.
        double_quant: whether the scales of 4-bit blocks are quantised too.

    Raises:
        ModelError: the model is not found, damaged, not computed here, or its tensors do not fit its config; all
            misfits in one message.
        ConfigError: it is stored quantised in another form than ``base``.
    """
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    model, stored = outline(locate(name, revision), dtype, base, double_quant)
    device = pick_device(device) if isinstance(device, str) else torch.device(device)
    native.own_memory(device)
    model.to_empty(device=device)
    read_module(model, "", stored)
    if quantised_of(model):
        model.fingerprint = stored_fingerprint(model.architecture, stored)
    return model


def outline(
    folder: Path, dtype: torch.dtype, base: str | None = None, double_quant: bool = True
) -> tuple[Decoder, dict[str, Stored]]:
    """The model of a folder on the ``meta`` device: frozen, in evaluation mode, and where its weights are stored.

    Raises:
        ModelError, ConfigError: as ``load_model``.
    """
    architecture = read_config(folder)
    stored = used_tensors(folder, architecture)
    with torch.device("meta"):
        model = Decoder(architecture)
    _check_fit(folder, model, stored)
    model.to(dtype)
    if form := _form(folder, stored, base, double_quant):
        if dtype not in DTYPES.values():
            raise ConfigError(f"base: found {form.base} computed in {dtype}, expected bf16 or fp32")
        quantise_leaves(model, form.base, form.double, dtype, parts_of(stored))
    return model.requires_grad_(False).eval(), stored


def _form(folder: Path, stored: Mapping[str, Stored], base: str | None, double_quant: bool) -> StoredForm | None:
    """The form in which the linears are kept: the one they are stored in, or the one that is asked for."""
    if own := form_stored(folder, stored):
        if base not in (None, own.base):
            raise ConfigError(
                f"base: found {base}, but {folder} stores its linears in {own.base}; leave base out, or name the model it "
                "was made from"
            )
        return own
    if base is None or base in DTYPES:
        return None
    if base not in get_args(Base):
        raise ConfigError(f"base: found {base!r}, expected one of {', '.join((*DTYPES, *get_args(Base)))}")
    return StoredForm(cast(Base, base), double_quant)


def form_of_folder(folder: Path, settings: ModelSettings) -> StoredForm | None:
    """The form in which the linears of the model in ``folder`` will be kept; None as numbers.

    Raises:
        ModelError, ConfigError: as ``load_model``.
    """
    stored = used_tensors(folder, read_config(folder))
    return _form(folder, stored, settings.base, settings.double_quant)


def read_module(
    module: nn.Module, prefix: str, stored: Mapping[str, Stored], adapter: Mapping[str, Tensor] | None = None
) -> None:
    """Fills a module whose memory is allocated; a linear that is to be quantised is quantised while it is read.

    Beside the module there is at most one weight at a time, in the dtype of the computation.

    Args:
        prefix: the module's path in the model, with a dot at its end, or nothing for the model itself.
        adapter: A and B of adapted linears by their name in the model.
    """
    packed = parts_of(stored)
    for name, leaf in module.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(leaf, QuantisedLinear):
            path = name.removesuffix(".base")  # an adapted linear holds the frozen one as its base
            if path in packed:
                fill(leaf, packed[path], f"{stored[f'{path}.weight'].file}: {path}")
            else:
                _quantise(leaf, stored[f"{path}.weight"])
    for name, parameter in module.named_parameters():
        if adapter and prefix + name in adapter:
            parameter.data.copy_(adapter[prefix + name])
        else:
            stored[(prefix + name).replace(".base.", ".")].read_into(parameter.data)


def _quantise(leaf: QuantisedLinear, stored: Stored) -> None:
    weight = torch.empty(stored.shape, dtype=leaf.form.dtype, device=device_of(leaf))
    stored.read_into(weight)
    leaf.form.store(weight)


def used_tensors(folder: Path, architecture: Architecture) -> dict[str, Stored]:
    """Lists the stored tensors under the names of the decoder's parameters, without those that it computes or ties.

    Where embedding and head are tied, a file may hold either or both; the embedding wins, as in transformers.
    """
    stored = {name: tensor for name, tensor in stored_tensors(folder).items() if not _COMPUTED.fullmatch(name)}
    if architecture.tied and _HEAD in stored:
        head = replace(stored.pop(_HEAD), name=_EMBEDDING)
        stored.setdefault(_EMBEDDING, head)
    return stored


def _check_fit(folder: Path, model: Decoder, stored: Mapping[str, Stored]) -> None:
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    packed, linears = parts_of(stored), linears_of(model)
    quantised = {f"{path}.{part}" for path in packed.keys() & linears.keys() for part in packed[path]}
    plain = {name: tensor for name, tensor in stored.items() if name not in quantised}
    wanted = {name: shape for name, shape in shapes.items() if name not in quantised}
    missing = wanted.keys() - plain.keys()
    unexpected = plain.keys() - wanted.keys()
    problems = []
    if missing:
        problems.append(f"missing {len(missing)}: {summary(name for name in shapes if name in missing)}")
    if unexpected:
        problems.append(f"unexpected {len(unexpected)}: {summary(name for name in stored if name in unexpected)}")
    for name in (name for name in wanted if name in plain):
        if plain[name].shape != shapes[name]:
            problems.append(f"{name} has shape {list(plain[name].shape)}, expected {list(shapes[name])}")
        if not plain[name].dtype.is_floating_point or plain[name].dtype.itemsize < 2:
            problems.append(f"{name} is stored as {plain[name].code}, expected F64, F32, F16 or BF16")
    if problems:
        raise ModelError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")
