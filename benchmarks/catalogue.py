"""The arms: each tool at its default and at its best, and how much of each is measured.

A peer's best is swept, not guessed: without recomputation, base and adapter in bf16 without autocast, and the step's rows padded to one
rectangle, one by one without any padding (``-single``), or packed into one row, where the tool can (``-packed``). All of these are arms; a
claim compares with the fastest of them. On a GPU a step has 32 rows, and its arms are others (``ON_GPU``): 32 rows of a 7B do not fit
beside it without recomputation, so the peers pad eight at one time, next to each other by length, and PEFT sixteen too.
"""

from dataclasses import dataclass, field
from typing import Any

from rows import BATCH

LAMINA, BOUND, REFERENCE = "lamina", "bare-gemms", "peft"


@dataclass(frozen=True, eq=False)
class Arm:
    """One tool with one choice of settings on one workload.

    Attributes:
        program: the file in ``arms/``; environment: where it runs, "" for Lamina's own.
        slow: runs fewer steps and rounds, and to no loss; extra: takes part in a full run only; asked: only where it is named.
        own_weights: weighs the step's tokens in another way than all others, by its recipe; its losses are compared with nothing.
    """

    name: str
    program: str
    settings: dict[str, Any] = field(default_factory=dict)
    workload: str = "whole"
    slow: bool = False
    extra: bool = False
    asked: bool = False
    environment: str = ""
    own_weights: bool = False

    @property
    def base(self) -> str:
        """The form of the base; arms are compared with those of the same form."""
        return str(self.settings.get("base", "bf16"))

    @property
    def tool(self) -> str:
        """The name without the form of the base."""
        return self.name.removesuffix(f"-{self.base}")

    @property
    def contest(self) -> tuple[str, str, str]:
        """What it is a form of: forms of one tool on one workload, over one form of the base, are measured against each other."""
        return self.name.partition("-")[0], self.workload, self.base

    @property
    def label(self) -> str:
        return self.name if self.workload == "whole" else f"{self.name}, {self.workload}"

    @property
    def bound(self) -> bool:
        """Whether it is no tool but the bare matrix products."""
        return self.name == BOUND


TRL_BEST = {
    "adapter": "bf16",
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": None,
}  # by itself it cuts at 1,024
PEFT_BEST = {"adapter": "bf16"}
LITGPT_BEST = {"precision": "bf16-true"}
TUNE_BEST = {"checkpointing": False}
FACTORY_BEST = {"disable_gradient_checkpointing": True}  # it refuses pure_bf16 on a CPU
PEFT, LITGPT, TORCHTUNE, FACTORY = "peft", "litgpt", "torchtune", "llamafactory"
_P: dict[str, Any] = {"environment": PEFT}
_LITGPT: dict[str, Any] = {"program": "litgpt_arm", "environment": LITGPT}
_TUNE: dict[str, Any] = {"program": "torchtune_arm", "environment": TORCHTUNE}
_FACTORY: dict[str, Any] = {"program": "llamafactory_arm", "environment": FACTORY}


def forms(workload: str) -> tuple[Arm, ...]:
    """The bound, and each tool with the step's rows padded to one rectangle and one by one; a short run leaves out what was slower."""
    at, single, all_rows = {"workload": workload}, {"micro": 1}, {"micro": BATCH[workload]}
    padded = [
        Arm(BOUND, "bare_gemms", **at),
        Arm(LAMINA, "lamina_arm", **at),
        Arm("peft", "peft_loop", PEFT_BEST, **_P, **at),
        Arm("trl-padded", "trl_sft", TRL_BEST, **_P, **at, extra=True),
        Arm("litgpt-padded", settings=LITGPT_BEST | all_rows, **_LITGPT, **at, extra=True),
        Arm("torchtune-padded", settings=TUNE_BEST | all_rows, **_TUNE, **at, extra=True),
        Arm("llamafactory-padded", settings=FACTORY_BEST, **_FACTORY, **at, extra=True),
    ]
    one_by_one = [
        Arm("peft-single", "peft_loop", PEFT_BEST | single, **_P, **at),
        Arm("trl-single", "trl_sft", TRL_BEST | single, **_P, **at),
        Arm("litgpt-single", settings=LITGPT_BEST | single, **_LITGPT, **at),
        Arm("torchtune-single", settings=TUNE_BEST | single, **_TUNE, **at, extra=True),
        Arm("llamafactory-single", settings=FACTORY_BEST | single, **_FACTORY, **at, extra=True),
    ]
    return (*padded, *(one_by_one if workload != "long" else ()))  # which has one row a step


ARMS = (
    *forms("whole"),
    Arm("trl-padding-free", "trl_sft", TRL_BEST | {"padding_free": True}, **_P, extra=True),
    Arm("torchtune-packed", settings=TUNE_BEST | {"packed": True}, **_TUNE, extra=True),
    Arm("llamafactory-packed", settings=FACTORY_BEST | {"packed": True}, **_FACTORY, extra=True),
    Arm("peft-mixed", "peft_loop", {"adapter": "fp32", "autocast": True}, **_P, asked=True),
    Arm("trl-mixed", "trl_sft", {"gradient_checkpointing": False}, **_P, asked=True),
    Arm("trl-default", "trl_sft", **_P, slow=True, extra=True),
    Arm("litgpt-default", settings={"weighting": "rows"}, **_LITGPT, slow=True, extra=True, own_weights=True),
    Arm("torchtune-default", **_TUNE, slow=True, extra=True),
    Arm("llamafactory-default", **_FACTORY, slow=True, extra=True),
    Arm("lamina-nf4", "lamina_arm", {"base": "nf4"}, asked=True),
    Arm("peft-nf4", "peft_loop", PEFT_BEST | {"base": "nf4"}, **_P, asked=True),
    Arm("peft-single-nf4", "peft_loop", PEFT_BEST | {"base": "nf4", "micro": 1}, **_P, asked=True),
    Arm("lamina-int8", "lamina_arm", {"base": "int8"}, extra=True),
    Arm("peft-int8", "peft_loop", PEFT_BEST | {"base": "int8"}, **_P, asked=True),
    *forms("answers"),
    *forms("templated"),
    *forms("dense"),
    *forms("long"),
)


def on_gpu(workload: str) -> tuple[Arm, ...]:
    """Each tool as it is fastest on a GPU, in the order in which a run that is short of time is to measure them.

    torchtune packs rows up to as many tokens as Lamina does, and is compiled as its recipe offers; the others lose by ``torch.compile``
    where lengths change, or have none.
    """
    at, some = {"workload": workload}, {"micro": 8}
    once, packed = {"slow": True, **at}, {"packed": _LARGE["micro_batch_tokens"], "compile": True}
    return (
        Arm(BOUND, "bare_gemms", **at),
        Arm(LAMINA, "lamina_arm", _LARGE, **at),
        Arm("peft", "peft_loop", PEFT_BEST | some, **_P, **at),
        Arm("peft-sixteen", "peft_loop", PEFT_BEST | {"micro": 16}, **_P, **at),
        Arm("torchtune-packed", settings=TUNE_BEST | packed, **_TUNE, **at),
        Arm("lamina-fp8", "lamina_arm", {"base": "fp8"} | _LARGE, **at),
        Arm("lamina-nf4", "lamina_arm", {"base": "nf4"} | _LARGE, **once),
        Arm("peft-nf4", "peft_loop", PEFT_BEST | {"base": "nf4"} | some, **_P, **once),
        Arm("trl-padded", "trl_sft", TRL_BEST | some, **_P, **once),
        Arm("litgpt-padded", settings=LITGPT_BEST | some, **_LITGPT, **once),
        Arm("torchtune-padded", settings=TUNE_BEST | some, **_TUNE, **once),
        Arm("unsloth", "unsloth_arm", some, environment="unsloth", **once),
    )


_LARGE = {"micro_batch_tokens": 8192}  # the plan's choice, which this arm does not ask, is as large as the memory
ON_GPU = tuple(arm for workload in ("whole", "answers") for arm in on_gpu(workload))


@dataclass(frozen=True)
class Extent:
    """How much is measured: rounds, steps in each, and steps and rounds of the way to the held-out loss."""

    rounds: int
    warmup: int
    steps: int
    slow_rounds: int
    slow_steps: int
    loss_steps: int
    loss_rounds: int
    slow_warmup: int = 1

    def of(self, arm: Arm, round_: int) -> tuple[int, int]:
        """Warm-up and counted steps of an arm in a round; (0, 0) where it does not take part."""
        if arm.slow:
            return (self.slow_warmup, self.slow_steps) if round_ < self.slow_rounds else (0, 0)
        return self.warmup, self.steps


FULL = Extent(rounds=3, warmup=1, steps=5, slow_rounds=1, slow_steps=2, loss_steps=5, loss_rounds=1)
QUICK = Extent(rounds=2, warmup=1, steps=2, slow_rounds=1, slow_steps=1, loss_steps=2, loss_rounds=1)
GPU = Extent(rounds=2, warmup=2, steps=5, slow_rounds=1, slow_steps=5, loss_steps=0, loss_rounds=0, slow_warmup=2)
SMOKE = Extent(rounds=1, warmup=1, steps=2, slow_rounds=1, slow_steps=1, loss_steps=2, loss_rounds=1)


def chosen(names: str | None, workloads: str, quick: bool, arms: tuple[Arm, ...] = ARMS) -> list[Arm]:
    """The arms of a run: by name, where names are given; else all that need not be named, without the extra ones in a short run.

    Raises:
        SystemExit: a name that no arm has, or a workload that there is none of.
    """
    asked = names.split(",") if names else None
    over = workloads.split(",")
    for kind, known, given in (
        ("arm", {arm.name for arm in arms}, asked or []),
        ("workload", {arm.workload for arm in arms}, [] if workloads == "all" else over),
    ):
        if unknown := [name for name in given if name not in known]:
            raise SystemExit(f"no {kind} is called {unknown[0]!r}, expected some of: {', '.join(sorted(known))}")
    there = [arm for arm in arms if workloads == "all" or arm.workload in over]
    if asked:
        return [arm for arm in there if arm.name in asked]
    return [arm for arm in there if not (arm.asked or (quick and arm.extra))]
