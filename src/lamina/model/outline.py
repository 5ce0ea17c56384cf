"""A model on the hub without its weights: what a plan, or a check of a job, has to know of 140 GB is at the beginning of its files.

A safetensors file begins with a header that names all its tensors. The hub gives parts of files, so only the headers are
fetched. They lie in a temporary folder, at the beginning of files that are as long as the true ones and take no room on
the disk, beside copies of the other files: whoever reads headers finds what is in the true folder. Nothing may be
loaded from there.
"""

import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

from lamina.model.checkpoint import shards_of
from lamina.model.locate import PATTERNS, download, local, told

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""They go with the process."""


def outline(name: str, revision: str | None = None) -> Path:
    """The folder of a model with its configuration and tokenizer, and with files of weights that may have their headers only.

    Where the weights are at hand, or are stored quantised, so that more than headers says what they are, it is the true folder.

    Raises:
        ModelError: as ``locate``.
    """
    return local(name, revision) or _of_repository(name, revision)


@cache
def _of_repository(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

    with told(name, revision):
        small = [pattern for pattern in PATTERNS if not pattern.endswith(".safetensors")]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=small))
        shards = shards_of(folder / INDEX) if (folder / INDEX).exists() else [SINGLE]
        if all((folder / shard).exists() for shard in shards):
            return folder
        if is_offline_mode() or _packed(folder / "config.json"):
            return download(name, revision)
        ask = partial(HfApi().parse_safetensors_file_metadata, name, revision=folder.name)
        try:
            found = {shard: ask(shard) for shard in shards}
        except (EntryNotFoundError, SafetensorsParsingError):  # which the download tells of
            return download(name, revision)
    return _written(name, folder, found)


def _packed(config: Path) -> bool:
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False  # told by whoever reads it next


def _written(name: str, folder: Path, found: dict[str, Any]) -> Path:
    """The temporary folder, which ends in the model's name, as messages show it: what is in the snapshot, and the headers in files of
    full length."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="lamina-outline-"))
    made = Path(_FOLDERS[-1].name) / name
    made.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":  # a shard may be there already
            shutil.copy(path, made / path.name)
    for shard, header in found.items():
        tensors = {
            name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for name, info in header.tensors.items()
        }
        text = json.dumps(tensors).encode()
        with (made / shard).open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max((info.data_offsets[1] for info in header.tensors.values()), default=0))
    return made
