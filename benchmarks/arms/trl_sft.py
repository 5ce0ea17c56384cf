"""TRL's SFTTrainer with a PEFT adapter. ``settings`` go to SFTConfig; without any they are TRL's defaults."""

import tempfile
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from common import IGNORED, Job, Record, peft_parameters
from peft_loop import load
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Timed(trl.SFTTrainer):
    """SFTTrainer with the loss and the counts of a step kept for the record."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any, **more: Any) -> Tensor:
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        supervised = int((inputs["labels"][:, 1:] != IGNORED).sum())
        loss = super().training_step(model, inputs, *rest, **more)
        self.seen = loss.item(), tokens, supervised
        return loss


class Clock(TrainerCallback):
    """Starts the clock at the first step; each step ends where the next begins, so loading batches counts."""

    def __init__(self, record: Record) -> None:
        self.record, self.trainer = record, None

    def on_step_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        if state.global_step == 0:
            self.record.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.record.end(*self.trainer.seen)


def main() -> None:
    job = Job.read()
    settings = {key: value for key, value in job.settings.items() if key != "adapter"}
    if job.precision == "fp32":
        settings["bf16"] = False
    model = load(job)
    named = peft_parameters(model)
    record = Record(job, named)
    clock = Clock(record)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=job.batch,
            gradient_accumulation_steps=1,
            max_steps=job.warmup + job.steps,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=job.clip,
            train_sampling_strategy="sequential",  # the same rows in the same step as everybody
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        clock.trainer = Timed(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(job.examples()),
            processing_class=AutoTokenizer.from_pretrained(job.model),
            callbacks=[clock],
        )
        clock.trainer.train()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)}
    record.write(**versions)


if __name__ == "__main__":
    main()
