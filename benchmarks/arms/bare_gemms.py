"""The bound: the matrix products of each step by themselves, as an arm that takes its turn among the others.

Weights of the model's shapes, each in memory of its own as in the model, inputs and outputs allocated beforehand, nothing in
between: the frozen products forward and backward, the adapter's, the head's two over the rows that carry a loss, on the step's
real tokens without any padding. No gradient goes to the embedding, so the first adapted layer's q, k and v need none of their
input's, nor do layers below it. What a step does beside is attention, norms, activations, the optimiser. Whoever finds a way
around some of these products may pass the bound.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Job, Record, supervised

SLICE = {"cpu": 512, "cuda": 4096}
"""Supervised rows whose logits exist at one time: as many as the device is fast with."""


@dataclass(frozen=True)
class Linear:
    """A linear of the model: whether it carries an adapter, and whether the gradient goes on to its input."""

    out: int
    width: int
    adapted: bool
    back: bool


def linears(model: str, adapter: str) -> tuple[list[Linear], int, int, int]:
    """All linears of a model in order, its width, its vocabulary and the adapter's rank."""
    config, lora = (json.loads((Path(folder) / name).read_text()) for folder, name in (
        (model, "config.json"), (adapter, "adapter_config.json")))  # fmt: skip
    width, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shared = width // config["num_attention_heads"] * config["num_key_value_heads"]
    chosen = lora.get("layers_to_transform")
    chosen = range(layers) if chosen is None else chosen
    found = []
    for layer in range(layers):
        adapted = layer in chosen
        for out in (width, shared, shared):
            found.append(Linear(out, width, adapted, layer > min(chosen)))
        for out, into in ((width, width), (mlp, width), (mlp, width), (width, mlp)):
            found.append(Linear(out, into, adapted, layer >= min(chosen)))
    return found, width, config["vocab_size"], lora["r"]


class BareGemms:
    """The products of one step on N packed tokens, of which S carry a loss, by group."""

    def __init__(self, model: str, adapter: str, dtype: torch.dtype, device: str = "cpu") -> None:
        self.linears, self.width, vocabulary, self.rank = linears(model, adapter)
        make = {"dtype": dtype, "device": device}
        self.weights = [torch.randn(linear.out, linear.width, **make) * 0.02 for linear in self.linears]
        self.a = [torch.randn(self.rank, linear.width, **make) * 0.02 for linear in self.linears]
        self.b = [torch.randn(linear.out, self.rank, **make) * 0.02 for linear in self.linears]
        self.vocabulary = torch.randn(vocabulary, self.width, **make) * 0.02
        self.make, self.slice = make, SLICE[device]
        self.size(1, 1)

    def size(self, tokens: int, targets: int) -> None:
        """Allocates inputs and outputs, and touches their memory."""
        widths = {w for linear in self.linears for w in (linear.out, linear.width)}
        self.tokens, self.targets = tokens, targets
        self.at = {width: torch.randn(tokens, width, **self.make) for width in widths}  # inputs and gradients
        self.out = {width: torch.zeros(tokens, width, **self.make) for width in widths}
        self.narrow, self.narrow_grad = (torch.randn(tokens, self.rank, **self.make) for _ in range(2))
        self.a_grad = {w: torch.zeros(self.rank, w, **self.make) for w in widths}
        self.b_grad = {w: torch.zeros(w, self.rank, **self.make) for w in widths}
        self.hidden = torch.randn(targets, self.width, **self.make)
        self.logits = torch.zeros(min(self.slice, targets), len(self.vocabulary), **self.make)

    def groups(self) -> dict[str, tuple[Callable[[], None], float]]:
        """Each group's work and its FLOPs."""
        tokens, linears = self.tokens, self.linears
        lora = sum(
            self.rank * ((2 + linear.back) * linear.width + 3 * linear.out) for linear in linears if linear.adapted
        )
        return {
            "frozen, forward": (self.forward, 2.0 * tokens * sum(x.out * x.width for x in linears)),
            "frozen, backward": (self.backward, 2.0 * tokens * sum(x.out * x.width for x in linears if x.back)),
            "LoRA": (self.lora, 2.0 * tokens * lora),
            "head": (self.head, 4.0 * self.targets * self.vocabulary.numel()),
        }

    def forward(self) -> None:
        for linear, weight in zip(self.linears, self.weights, strict=True):
            torch.mm(self.at[linear.width], weight.t(), out=self.out[linear.out])

    def backward(self) -> None:
        for linear, weight in zip(self.linears, self.weights, strict=True):
            if linear.back:
                torch.mm(self.at[linear.out], weight, out=self.out[linear.width])

    def lora(self) -> None:
        for linear, a, b in zip(self.linears, self.a, self.b, strict=True):
            if not linear.adapted:
                continue
            torch.mm(self.at[linear.width], a.t(), out=self.narrow)
            self.out[linear.out].addmm_(self.narrow, b.t())
            torch.mm(self.at[linear.out], b, out=self.narrow_grad)
            torch.mm(self.narrow_grad.t(), self.at[linear.width], out=self.a_grad[linear.width])
            torch.mm(self.at[linear.out].t(), self.narrow, out=self.b_grad[linear.out])
            if linear.back:
                self.out[linear.width].addmm_(self.narrow_grad, a)

    def head(self) -> None:
        for part in self.hidden.split(self.slice):
            logits = self.logits[: len(part)]
            torch.mm(part, self.vocabulary.t(), out=logits)
            torch.mm(logits, self.vocabulary)

    def timed(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds and FLOPs of each group, run once."""
        seconds, flops = {}, {}
        for name, (work, count) in self.groups().items():
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            seconds[name], flops[name] = time.perf_counter() - began, count
        return seconds, flops

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.make["device"] != "cpu":
            torch.cuda.synchronize()


def main() -> None:
    job = Job.read()
    bare = BareGemms(job.model, job.adapter, job.dtype, job.device)
    record = Record(job, {}, lambda _: torch.empty(0), {})
    for rows in job.batches():
        tokens, targets = sum(len(row["input_ids"]) for row in rows), supervised(rows)
        bare.size(tokens, targets)
        record.begin()
        for work, _ in bare.groups().values():
            work()
        record.end(0.0, tokens, targets)
    record.write()


if __name__ == "__main__":
    main()
