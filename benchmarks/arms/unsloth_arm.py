"""Unsloth's patched model, LoRA kernels and fused loss, in the loop of ``peft_loop``: padded rows, under autocast as in its trainer.

It needs a GPU to be imported at all. Without gradient checkpointing; ``micro`` rows at one time. In fp32 its kernels stand back and PEFT's
own forward runs, so the gate says that the loop is right, and ``alive`` that the kernels reach every matrix.
"""

import os
import tempfile
from contextlib import nullcontext
from importlib.metadata import version

os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())  # it writes sources into the working folder
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

from unsloth import FastLanguageModel  # isort: skip  # it wants to be the first

import torch
from common import Job, Part, Record, fill, length, peft_parameters, rank_and_scale, supervised
from peft_loop import pad
from torch import Tensor, nn

LINEARS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
LONGEST = 2048


def load(job: Job) -> nn.Module:
    """The model as its notebooks make it, with the common adapter."""
    rank, alpha = rank_and_scale(job.adapter)
    model, _ = FastLanguageModel.from_pretrained(
        job.model,
        max_seq_length=LONGEST,
        dtype=job.dtype,
        load_in_4bit=job.settings.get("base") == "nf4",
        use_gradient_checkpointing=False,
        fix_tokenizer=False,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=rank,
        target_modules=LINEARS,
        lora_alpha=alpha,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=False,
    )
    fill({name: Part(parameter) for name, parameter in peft_parameters(model).items()}, job.adapter)
    return model


def main() -> None:
    job = Job.read()
    model = load(job)
    model.train()
    named = peft_parameters(model)
    optimizer = torch.optim.AdamW(named.values(), lr=job.learning_rate, weight_decay=0.0, fused=True)
    mixed = torch.autocast(job.device, torch.bfloat16) if job.precision == "bf16" else nullcontext()

    def logits(tokens: Tensor) -> Tensor:
        with mixed:
            return model(input_ids=tokens, use_cache=False).logits

    packages = {name: version(name) for name in ("unsloth", "transformers", "peft")}
    record, micro = Record(job, named, logits, packages), job.settings.get("micro", job.batch)
    for rows in job.batches():
        record.begin()
        targets, losses = supervised(rows), []
        for first in range(0, len(rows), micro):
            batch = pad(rows[first : first + micro], job.device)
            with mixed:
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
