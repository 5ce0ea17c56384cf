"""LLaMA-Factory's own run (``llamafactory-cli train``) on tokens that lie ready: it takes a tokenised data set as it is.

``settings`` are its own names; without any it runs at its defaults (checkpointing on, A and B in fp32 under autocast). ``packed`` hands it
each step's rows in one row, numbered as its ``neat_packing`` numbers them; left to pack by itself it would mix the rows of different steps.
It imports torchaudio, whose published build needs CUDA's libraries: where that is absent an empty module stands in, for nothing is heard.
"""

import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
from common import IGNORED, Job, Record, Row, peft_parameters
from transformers import PreTrainedModel

if find_spec("torchaudio") is None:
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.train.sft import workflow
from llamafactory.train.tuner import run_exp
from trainer import Clock, timed

PACKAGES = ("llamafactory", "transformers", "peft")


class Attached(Clock):
    """A clock that begins with the model that the run has made."""

    def __init__(self, job: Job) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.job = job

    def on_train_begin(self, *_: Any, model: PreTrainedModel, **__: Any) -> None:
        if self.job.precision == "fp32":
            model.float()  # it trains in the checkpoint's dtype and has no setting for another
        packages = {name: version(name) for name in PACKAGES}
        named = peft_parameters(model)
        self.record = Record(self.job, named, lambda ids: model(input_ids=ids, use_cache=False).logits, packages)


def packed(rows: list[Row]) -> Row:
    """A step's rows as one, filled up to a multiple of eight tokens as its collation asks."""
    row = {
        "input_ids": list(chain.from_iterable(row["input_ids"] for row in rows)),
        "labels": list(chain.from_iterable([IGNORED, *row["labels"][1:]] for row in rows)),
        "attention_mask": [number for number, row in enumerate(rows, 1) for _ in row["input_ids"]],
        "position_ids": list(chain.from_iterable(range(len(row["input_ids"])) for row in rows)),
    }
    missing = -len(row["input_ids"]) % 8
    return {name: column + [IGNORED if name == "labels" else 0] * missing for name, column in row.items()}


def main() -> None:
    job = Job.read()
    settings = dict(job.settings)
    micro, pack = settings.pop("micro", job.batch), settings.pop("packed", False)
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in job.examples()]
    if pack:
        rows, micro, settings["neat_packing"] = [packed(step) for step in job.batches()], 1, True
    clock = Attached(job)
    workflow.CustomSeq2SeqTrainer = timed(workflow.CustomSeq2SeqTrainer, clock)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tokens)
        arguments = {
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "model_name_or_path": job.model,
            "adapter_name_or_path": job.adapter,
            "template": "llama2",
            "dataset": "tokens",  # named for its parser; what is read is the tokenised data set
            "tokenized_path": str(tokens),
            "output_dir": str(Path(folder) / "out"),
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": 1 if pack else job.batch // micro,
            "max_steps": job.all_steps,
            "learning_rate": job.learning_rate,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": job.clip,
            "bf16": job.precision == "bf16",
            "disable_shuffling": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": job.device == "cpu",
        }
        if job.precision == "fp32":
            settings |= {"pure_bf16": False, "bf16": False}
        run_exp(arguments | settings, callbacks=[clock])
    clock.record.write()


if __name__ == "__main__":
    main()
