"""Runs as training leaves them, without the training: for the tests of `merge`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny import write_tiny
from tokens import pieces
from torch import nn

from lamina import jobfile
from lamina.adapter import LoRA, attach
from lamina.adapter_files import save_adapter
from lamina.data.examples import DataSettings
from lamina.job import Job, read_job
from lamina.model.decoder import Decoder
from lamina.model.weights import ModelSettings
from lamina.understand.difference import Difference
from lamina.understand.proof import MergeRecord

ROWS = [("the cat", "sat on a mat"), ("Hello", "world!"), ("two and two?", "Four."), ("was it", "good; saw that")]


def a_run(
    place: Path,
    std: float = 0.02,
    dtype: torch.dtype = torch.bfloat16,
    form: Any = None,
    double: bool = True,
    **size: Any,
) -> Path:
    """A run folder as training leaves it: its job, and an adapter with numbers of deviation ``std`` in B."""
    tokenizer = pieces()
    base = write_tiny(place / "base", dtype, vocab_size=len(tokenizer), **size)
    tokenizer.save_pretrained(base)
    rows = [
        {"messages": [{"role": "user", "content": f"{question} {n}"}, {"role": "assistant", "content": answer}]}
        for n in range(30)
        for question, answer in ROWS
    ]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    job = Job(
        ModelSettings(
            model=str(base),
            device="cpu",
            dtype="bf16" if dtype == torch.bfloat16 else "fp32",
            base=form,
            double_quant=double,
        ),
        DataSettings(data=str(place / "train.jsonl"), eval_fraction=0.5),
        LoRA(rank=4),
    )
    run = place / "run"
    run.mkdir()
    (run / "job.toml").write_text(jobfile.dump(job.sections()), encoding="utf-8")
    model = job.model.load(base)
    torch.manual_seed(0)
    for module in attach(model, job.adapter).values():
        nn.init.normal_(module.b, std=std)
    save_adapter(model, run / "adapter", job.adapter, str(base))
    return run


def proof(record: MergeRecord) -> Difference:
    assert record.difference is not None
    return record.difference


def rewrite(run: Path, section: str = "adapter", **values: Any) -> None:
    """Other settings in a run's job; of the adapter's, with an adapter that fits."""
    job = read_job(run)
    job = replace(job, **{section: replace(getattr(job, section), **values)})
    (run / "job.toml").write_text(jobfile.dump(job.sections()), encoding="utf-8")
    if section == "adapter":
        again(run, job.model.load(Path(job.model.model)))


def again(run: Path, model: Decoder) -> None:
    """An adapter of the job's settings over a model."""
    job = read_job(run)
    torch.manual_seed(0)
    for module in attach(model, job.adapter).values():
        nn.init.normal_(module.b, std=0.02)
    save_adapter(model, run / "adapter", job.adapter, job.model.model)
