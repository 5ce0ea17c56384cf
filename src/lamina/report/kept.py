"""What a run's folder holds, read for its page: every file checked as it is read, and any of them may be absent.

The files were written by Lamina, perhaps by another version, perhaps cut short by a full disk, and hold text of data sets and
models. So each is read into a model that names what is needed of it and ignores the rest: a chapter can rely on
what it is given, and what does not fit is one line that names the file and the place.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lamina.errors import CheckpointError
from lamina.report.record import read_metrics

T = TypeVar("T")
Interval = tuple[float, float] | None
Change = tuple[float, float | None, float | None]
"""Adapter minus base, and the ends of its 95 % interval."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Step(_Part):
    """A step in ``metrics.jsonl``."""

    step: int
    loss: float
    tokens: int
    supervised_tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float


class Evaluation(_Part):
    """An evaluation in ``metrics.jsonl``; step 0 is the base."""

    step: int
    eval_loss: float
    eval_tokens: int


class HeldOut(_Part):
    """Loss and perplexity of some text."""

    loss: float
    perplexity: float
    accuracy: float | None = None
    tokens: int = 0
    intervals: dict[str, Interval] = {}


class Answer(_Part):
    """A held-out prompt and an answer to it; of a sample, at a step."""

    row: int
    prompt: str
    reference: str
    answer: str
    stopped: bool
    step: int = 0


class Answers(_Part):
    """Measures of answers, and the answers."""

    exact_match: float | None = None
    stop_rate: float | None = None
    mean_tokens: float | None = None
    intervals: dict[str, Interval] = {}
    rows: list[Answer] = []


class Side(_Part):
    """The card's side of base or adapter."""

    held_out: HeldOut | None = None
    answers: Answers | None = None
    neutral: HeldOut | None = None


class Kl(_Part):
    """KL(base‖adapter) in nats per token."""

    mean: float
    interval: Interval = None
    tokens: int = 0


class Token(_Part):
    """A token of a held-out row, its loss without and with the adapter in nats; None where nothing was to be learnt."""

    text: str
    trained: bool = True
    before: float | None = None
    after: float | None = None
    count: int = 1


class LearntRow(_Part):
    """A held-out row token by token."""

    row: int
    tokens: list[Token]


class Learnt(_Part):
    """Which tokens were learnt."""

    rows: list[LearntRow] = []
    most: list[Token] = []
    least: list[Token] = []


class Dose(_Part):
    """Losses at scales of the adapter."""

    scales: list[float]
    task: list[float | None]
    neutral: list[float | None] | None = None
    knee: float | None = None
    rows: int = 0


class Plan(_Part):
    """The memory plan, in bytes."""

    total_bytes: int
    items: dict[str, int]
    moment: str = ""
    device: str = ""
    seconds: float = 0.0


class Memory(_Part):
    """The plan beside the measured peak."""

    planned: Plan
    measured_bytes: int


class Card(_Part):
    """``card.json``."""

    job: str = ""
    model: str = ""
    adapter_parameters: int = 0
    steps: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    training_seconds: float = 0.0
    versions: dict[str, str] = {}
    device: str = ""
    base: Side
    adapter: Side
    difference: dict[str, Change] = {}
    kl: dict[str, Kl | None] | None = None
    learnt: Learnt | None = None
    dose: Dose | None = None
    memory: Memory | None = None
    seconds: dict[str, float] = {}
    ledger_notes: list[str] = []


class Relation(_Part):
    """A matrix's update beside its weights."""

    relative: float | None = None


class Matrix(_Part):
    """A matrix of ``explanation.json``."""

    name: str
    layer: str
    module: str
    rank: int
    norm: float
    effective_rank: float
    singular_values: list[float]
    relation: Relation | None = None


class Energy(_Part):
    """Share of ‖ΔW‖² in the best approximation of a rank."""

    rank: int
    share: float


class RankLoss(_Part):
    """Held-out loss of the adapter truncated to a rank."""

    rank: int
    loss: float


class Ranks(_Part):
    """The losses of lower ranks."""

    base_loss: float
    adapter_loss: float
    truncated: list[RankLoss]
    enough: int | None = None
    rows: int = 0
    held_out_rows: int = 0


class Cell(_Part):
    """A cell of the map layer × module."""

    layer: str
    module: str
    norm: float
    relative: float | None = None
    effective_rank: float


class Shares(_Part):
    """Shares of ‖ΔW‖²."""

    module: dict[str, float]
    layer: dict[str, float]


class Explanation(_Part):
    """``explanation.json``."""

    rank: int
    changes_nothing: bool
    norm: float
    shares: Shares
    energy: list[Energy]
    map: list[Cell]
    matrices: list[Matrix]
    ranks: Ranks | None = None
    not_measured: str | None = None


class Finding(_Part):
    """A finding of the doctor."""

    rule: str
    grade: str
    found: str
    why: str = ""
    mend: str = ""
    rows: list[int] = []


class Check(_Part):
    """``check.json``."""

    findings: list[Finding]


@dataclass(frozen=True)
class Ledger:
    """``ledger.parquet``: norms of every matrix after every step, as matrices [steps, matrices]."""

    steps: list[int]
    places: list[tuple[int, str]]
    update_norm: NDArray[np.float64]
    relative: NDArray[np.float64]


@dataclass(frozen=True)
class Kept:
    """A run's folder; what is absent is None or empty."""

    folder: Path
    job: str
    steps: list[Step]
    evaluations: list[Evaluation]
    card: Card | None
    explanation: Explanation | None
    check: Check | None
    ledger: Ledger | None
    samples: list[Answer]


def read_kept(folder: Path) -> Kept:
    """Reads a run's folder.

    Raises:
        CheckpointError: it is not a run's, or one of its files is damaged.
    """
    if not (folder / "job.toml").is_file():
        raise CheckpointError(f"{folder}: found no job.toml, expected the folder of a run")
    records = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    metrics = folder / "metrics.jsonl"
    return Kept(
        folder=folder,
        job=_text(folder / "job.toml"),
        steps=_fit(list[Step], [record for record in records if "loss" in record], metrics),
        evaluations=_fit(list[Evaluation], [record for record in records if "eval_loss" in record], metrics),
        card=_json(Card, folder / "card.json"),
        explanation=_json(Explanation, folder / "explanation.json"),
        check=_json(Check, folder / "check.json"),
        ledger=_ledger(folder / "ledger.parquet"),
        samples=_lines(folder / "samples.jsonl"),
    )


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


def _ledger(path: Path) -> Ledger | None:
    if not path.is_file():
        return None
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    names = ["step", "layer", "module", "update_norm", "relative"]
    try:
        table = pyarrow.parquet.read_table(path, columns=names)
        step, layer, module, norm, relative = (table.column(name).to_numpy(zero_copy_only=False) for name in names)
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise _damaged(path, str(error)) from None
    places = list(dict.fromkeys(zip(layer.tolist(), module.tolist(), strict=True)))
    steps = list(dict.fromkeys(step.tolist()))
    if not steps:
        return None
    if len(step) != len(steps) * len(places):
        raise _damaged(path, f"{len(step)} rows, expected {len(steps)} steps of {len(places)} matrices")
    shape = (len(steps), len(places))
    return Ledger(steps, places, norm.astype(np.float64).reshape(shape), relative.astype(np.float64).reshape(shape))


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({why}); remove it and the page is written without it, or write it anew"
    )
