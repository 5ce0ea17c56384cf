"""What the page needs of the files of a run, as models that check it and ignore the rest.

A field with a default may be absent: an earlier version did not write it, or it was not measured.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

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


class Time(_Part):
    """Seconds of training, as planned for the tokens that were trained on and as measured."""

    planned_seconds: float
    measured_seconds: float


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
    counted: Literal["answer tokens", "tokens"] | None = None
    memory: Memory | None = None
    time: Time | None = None
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
