"""Lamina's own training loop, as ``lamina train`` runs it; only the order of the rows is not shuffled."""

from lamina.process import prepare

prepare()  # as the command line does, before torch is loaded

import numpy as np
import torch
from common import IGNORED, Job, Record
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function

from lamina import native
from lamina.adapter import adapted
from lamina.adapter_files import load_adapter
from lamina.data.render import Rendered
from lamina.model.decoder import Decoder
from lamina.model.weights import load_model
from lamina.ops.attention import Packed
from lamina.training.loop import Training, start, train
from lamina.training.order import rows_of_step


def told_to_the_profiler() -> None:
    """Lets the profiler see calls of Lamina's kernels, as it sees torch's operations."""
    call = native.call

    def told(name: str, *arguments: native.Argument, **settings: int | None) -> None:
        with record_function(f"lamina::{name}"):
            call(name, *arguments, **settings)

    native.call = told


class InOrder:
    """Rows so arranged that Lamina's shuffled epoch meets them in the order of the file."""

    def __init__(self, rows: list[dict[str, list[int]]], seed: int) -> None:
        self.rows = [rendered(row, number) for number, row in enumerate(rows, 1)]
        order = rows_of_step(0, len(rows), len(rows), seed)
        self.place = {index: place for place, index in enumerate(order)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Rendered:
        return self.rows[self.place[index]]


def rendered(row: dict[str, list[int]], number: int) -> Rendered:
    """A row as Lamina's data pipeline hands it to training."""
    return Rendered(np.array(row["input_ids"], np.int32), np.array(row["labels"]) != IGNORED, number)


def prepared(job: Job) -> tuple:
    """The model with its adapter, the rows, the settings."""
    told_to_the_profiler()
    settings = dict(job.settings)
    model = load_model(job.model, job.dtype, job.device, base=settings.pop("base", None))
    load_adapter(model, job.adapter)
    rows = InOrder(job.examples(), seed=0)
    training = Training(
        steps=job.all_steps,
        batch_size=job.batch,
        learning_rate=job.learning_rate,
        schedule="constant",
        warmup=0.0,
        clip=job.clip,
        **settings,
    )
    return model, rows, training


def logits(model: Decoder, tokens: Tensor) -> Tensor:
    """Of one row, for the common evaluation."""
    length = tokens.shape[1]
    hidden = model(tokens[0], torch.arange(length, device=tokens.device), Packed([length]))
    return F.linear(hidden, model.vocabulary)[None]


def main() -> None:
    job = Job.read()
    model, rows, training = prepared(job)
    named = {f"{path}.{name}": p for path, m in adapted(model).items() for name, p in (("A", m.a), ("B", m.b))}
    record = Record(job, named, lambda tokens: logits(model, tokens), {})
    record.begin()
    for step in train(model, rows, training, start(model, training), seed=0):
        if step.step == 1:
            record.divisor = step.supervised_tokens
        record.end(step.loss, step.tokens, step.supervised_tokens)
    record.write()


if __name__ == "__main__":
    main()
