"""What the arms that are built on transformers' Trainer share: the clock, and the counts of a step."""

from typing import Any

import torch
from common import IGNORED, Record
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Clock(TrainerCallback):
    """Starts the clock at the first step; each step ends where the next begins, so loading batches counts."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.loss, self.tokens, self.supervised = 0.0, 0, 0

    def on_step_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        if state.global_step == 0:
            self.record.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.record.end(self.loss, self.tokens, self.supervised)
        self.loss, self.tokens, self.supervised = 0.0, 0, 0


def real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens that are no padding; rows packed into one have no mask, or one of pairs in which some token sees another (0)."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return int(inputs["input_ids"].numel())
    return int((mask > 0).sum() if mask.dim() == 2 else (mask == 0).any(-1).sum())


def timed(trainer: type[Trainer], clock: Clock) -> type[Trainer]:
    """A trainer that tells the clock the loss and the counts of each micro-batch."""

    class Timed(trainer):  # type: ignore[valid-type, misc]
        def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any, **more: Any) -> Tensor:
            clock.tokens += real_tokens(inputs)
            clock.supervised += int((inputs["labels"][:, 1:] != IGNORED).sum())
            loss: Tensor = super().training_step(model, inputs, *rest, **more)
            clock.loss += loss.item()
            return loss

    return Timed
