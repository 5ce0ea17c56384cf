"""How long a run will take, before its model is loaded: one layer of its shape is built, trained on random numbers, and timed.

A step's time is nearly linear in its tokens, its targets and the layers: t = N·layers·layer + targets·rest, where ``rest`` is the
last norm and the loss, which only tokens with a target go through. Both are measured on this machine, with the form of the
base, the rank and the dtype of the run, so that nothing has to be known about the processor. What the estimate leaves out: a
first step's warm-up, that the last layer's MLP too computes only tokens with a target, and other work on the machine.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lamina.adapter import LoRA, attach
from lamina.model.decoder import Decoder, angles
from lamina.model.quantised import QuantisedLinear, linears_of, quantise_leaves
from lamina.ops.attention import Packed
from lamina.ops.loss import cross_entropy_sum
from lamina.training.setup import Setup

TOKENS = 512
"""Tokens of the micro-batch that is timed, at most: enough for GEMMs at their usual speed, few enough for seconds in all."""

_ROUNDS = 3


@dataclass(frozen=True)
class Pace:
    """Seconds of a training step, for each of its tokens."""

    layer: float
    """Forward and backward of one layer."""
    rest: float
    """Last norm and loss of a token that has a target."""

    def seconds(self, tokens: int, targets: int, layers: int, recomputed: int = 0, below: int = 0) -> float:
        """The time of so many tokens through so many layers, and of those with a target through the loss.

        A recomputed layer costs its forward pass, a third, once more; one ``below`` the lowest adapter costs only that.
        """
        passes = layers + max(0, recomputed - below) / 3 - below * 2 / 3
        return tokens * self.layer * passes + targets * self.rest


def calibrate(setup: Setup, dtype: torch.dtype, device: torch.device, tokens: int) -> Pace:
    """Times forward and backward of one layer, and of the loss.

    Args:
        setup: what the memory is planned for; the layer gets the adapted linears that occur, each at its rank in the last layer that
            adapts it.
        dtype: of the computation.
        tokens: of a usual micro-batch.
    """
    architecture = setup.architecture
    tokens = min(tokens, TOKENS, architecture.max_position)
    model = one_layer(setup, dtype, device)
    x = torch.randn(tokens, architecture.width, device=device).to(dtype).requires_grad_()
    turns = angles(architecture.rope, architecture.head_width, torch.arange(tokens, device=device), dtype)
    targets = torch.arange(tokens, device=device) % architecture.vocabulary
    attend = Packed([tokens])

    def layer() -> Tensor:
        out: Tensor = model.model.layers[0](x, *turns, attend)
        return out.sum()

    def rest() -> Tensor:
        return cross_entropy_sum(model.model.norm(x), model.vocabulary, targets)[0]

    return Pace(_best(layer, device) / tokens, _best(rest, device) / tokens)


def one_layer(setup: Setup, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A model of one layer with random weights, in the form of the setup's base, and an adapter."""
    small = replace(setup.architecture, layers=1, windows=setup.architecture.windows[:1])
    ranks = {path.split(".", 3)[3]: rank for path, rank in setup.ranks.items()}  # by a linear's name within its layer
    with torch.device("meta"):
        model = Decoder(small).to(dtype).requires_grad_(False)
    if setup.base is not None:
        quantise_leaves(model, setup.base, setup.double, dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    for linear in linears_of(model).values():
        if isinstance(linear, QuantisedLinear):
            shape = (linear.out_features, linear.in_features)
            linear.form.store(torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02, generator=generator))
    attach(model, LoRA(targets=tuple(ranks), rank_pattern=ranks))
    return model.train()


def _best(forward: Callable[[], Tensor], device: torch.device) -> float:
    """The least of some times of forward and backward, in seconds."""
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        forward().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)
