"""A plain loop with transformers and PEFT, as a careful person would write it: padding to the longest row of the step."""

import contextlib
from importlib.metadata import version

import peft
import torch
import transformers
from common import IGNORED, Job, Record, peft_parameters
from torch import Tensor


def load(job: Job) -> peft.PeftModel:
    """The base with the adapter that all arms begin with; settings["adapter"] is the precision of A and B, settings["base"] the
    form in which bitsandbytes keeps the base's linears."""
    how = {"dtype": job.dtype, "attn_implementation": "sdpa"}
    if base := job.settings.get("base"):
        how |= {"quantization_config": quantised(base, job.dtype), "device_map": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, **how)
    wide = job.settings.get("adapter", "fp32") == "fp32"
    return peft.PeftModel.from_pretrained(model, job.adapter, is_trainable=True, autocast_adapter_dtype=wide)


def quantised(base: str, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """bitsandbytes' settings for QLoRA, or for its eight bits."""
    if base == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=base, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A step's rows as one rectangle."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": column("input_ids", 0),
        "labels": column("labels", IGNORED),
        "attention_mask": torch.tensor(mask),
    }


def main() -> None:
    job = Job.read()
    model = load(job)
    model.train()
    named = peft_parameters(model)
    optimizer = torch.optim.AdamW(named.values(), lr=job.learning_rate, weight_decay=0.0, fused=True)
    mixed = torch.autocast("cpu", torch.bfloat16) if job.settings.get("autocast") else contextlib.nullcontext()
    rows, record = job.examples(), Record(job, named)
    for first in range(0, len(rows), job.batch):
        record.begin()
        batch = pad(rows[first : first + job.batch])
        with mixed:
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), job.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.end(loss.item(), int(batch["attention_mask"].sum()), int((batch["labels"][:, 1:] != IGNORED).sum()))
    record.write(
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
        **({"bitsandbytes": version("bitsandbytes")} if job.settings.get("base") else {}),
    )


if __name__ == "__main__":
    main()
