"""Files, folders and hub datasets → examples, lazily. Every error says file and line."""

import difflib
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lamina.data.files import READERS, Row, read_rows
from lamina.data.forms import KNOWN, Example, Message, example
from lamina.data.problems import Problems
from lamina.errors import DataError, first_line
from lamina.section import section

__all__ = ["DataSettings", "Example", "Message", "read_examples"]

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?")
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation",
           "dev": "validation", "eval": "validation"}  # fmt: skip
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@section
class DataSettings:
    """What is learnt from: the examples, how they are written as tokens, and which tokens count."""

    data: Annotated[str, Field(min_length=1)]
    """Examples to learn from: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder of them, or a hub dataset
    (owner/name, or owner/name:configuration). A .txt file holds one example per paragraph."""
    data_revision: str | None = None
    """Commit, tag or branch of a hub dataset; unset: the newest."""
    split: str = "train"
    """Part of a hub dataset or of a folder (by file names) that is trained on."""
    eval_data: Annotated[str, Field(min_length=1)] | None = None
    """Held-out examples, written as `data` is; unset: a share of the data is held out."""
    eval_split: str = "test"
    """Part of a hub dataset or of a folder that `eval_data` names."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the distinct rows that is held out, chosen by seed and content; 0 holds nothing out."""
    template: str | None = None
    """Chat template: llama2, chatml, alpaca, vicuna, or a .jinja file; unset: the tokenizer's, else llama2."""
    system_prompt: str | None = None
    """System prompt for conversations that bring none."""
    train_on: Literal["answers", "everything"] = "answers"
    """Tokens that count in the loss: answers with their end token, or everything. Plain text counts in full."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Longest example, in tokens; unset: 2048, or the model's context if that is shorter."""
    long: Literal["drop", "truncate", "split"] = "truncate"
    """What becomes of longer examples: left out, cut at the end, or cut into pieces without common context."""
    read_ahead: Annotated[int, Field(ge=1)] = 1024
    """Rows that are read and tokenised together; memory and speed depend on it, results do not."""


def read_examples(data: str | Path, *, split: str = "train", revision: str | None = None) -> Iterator[Example]:
    """Reads examples one by one, in the order of the file; of a folder's files by name, numbered on.

    Args:
        data: a file, a folder, or a hub dataset (``owner/name`` or ``owner/name:configuration``).
        split: part of a hub dataset, or of a folder whose file names tell parts (``train.jsonl``).
        revision: commit, tag or branch of a hub dataset.

    Raises:
        DataError: the data cannot be found or read; or, after the last row, all rows that no form fits.
    """
    return examples_in(str(data), split, revision, Problems())


def examples_in(data: str, split: str, revision: str | None, problems: Problems) -> Iterator[Example]:
    """What ``read_examples`` yields; ``problems`` takes what is wrong with single rows."""
    for row in _rows(data, split, revision, problems):
        try:
            yield example(row.value, row.number)
        except DataError as error:
            problems.add(row.place, str(error), KNOWN if "no known form" in str(error) else "")
    problems.check()


def _rows(data: str, split: str, revision: str | None, problems: Problems) -> Iterator[Row]:
    path = Path(data).expanduser()
    if data and path.is_dir():
        before = last = 0
        for file in _files(path, split):
            for row in read_rows(file, problems):
                last = before + row.number
                yield row._replace(number=last)
            before = last
    elif data and path.exists():
        yield from read_rows(path, problems)
    else:
        match = None if _looks_local(data) else _HUB_ID.fullmatch(data)
        if match is None:
            raise DataError(_missing(data))
        yield from _hub_rows(match["name"], match["config"], split, revision)


def _looks_local(data: str) -> bool:
    """Whether a name means a file: by its beginning, its suffix, or a folder that is there."""
    parent = Path(data).expanduser().parent
    return data[:1] in ("", ".", "/", "~") or Path(data).suffix.lower() in READERS or (
        parent != Path(".") and parent.is_dir()
    )  # fmt: skip


def _missing(data: str) -> str:
    if not data:
        return "data: nothing is named, expected a file, a folder or a hub dataset (owner/name)"
    path = Path(data).expanduser()
    if not path.parent.is_dir():
        return f"{data}: no such file; its folder {path.parent} is not there either"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)  # suffixes alone are alike
    advice = (
        f"did you mean {path.parent / near[0]}?" if near else "expected a file, a folder or a hub dataset (owner/name)"
    )
    return f"{data}: no such file; {advice}"


def left_out(data: str, split: str) -> tuple[str, ...]:
    """The data files of a folder that are not read, though their names tell no other split: some of its .txt files too."""
    folder = Path(data).expanduser()
    if not (data and folder.is_dir()):
        return ()
    chosen = set(_files(folder, split))
    others = (path for path in _found(folder) if path not in chosen)
    wanted = ("", _SPLITS.get(split, split))
    return tuple(str(path) for path in others if _part(path.relative_to(folder)) in wanted)


def _found(folder: Path) -> list[Path]:
    """All data files in a folder."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in READERS and path.is_file() and path.name not in _NOT_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]  # fmt: skip


def _files(folder: Path, split: str) -> list[Path]:
    """The data files in a folder: those of the split where names tell splits, .txt only where there is nothing else."""
    found = _found(folder)
    found = [path for path in found if path.suffix.lower() != ".txt"] or found
    if not found:
        raise DataError(f"{folder}: no data in this folder, expected files of {', '.join(READERS)}")
    parts = {path: _part(path.relative_to(folder)) for path in found}
    if not any(parts.values()):
        return found
    chosen = [path for path in found if parts[path] == _SPLITS.get(split, split)]
    if not chosen:
        known = ", ".join(sorted({part for part in parts.values() if part}))
        raise DataError(f"{folder}: no files of the split {split!r}, found {known}")
    return chosen


def _part(path: Path) -> str:
    """The split that a file's name or folder tells, or nothing."""
    words = re.split(r"[^a-z]+", "/".join((*path.parts[:-1], path.stem)).lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def _hub_rows(name: str, config: str | None, split: str, revision: str | None) -> Iterator[Row]:
    """The rows of a hub dataset, streamed."""
    import datasets  # type: ignore[import-untyped]
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # of its HTTP library

    found = 0
    try:
        with suppress(HfHubHTTPError):  # answers are told below; where there is none, datasets would try for 30 s
            HfApi().dataset_info(name, revision=revision)
        rows: Any = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        for found, value in enumerate(rows, 1):
            yield Row(found, f"{name} ({split}): row {found}", value)
    except datasets.exceptions.DatasetNotFoundError:
        wanted = f"revision {revision!r} of this dataset" if revision else "such dataset"
        raise DataError(
            f"{name}: no {wanted} on the hub and no such file here; a private or gated one needs: hf auth login"
        ) from None
    except (OSError, HTTPError) as error:  # ConnectionError is an OSError
        raise DataError(
            f"{name}: the hub cannot be reached ({first_line(error)}); name a local file as data, or run again online"
        ) from None
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: cannot be read from the hub ({first_line(error)})") from None
    if not found:
        raise DataError(f"{name} ({split}): the dataset is empty, expected at least one row")
