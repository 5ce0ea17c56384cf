"""TRL's SFTTrainer with a PEFT adapter. ``settings`` go to SFTConfig; without any they are TRL's defaults."""

import tempfile
from importlib.metadata import version

import datasets
import trl
from common import Job, Record, peft_parameters
from peft_loop import load
from trainer import Clock, timed
from transformers import AutoTokenizer


def main() -> None:
    job = Job.read()
    settings = {key: value for key, value in job.settings.items() if key != "adapter"}
    if job.precision == "fp32":
        settings["bf16"] = False
    micro = settings.pop("micro", job.batch)
    model = load(job)
    packages = {name: version(name) for name in ("transformers", "peft", "trl")}
    record = Record(
        job, peft_parameters(model), lambda tokens: model(input_ids=tokens, use_cache=False).logits, packages
    )
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder,
            use_cpu=job.device == "cpu",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=job.batch // micro,
            max_steps=job.all_steps,
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
        clock = Clock(record)
        timed(trl.SFTTrainer, clock)(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(job.examples()),
            processing_class=AutoTokenizer.from_pretrained(job.model),
            callbacks=[clock],
        ).train()
    record.write()


if __name__ == "__main__":
    main()
