"""A merged model's folder, written tensor by tensor.

Shapes and dtypes are known from the base's headers before anything is computed, so the shards are planned first, each
header is written, and then each tensor is read, updated and written in turn: the peak is one tensor and what the update
needs for it. The folder is made under a temporary name and renamed when it is complete.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.model.architecture import read_config
from lamina.model.checkpoint import Stored
from lamina.model.weights import used_tensors

# Everything beside the weights that a model's folder needs to be used: never the old index, never other weights.
_COPIED = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "tokenizer.model", "merges.txt", "LICENSE*")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Merged:
    """What was written."""

    folder: Path
    shards: tuple[str, ...]
    tensors: int
    size: int
    """Bytes of all tensors."""


def write_merged(
    base: Path, out: Path, update: Callable[[str, Tensor], Tensor], max_shard_bytes: int = 5_000_000_000
) -> Merged:
    """Writes ``base`` with every tensor passed through ``update``.

    Args:
        base: the model's folder.
        out: the folder to write; absent or empty.
        update: called with a parameter's name and its stored value; returns the value to store, of the same shape and
            dtype. It may work in place.
        max_shard_bytes: a shard is closed before it grows beyond this; one larger tensor is a shard of its own.

    Raises:
        CheckpointError: ``out`` is not empty, or cannot be written (disk full, read-only); nothing is left there.
        ModelError: the base cannot be read.
    """
    out = free_place(out)
    stored = used_tensors(base, read_config(base))
    size = sum(tensor.size for tensor in stored.values())
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        free = shutil.disk_usage(part).free
        if size > free:
            raise CheckpointError(f"{out}: the merged model needs {size:,} bytes and the disk has {free:,} free")
        shards = _plan(stored, max_shard_bytes)
        for file, names in shards.items():
            _write_shard(part / file, [stored[name] for name in names], update)
        _write_index(part, shards, size)
        _copy_rest(base, part)
        part.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out}: the merged model cannot be written ({error.strerror or error}); nothing was left"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Merged(out, tuple(shards), len(stored), size)


def free_place(out: Path) -> Path:
    """The absolute path of a folder that is absent or empty.

    Raises:
        CheckpointError: something is there.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not an empty folder; name another place as --out")
    return out


def _plan(stored: dict[str, Stored], max_shard_bytes: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in stored.items():
        if groups[-1] and filled + tensor.size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, start=1)}


def _write_shard(file: Path, tensors: list[Stored], update: Callable[[str, Tensor], Tensor]) -> None:
    # Wider dtypes first, so that every tensor lies at a multiple of its element size.
    order = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in order:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in order:
            value = update(tensor.name, tensor.read())
            assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape), f"the form of {tensor.name} changed"
            stream.write(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            del value  # before the next one is read
        stream.flush()
        os.fsync(stream.fileno())  # a full disk may show only here


def _write_index(folder: Path, shards: dict[str, list[str]], size: int) -> None:
    if len(shards) > 1:
        places = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_rest(base: Path, out: Path) -> None:
    for pattern in _COPIED:
        for file in base.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                target = out / file.relative_to(base)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
