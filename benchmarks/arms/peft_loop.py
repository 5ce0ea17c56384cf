"""A plain loop with transformers and PEFT, as a careful person would write it: padding to the longest row of the micro-batch.

``micro`` rows are computed at one time, all of the step's where it is not given; losses are summed and divided once, so the size
of a micro-batch changes nothing but padding, memory and speed. With one row there is no padding.
"""

from importlib.metadata import version

import peft
import torch
import transformers
from common import IGNORED, Job, Record, length, peft_parameters, supervised
from torch import Tensor


def load(job: Job) -> peft.PeftModel:
    """The base with the adapter that all arms begin with; settings["adapter"] is the precision of A and B, settings["base"] the
    form in which bitsandbytes keeps the base's linears."""
    how = {"dtype": job.dtype, "attn_implementation": "sdpa"}
    if job.device != "cpu":
        how["device_map"] = {"": 0}
    if base := job.settings.get("base"):
        how |= {"quantization_config": quantised(base, job.dtype), "device_map": how.get("device_map", job.device)}
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, **how)
    wide = job.settings.get("adapter", "fp32") == "fp32"
    model = peft.PeftModel.from_pretrained(model, job.adapter, is_trainable=True, autocast_adapter_dtype=wide)
    return model if base else model.to(job.device)


def quantised(base: str, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """bitsandbytes' settings for QLoRA, or for its eight bits."""
    if base == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=base, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def pad(rows: list[dict[str, list[int]]], device: str) -> dict[str, Tensor]:
    """Some rows as one rectangle."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows], device=device)

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": column("input_ids", 0),
        "labels": column("labels", IGNORED),
        "attention_mask": torch.tensor(mask, device=device),
    }


def versions(job: Job) -> dict[str, str]:
    """Of what the loop is made of."""
    names = ["transformers", "peft", *(["bitsandbytes"] if job.settings.get("base") else [])]
    return {name: version(name) for name in names}


def main() -> None:
    job = Job.read()
    model = load(job)
    model.train()
    named = peft_parameters(model)
    optimizer = torch.optim.AdamW(named.values(), lr=job.learning_rate, weight_decay=0.0, fused=True)

    def logits(tokens: Tensor) -> Tensor:
        with job.mixed():
            return model(input_ids=tokens, use_cache=False).logits

    record, micro = Record(job, named, logits, versions(job)), job.settings.get("micro", job.batch)
    for rows in job.batches():
        record.begin()
        targets, losses = supervised(rows), []
        for first in range(0, len(rows), micro):
            batch = pad(rows[first : first + micro], job.device)
            with job.mixed():
                loss = model(**batch, use_cache=False, num_items_in_batch=targets).loss
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(named.values(), job.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.end(torch.stack(losses).sum().item(), length(rows), targets)
    record.write()


if __name__ == "__main__":
    main()
