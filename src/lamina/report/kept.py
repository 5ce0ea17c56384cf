"""What a run's folder holds, read for its page: every file checked as it is read, and any of them may be absent.

The files were written by Lamina, perhaps by another version, perhaps cut short by a full disk, and hold text of data sets and
models. So each is read into a model that names what is needed of it and ignores the rest: a chapter can rely on
what it is given, and what does not fit is one line that names the file and the place.
"""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lamina.errors import CheckpointError
from lamina.report.forms import Answer, Card, Check, Evaluation, Explanation, Step
from lamina.report.ledger import History, read_ledger
from lamina.report.record import read_metrics
from lamina.understand.card import ANSWERS, TOKENS

T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """A run's folder; what is absent is None or empty.

    Attributes:
        counted: what the losses are a mean of: "answer tokens", or "tokens" where whole rows were learnt; by the card, or by the
            job where the card is an older version's.
    """

    folder: Path
    job: str
    steps: list[Step]
    evaluations: list[Evaluation]
    card: Card | None
    explanation: Explanation | None
    check: Check | None
    ledger: History | None
    samples: list[Answer]
    counted: str = ANSWERS


def read_kept(folder: Path) -> Kept:
    """Reads a run's folder.

    Raises:
        CheckpointError: it is not a run's, or one of its files is damaged.
    """
    if not (folder / "job.toml").is_file():
        raise CheckpointError(f"{folder}: found no job.toml, expected the folder of a run")
    records = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    metrics = folder / "metrics.jsonl"
    job = _text(folder / "job.toml")
    counted, card = _counted(job, folder / "job.toml"), _json(Card, folder / "card.json")
    return Kept(
        folder=folder,
        job=job,
        steps=_fit(list[Step], [record for record in records if "loss" in record], metrics),
        evaluations=_fit(list[Evaluation], [record for record in records if "eval_loss" in record], metrics),
        card=card,
        explanation=_json(Explanation, folder / "explanation.json"),
        check=_json(Check, folder / "check.json"),
        ledger=read_ledger(folder),
        samples=_lines(folder / "samples.jsonl"),
        counted=counted if card is None or card.counted is None else card.counted,
    )


def _counted(job: str, path: Path) -> str:
    try:
        data = tomllib.loads(job).get("data")
    except tomllib.TOMLDecodeError as error:
        raise _damaged(path, str(error)) from None
    return TOKENS if isinstance(data, dict) and data.get("train_on") == "everything" else ANSWERS


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from None


def _json(kind: type[T], path: Path) -> T | None:
    if not path.is_file():
        return None
    try:
        found: T = _fit(kind, json.loads(_text(path)), path)
        return found
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _lines(path: Path) -> list[Answer]:
    if not path.is_file():
        return []
    whole = _text(path).split("\n")[:-1]  # a last line cut short by a kill is left out
    try:
        found: list[Answer] = _fit(list[Answer], [json.loads(line) for line in whole], path)
        return found
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _fit(kind: Any, value: Any, path: Path) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise _damaged(path, f"{where}: {first['msg']}") from None


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({why}); remove it and the page is written without it, or write it anew"
    )
