"""The tensors of a folder of safetensors files, read by byte range.

A safetensors file is eight bytes with the header's length, a JSON header (name → dtype, shape, byte range) and the raw
bytes. They are read with ``readinto``, straight to where the weights will live. Rejected: ``safetensors.safe_open``,
which maps the file, so that the pages of the file count beside the weights (a peak of twice the model where both have
the same dtype); and pickled ``.bin`` files, which can run code when read.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.errors import ModelError
from lamina.model.architecture import STORABLE

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_PIECE = 1 << 20  # elements converted at a time: few enough to stay in cache, and no strain on the allocator


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file."""

    name: str
    file: Path
    code: str
    """The dtype as the header spells it, a key of ``DTYPES``."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte in the file."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Returns the tensor as it is stored."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out

    def read_into(self, out: Tensor) -> None:
        """Fills ``out``, contiguous and of the same shape; converts to its dtype and device piece by piece.

        Raises:
            ModelError: the file cannot be read, or ends too early.
        """
        assert tuple(out.shape) == self.shape, f"{self.name} is read into another shape"
        flat = out.view(-1)
        direct = flat.dtype == self.dtype and flat.device.type == "cpu"
        size = min(_PIECE, flat.numel())
        piece = flat if direct else torch.empty(size, dtype=self.dtype, pin_memory=flat.is_cuda)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start)
                for first in range(0, flat.numel(), max(piece.numel(), 1)):
                    part = piece[: flat.numel() - first]
                    self._fill(file, part)
                    if not direct:
                        flat[first : first + part.numel()].copy_(part.to(flat.device))  # a GPU converts it itself
        except OSError as error:
            raise ModelError(f"{self.file}: cannot be read ({error.strerror})") from None

    def _fill(self, file: Any, part: Tensor) -> None:
        view = part.view(torch.uint8).numpy().data
        while len(view):
            count = file.readinto(view)
            if not count:
                raise ModelError(f"{self.file}: ends inside {self.name}; download the file again")
            view = view[count:]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Lists the tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    Raises:
        ModelError: no safetensors, a shard is missing, a file is damaged, or GPTQ or AWQ quantised what is stored.
    """
    tensors = {tensor.name: tensor for file in _files(folder) for tensor in read_header(file)}
    if packed := next((name for name in tensors if name.endswith(".qweight")), None):
        raise ModelError(f"{folder}: {_packed(packed)}")
    return tensors


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ModelError(f"{folder}: {_why_no_weights(folder)}")
    shards = shards_of(index)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: shards named by {index.name} are missing: {', '.join(missing)}; download them again"
        )
    return [folder / shard for shard in shards]


def shards_of(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        ModelError: it names none that could be read, or one that is not beside it.
    """
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        astray = [shard for shard in shards if not shard or Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index}: no readable weight_map; download the file again") from None
    if astray:
        raise ModelError(f"{index}: found {astray[0]!r} in its weight_map, expected files beside it")
    return shards


def _packed(sign: str) -> str:
    """What to say of weights that GPTQ or AWQ quantised, where config.json does not: AutoGPTQ's and AutoAWQ's older folders."""
    return f"the weights are stored quantised by GPTQ or AWQ (there is {sign}), {STORABLE}"


def _why_no_weights(folder: Path) -> str:
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).exists():
            return _packed(name)
    if any(folder.glob("pytorch_model*.bin*")):
        return (
            "holds pytorch_model.bin, a pickle that can run code when read; convert it once, where you trust it: "
            f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
            f".save_pretrained('{folder}-safetensors')\""
        )
    if (folder / "adapter_config.json").exists():
        return "holds an adapter, not a model; name its base instead"
    return "no model.safetensors and no model.safetensors.index.json; choose a model published as safetensors"


def read_header(file: Path) -> list[Stored]:
    """Lists the tensors of one safetensors file, in the order in which their bytes lie.

    Raises:
        ModelError: the file is damaged: bad header, unknown dtype, byte ranges that are not exactly the file.
    """
    try:
        length = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(8)
            size = int.from_bytes(first, "little")
            if first == b"version ":
                raise ModelError(f"{file}: found a Git LFS pointer, expected the weights; run git lfs pull")
            if length < 8 or size > min(length - 8, _MAX_HEADER):
                raise ModelError(f"{file}: truncated or not a safetensors file; download the file again")
            header = json.loads(stream.read(size))
        tensors = sorted(_tensors(file, header, 8 + size), key=lambda tensor: tensor[0].start)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{file}: damaged safetensors header; download the file again") from None
    end = 8 + size
    for tensor, stop in tensors:
        if tensor.start != end or stop != tensor.start + tensor.size:
            raise ModelError(f"{file}: the byte range of {tensor.name} does not fit its shape; download the file again")
        end = stop
    if end != length:
        raise ModelError(f"{file}: found {length} bytes, its header says {end}; download the file again")
    return [tensor for tensor, _ in tensors]


def _tensors(file: Path, header: Any, offset: int) -> Iterable[tuple[Stored, int]]:
    """What a header lists; whatever JSON it is, its caller tells of what does not fit."""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ModelError(f"{file}: {name} has dtype {entry['dtype']!r}, expected one of {', '.join(DTYPES)}")
        start, stop = (offset + int(place) for place in entry["data_offsets"])
        yield Stored(name, file, entry["dtype"], tuple(int(n) for n in entry["shape"]), start), stop


def summary(names: Iterable[str]) -> str:
    """Names in one line, those that differ only in the number of their layer folded into one."""
    folded: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"(?<=\.layers\.)\d+", name)
        key = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
        folded.setdefault(key, []).append("" if number is None else number.group())
    return ", ".join(
        key.replace("{}", numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}")
        for key, numbers in folded.items()
    )
