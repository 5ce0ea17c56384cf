"""A merged model's folder, written tensor by tensor.

Names, shapes and dtypes are known before anything is computed, so the shards are planned first, each header is written, and
then each piece is computed and written in turn: the peak is what one piece needs. The folder is made under a temporary name
and renamed when it is complete.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.model.checkpoint import DTYPES, Stored
from lamina.model.keys import read_json

# Everything beside the weights that a model's folder needs to be used: never the old index, never other weights.
_COPIED = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "tokenizer.model", "merges.txt", "LICENSE*")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Form:
    """The form of a tensor that is to be written: its dtype as the header spells it, and its shape."""

    code: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * DTYPES[self.code].itemsize


@dataclass(frozen=True)
class Piece:
    """Tensors that are computed together: what they will be, and how to come by them."""

    forms: Mapping[str, Form]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return sum(form.size for form in self.forms.values())


@dataclass(frozen=True)
class Merged:
    """What was written."""

    folder: Path
    shards: tuple[str, ...]
    tensors: int
    size: int
    """Bytes of all tensors."""


def as_stored(tensor: Stored) -> Piece:
    """A tensor that is written as it is stored."""
    return Piece({tensor.name: Form(tensor.code, tensor.shape)}, lambda: {tensor.name: tensor.read()})


def write_merged(
    base: Path,
    out: Path,
    pieces: Sequence[Piece],
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Merged:
    """Writes a model's folder: the tensors of ``pieces``, and everything else as it is in ``base``.

    Args:
        base: the model's folder.
        out: the folder to write; absent or empty.
        pieces: made one after the other; what one makes is written before the next is made.
        config: keys of ``config.json`` with other values; None takes a key out.
        max_shard_bytes: a shard is closed before it grows beyond this; one larger piece is a shard of its own.

    Raises:
        CheckpointError: ``out`` is not empty, or cannot be written (disk full, read-only); nothing is left there.
        ModelError: the base cannot be read.
    """
    out = free_place(out)
    size = sum(piece.size for piece in pieces)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        free = shutil.disk_usage(part).free
        if size > free:
            raise CheckpointError(f"{out}: the merged model needs {size:,} bytes and the disk has {free:,} free")
        shards = _plan(pieces, max_shard_bytes)
        for file, members in shards.items():
            _write_shard(part / file, members)
        _write_index(part, shards, size)
        _copy_rest(base, part)
        if config:
            values = {**read_json(part / "config.json"), **config}
            kept = {key: value for key, value in values.items() if value is not None or key not in config}
            (part / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        part.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out}: the merged model cannot be written ({error.strerror or error}); nothing was left"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Merged(out, tuple(shards), sum(len(piece.forms) for piece in pieces), size)


def free_place(out: Path) -> Path:
    """The absolute path of a folder that is absent or empty.

    Raises:
        CheckpointError: something is there, or what is to hold the folder is a file.
    """
    out = Path(os.path.abspath(out))
    above = next(folder for folder in out.parents if folder.exists())
    if not above.is_dir():
        raise CheckpointError(f"{out}: {above} is a file, expected a folder; name another place as --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not an empty folder; name another place as --out")
    return out


def _plan(pieces: Sequence[Piece], max_shard_bytes: int) -> dict[str, list[Piece]]:
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if groups[-1] and filled + piece.size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, start=1)}


def _write_shard(file: Path, pieces: list[Piece]) -> None:
    forms = {name: form for piece in pieces for name, form in piece.forms.items()}
    # Wider dtypes first, so that every tensor lies at a multiple of its element size.
    order = sorted(forms, key=lambda name: -DTYPES[forms[name].code].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in order:
        starts[name], end = end, end + forms[name].size
        header[name] = {
            "dtype": forms[name].code,
            "shape": list(forms[name].shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            for name, value in piece.make().items():
                form = forms[name]
                assert (value.dtype, tuple(value.shape)) == (DTYPES[form.code], form.shape), f"{name}: another form"
                stream.seek(8 + len(text) + starts[name])
                stream.write(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                del value  # before the next one is made
        stream.flush()
        os.fsync(stream.fileno())  # a full disk may show only here


def _write_index(folder: Path, shards: dict[str, list[Piece]], size: int) -> None:
    if len(shards) > 1:
        places = {name: file for file, pieces in shards.items() for piece in pieces for name in piece.forms}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_rest(base: Path, out: Path) -> None:
    for pattern in _COPIED:
        for file in base.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                target = out / file.relative_to(base)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
