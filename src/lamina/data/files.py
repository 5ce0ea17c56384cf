"""Files → rows, one at a time: JSON lines, JSON, CSV, Parquet and plain text, each row with its number and its place.

Everything streams but a JSON array, which is held as text. Text files are UTF-8, with or without a byte order mark, or
UTF-16 with one. The number of a row is its line in JSON lines and its count from 1 elsewhere.
"""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lamina.data.forms import COLUMNS
from lamina.data.problems import Problems
from lamina.errors import DataError, first_line

BATCH = 1024
"""Rows that are read from Parquet at once."""


class Row(NamedTuple):
    """One row as its file holds it."""

    number: int
    place: str
    value: Any


def read_rows(path: Path, problems: Problems) -> Iterator[Row]:
    """Reads the rows of one file, in order.

    Args:
        problems: takes what is wrong with single rows; reading goes on after them.

    Raises:
        DataError: the file as a whole cannot be read: its name, its encoding, its syntax, or no rows.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: the suffix {path.suffix!r} is not known, expected one of {', '.join(READERS)}")
    empty, known = True, problems.count
    try:
        for row in reader(path, problems):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None
    problems.check()
    if empty and problems.count == known:
        raise DataError(f"{path}: the file is empty, expected at least one row")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their endings, ``\\n`` or ``\\r\\n``."""
    with path.open("rb") as file:
        mark = file.read(2)
        if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            yield from _lines_utf16(path)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
            except UnicodeDecodeError as error:
                found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
                raise DataError(f"{path}:{number}: not UTF-8 text ({found}); save the file as UTF-8") from None


def _lines_utf16(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open(encoding="utf-16", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except UnicodeError as error:
        raise DataError(f"{path}:{number + 1}: not UTF-16 text ({error}); save the file as UTF-8") from None


def _json(path: Path, problems: Problems) -> Iterator[Row]:
    """JSON lines, an array of rows, or objects one after another: told from the beginning, not from the suffix."""
    lines = _lines(path)
    for number, line in lines:
        if not line.strip():
            continue
        if _is_value(line) and not line.lstrip().startswith("["):
            yield Row(number, f"{path}:{number}", json.loads(line))
            yield from _json_lines(path, lines, problems)
        elif line.lstrip().startswith("[") or path.suffix.lower() == ".json":
            yield from _json_text(path, "\n" * (number - 1) + line + "".join(rest for _, rest in lines))
        else:
            yield from _json_lines(path, iter([(number, line)]), problems)
            yield from _json_lines(path, lines, problems)


def _is_value(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(path: Path, lines: Iterator[tuple[int, str]], problems: Problems) -> Iterator[Row]:
    for number, line in lines:
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            problems.add(place, _broken(error))
        except (ValueError, RecursionError) as error:
            problems.add(place, f"JSON that cannot be read ({error})")
        else:
            yield Row(number, place, value)


def _broken(error: json.JSONDecodeError) -> str:
    return f"broken JSON ({error.msg.removesuffix(' at')} at column {error.colno})"  # some of Python's messages end so


def _json_text(path: Path, text: str) -> Iterator[Row]:
    """The elements of an array, or objects one after another, each with the line on which it begins."""
    decode = json.JSONDecoder().raw_decode
    count, line, seen, position = 0, 1, 0, _space(text, 0)
    array = text[position] == "["
    position = _space(text, position + 1) if array else position
    while position < len(text) and not (array and text[position] == "]"):
        line, seen = line + text.count("\n", seen, position), position
        try:
            value, end = decode(text, position)
            end = _space(text, end)
            if array and text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
        except json.JSONDecodeError as error:
            where = f"{path}:{error.lineno}"
            raise DataError(f"{where}: {_broken(error)}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: JSON that cannot be read ({error})") from None
        count, position = count + 1, _space(text, end + 1) if text[end : end + 1] == "," else end
        yield Row(count, f"{path}:{line}", value)
    if not array:
        return
    if text[position : position + 1] != "]":
        raise DataError(f"{path}: broken JSON (the list is not closed by ']'); is the file complete?")
    if (more := _space(text, position + 1)) < len(text):
        line = text.count("\n", 0, more) + 1
        raise DataError(
            f"{path}:{line}: broken JSON (more stands after the list's ']'); expected one list, or a row on each line"
        )


def _space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv(path: Path, problems: Problems) -> Iterator[Row]:
    """A table with a head line; the separator is a tab in .tsv, and a semicolon where the head holds no comma."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts beyond 128 KiB
    lines = (line for _, line in _lines(path))
    head = next(lines, "")
    separator = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in head and "," not in head else ","
    reader = csv.reader((line for part in ([head], lines) for line in part), delimiter=separator, strict=True)
    count, start = 0, 1
    names: list[str] = []
    try:
        for cells in reader:
            place, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = [name.strip() for name in cells]
                continue
            count += 1
            if len(cells) == len(names):
                yield Row(count, place, dict(zip(names, cells, strict=True)))
            else:
                problems.add(place, f"{len(cells)} fields, expected {len(names)}: {', '.join(names)}")
    except csv.Error as error:
        raise DataError(f"{path}:{start}: broken CSV ({error})") from None


def _parquet(path: Path, problems: Problems) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            known = [name for name in names if name in COLUMNS] or names
            others = dict.fromkeys(name for name in names if name not in known)
            count = 0
            for batch in file.iter_batches(BATCH, columns=known):
                for value in batch.to_pylist():
                    count += 1
                    yield Row(count, f"{path}: row {count}", value | others)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({first_line(error)})") from None


def _text(path: Path, problems: Problems) -> Iterator[Row]:
    """Paragraphs, which end at a blank line; the lines, where no blank line stands between two of them."""
    paragraphs = _parted(path)
    count, start = 0, 0
    held: list[str] = []
    for number, line in _lines(path):
        line = line.rstrip("\r\n")
        start = start if held else number
        if line.strip():
            held.append(line)
        if held and (not paragraphs or not line.strip()):
            count += 1
            yield Row(count, f"{path}:{start}", {"text": "\n".join(held)})
            held = []
    if held:
        yield Row(count + 1, f"{path}:{start}", {"text": "\n".join(held)})


def _parted(path: Path) -> bool:
    """Whether a blank line stands between two texts; those before the first and after the last part nothing."""
    begun = gap = False
    for _, line in _lines(path):
        if not line.strip():
            gap = begun
        elif gap:
            return True
        else:
            begun = True
    return False


READERS = {
    ".jsonl": _json, ".ndjson": _json, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _text,
}  # fmt: skip
