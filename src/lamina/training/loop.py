"""The training step, whole: from the rows of a step to the moved adapter.

``train`` is a generator. It yields after every optimiser step, and evaluation, saving, logging and early stopping are
ordinary code in its caller's loop. One optimiser step takes ``batch_size`` examples; they are packed into as few
micro-batches as best fit finds for the token budget, losses and gradients are **sums** over all of them, and the sum is divided once,
by the step's supervised tokens. How a step is cut into micro-batches therefore changes its memory, with dropout its random numbers, and
nothing else.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from lamina.adapter import adapted
from lamina.data.pack import Batch, pack
from lamina.data.render import Rendered
from lamina.errors import DataError
from lamina.model.decoder import Decoder
from lamina.ops.attention import Packed
from lamina.ops.loss import IGNORED, cross_entropy_sum
from lamina.section import section
from lamina.training.available import resident
from lamina.training.finite import refuse_broken_adapter, refuse_non_finite, refuse_silent
from lamina.training.optimizer import Kind, Schedule, adamw, rate_factor, rule_of_thumb
from lamina.training.order import Order, rows_of_step, shuffled, steps_of

PORTION = 4096
"""Tokens of a micro-batch where neither the settings nor a plan say another number."""


@section
class Training:
    """The training: how long, how fast, and in what portions."""

    epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """Passes over the training rows; not counted when steps is given."""

    steps: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Optimiser steps; if unset, as many as the epochs need."""

    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Examples per optimiser step. Small batches suit LoRA better than large ones."""

    micro_batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens computed at one time; a step's examples are packed into portions of this size. It changes the memory and the
    speed, not the result (with dropout, which numbers are drawn). A longer example is a portion of its own. If unset, the plan
    chooses the largest that fits the memory."""

    checkpoint_layers: Annotated[int, Field(ge=0)] | None = None
    """Layers, from the first, that keep only their input and are computed again in the backward pass: less memory, up to a
    third more time, the same result. If unset, the plan chooses as few as the memory asks for."""

    offload_checkpoints: bool = False
    """Keep the inputs of checkpointed layers in the host's memory, where the model is on a GPU: less memory there, more traffic."""

    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory that the run may take, in GiB; if unset, what is free on the device. A run that is planned to need more is refused
    before it starts; whoever trusts the plan less than the machine names a larger number."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; if unset, 5e-4·(2000/width)^0.781, the rule of thumb for LoRA (2.9e-4 for Llama-2-7B)."""

    schedule: Schedule = "cosine"
    """How the rate goes on after the warm-up: constant, linear to zero, or cosine to zero."""

    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the steps over which the learning rate rises from zero."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of A and B, as a rate per unit of learning rate."""

    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; a larger one is scaled down to it. Unset: no limit."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of AdamW's two moments."""

    optimizer: Kind = "adamw"
    """Where AdamW keeps its two moments: adamw in fp32; adamw8bit in eight bits a number (bitsandbytes); the paged forms in
    memory that CUDA moves to the host when the device is full."""

    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's ε."""

    def rate(self, model: Decoder) -> float:
        """The peak learning rate: the one that was set, or the rule of thumb for this model."""
        return self.learning_rate or rule_of_thumb(model.architecture.width, model.architecture.family)

    @property
    def portion(self) -> int:
        """Tokens of a micro-batch: as set, or as is usual where nothing was planned."""
        return self.micro_batch_tokens or PORTION

    def total_steps(self, examples: int) -> int:
        """The optimiser steps of the run over so many training examples."""
        return self.steps or steps_of(examples, self.batch_size, self.epochs)


@dataclass(frozen=True)
class Step:
    """What one optimiser step did; the record in ``metrics.jsonl`` has these fields."""

    step: int
    """From 1."""
    loss: float
    """Mean over the supervised tokens, in nats, before the step's update."""
    tokens: int
    """Real tokens of the step's examples."""
    supervised_tokens: int
    learning_rate: float
    grad_norm: float
    """Of the whole gradient, before clipping."""
    seconds: float
    memory_bytes: int
    """Peak of the process (CPU) or of the device's allocations (CUDA) so far."""


@runtime_checkable  # so that the tests can check the annotations that name it
class Examples(Protocol):
    """Rendered examples by index: a list, or a store larger than memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Rendered: ...


@dataclass
class State:
    """What changes from step to step beside the adapter itself: how many steps are done, and AdamW's moments.

    Attributes:
        grad_norms: of each parameter, before clipping, in the optimiser's order; of the step that is under way or was last.
    """

    step: int
    optimizer: torch.optim.Optimizer
    grad_norms: Tensor | None = None


def start(model: Decoder, training: Training) -> State:
    """The state before the first step."""
    trainable = [parameter for module in adapted(model).values() for parameter in module.parameters(recurse=False)]
    return State(0, adamw(training.optimizer, trainable, training.weight_decay, training.betas, training.adam_eps))


def train(
    model: Decoder, examples: Examples, training: Training, state: State, seed: int, order: Order | None = None
) -> Iterator[Step]:
    """Trains the adapter of a model, step by step, from where ``state`` is.

    Args:
        order: the examples of an epoch as indices, a function of (seed, epoch, number of examples); at random if unset. It is
            called in every step, so what takes long is computed before. A curriculum: ``lambda *_: easiest_first``.

    Raises:
        TrainingError: a loss or gradient is not finite (the adapter is left as it was before that step), the update
            is not, or after the first step some B has no gradient.
        DataError: there are no examples.
    """
    if not len(examples):
        raise DataError("found no examples to train on, expected at least one")
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    peak, steps = training.rate(model), training.total_steps(len(examples))
    last = None if training.steps else max(1, round(len(examples) * training.epochs))  # then the last step may be short
    while state.step < steps:
        began = time.perf_counter()
        model.train()  # between two steps the caller may have left it in evaluation mode,
        state.optimizer.zero_grad(set_to_none=True)  # or a gradient, as a step does that was broken off
        rows = rows_of_step(state.step, len(examples), training.batch_size, seed, last, order or shuffled)
        batches = pack([examples[row] for row in rows], training.portion)
        supervised = sum(batch.supervised for batch in batches)

        with torch.random.fork_rng(_generators()):  # the caller's generators stay as they are
            torch.manual_seed(_mix(seed, state.step))  # dropout: a function of (seed, step)
            losses = [backward(model, batch, training) for batch in batches]  # forward too; gradients add up
        loss = torch.stack(losses).sum() / supervised
        _divide(parameters, supervised)  # the one division
        state.grad_norms = _norms(parameters)
        norm = torch.linalg.vector_norm(state.grad_norms)

        refuse_non_finite(model, loss, norm, batches, state.step + 1)
        if state.step == 0:
            refuse_silent(model)
        if training.clip:
            nn.utils.clip_grads_with_norm_(parameters, training.clip, norm)
        rate = peak * rate_factor(state.step, steps, training.schedule, training.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)  # what is done between two steps has their memory
        refuse_broken_adapter(model, state.step + 1)
        state.step += 1
        tokens = sum(batch.real_tokens for batch in batches)
        seconds = time.perf_counter() - began
        yield Step(state.step, loss.item(), tokens, supervised, rate, norm.item(), seconds, memory(loss.device))


def backward(model: Decoder, batch: Batch, training: Training) -> Tensor:
    """One micro-batch forward and backward: adds its gradient to the adapter's, returns the summed loss."""
    device = model.vocabulary.device
    layers, offload = training.checkpoint_layers or 0, training.offload_checkpoints
    learnt = (batch.targets != IGNORED).nonzero().squeeze(1)
    wanted = learnt.to(device, non_blocking=True) if len(learnt) < len(batch.targets) else None  # None is all
    tokens, position = (x.to(device, non_blocking=True) for x in (batch.tokens, batch.position))
    loss, _ = cross_entropy_sum(  # the hidden states have no name here: one would keep them through the backward pass
        model(tokens, position, Packed(batch.lengths), checkpointed=layers, offload=offload, wanted=wanted),
        model.vocabulary,
        batch.targets[learnt],  # on the CPU, where they are counted without waiting for the device
    )
    loss.backward()
    return loss.detach()


def _divide(parameters: list[nn.Parameter], count: int) -> None:
    """Divides all gradients. (In the loop their names would keep them alive into the next step.)"""
    if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
        torch._foreach_div_(gradients, count)


def _generators() -> list[int]:
    """The GPUs whose generators a seed sets. Unasked, ``fork_rng`` warns where there are several, and wakes one that no run uses."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def _norms(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of each gradient, [P]; of none it is 0. ``nn.utils.get_total_norm`` would keep the norm of them all only."""
    gradients = [parameter.new_zeros(()) if parameter.grad is None else parameter.grad for parameter in parameters]
    return torch.stack(torch._foreach_norm(gradients))


def rehearse(model: Decoder, batch: Batch, training: Training, step: int = 1, beside: int = 0) -> None:
    """Computes a micro-batch before a step and throws its gradient away: of the heaviest, memory runs out now or never.

    Args:
        beside: bytes that are held meanwhile, for what is not there yet and will be.
    """
    # Written, for a CPU has no memory behind what nobody has touched.
    held = torch.ones(beside, dtype=torch.uint8, device=model.vocabulary.device)
    with torch.random.fork_rng(_generators()):
        model.train()
        model.zero_grad(set_to_none=True)
        loss = backward(model, batch, training)
    model.zero_grad(set_to_none=True)
    del held
    refuse_non_finite(model, loss, loss, [batch], step)


def memory(device: torch.device) -> int:
    """Peak memory so far, in bytes: the device's allocations on CUDA, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


def _mix(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63
