"""A frozen weight W [out, in] behind three products, however it is stored.

LoRA needs two things of W: x·Wᵀ on the way forward, and grad·W on the way back, to the input. No gradient of W is ever
taken, so nothing here asks W to be a tensor of the dtype in which the model computes. ``Dense`` is the plain form; the others
(``fourbit``, ``int8``, ``fp8``) store fewer bits and are modules with buffers. A form that makes dense numbers again makes
them in ``SharedBuffer``, one for the whole model: at any time one matrix is dense, and no step asks for the memory of another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lamina.ops.products import Product, product
from lamina.ops.shapes import Float


@runtime_checkable  # so that the tests can check the annotations that name it
class Frozen(Protocol):
    """A frozen weight W [out, in]."""

    def multiply(
        self, x: Float[Tensor, "N inputs"], bias: Float[Tensor, " out"] | None, *beside: Product
    ) -> Float[Tensor, "N out"]:
        """Computes x·Wᵀ + b in x's dtype, plus the products ``beside``."""
        ...

    def multiply_back(self, grad: Float[Tensor, "N out"], *beside: Product) -> Float[Tensor, "N inputs"]:
        """Computes grad·W, the gradient of the input, plus the products ``beside``."""
        ...

    def dense(self) -> Float[Tensor, "out inputs"]:
        """W as the products see it, in the dtype of the computation; where it had to be made, it lies in memory that the
        next product or ``dense`` of the model overwrites."""
        ...


@runtime_checkable
class Quantised(Frozen, Protocol):
    """A frozen weight that is stored in another form than its numbers; a module with buffers and no parameters."""

    @property
    def kind(self) -> str:
        """The name of the form, as the setting ``base`` has it."""
        ...

    dtype: torch.dtype
    """In which ``dense`` gives it, and to which a weight is rounded before it is quantised."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        ...

    def store(self, weight: Tensor) -> None:
        """Quantises a weight [out, in] of any float dtype into place."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """A form whose product begins with a pass over x that is the same for every weight."""

    def prepared(self, x: Float[Tensor, "N inputs"]) -> Any:
        """x as ``multiply`` of any weight of this form takes it too."""
        ...


@dataclass(frozen=True)
class Dense:
    """A weight that is stored as it is computed with."""

    weight: Tensor

    def multiply(self, x: Tensor, bias: Tensor | None, *beside: Product) -> Tensor:
        return product((x, self.weight.t()), *beside, bias=bias)

    def multiply_back(self, grad: Tensor, *beside: Product) -> Tensor:
        return product((grad, self.weight), *beside)

    def dense(self) -> Tensor:
        return self.weight


def prepared(x: Float[Tensor, "N inputs"], weights: Sequence[Frozen]) -> Any:
    """x as ``multiply`` of these weights takes it: where all of them quantise it in the same way, this is done once."""
    first = weights[0]
    shared = len(weights) > 1 and all(type(weight) is type(first) for weight in weights)
    return first.prepared(x) if shared and isinstance(first, Preparing) else x


def multiply_back(
    weights: Sequence[Frozen], grads: Sequence[Float[Tensor, "N _"]], *beside: Product
) -> Float[Tensor, "N inputs"]:
    """Computes Σ gradᵢ·Wᵢ, the gradient of the input of several weights, plus the products ``beside``."""
    if all(isinstance(weight, Dense) for weight in weights):
        return product(*((grad, weight.dense()) for grad, weight in zip(grads, weights, strict=True)), *beside)
    total = weights[0].multiply_back(grads[0], *beside)
    for weight, grad in zip(weights[1:], grads[1:], strict=True):
        total.add_(weight.multiply_back(grad))
    return total


Scratch = Callable[[int, torch.dtype, torch.device], Tensor]
"""Lends memory [numel] of a dtype on a device until its next call, with whatever is in it."""


class SharedBuffer:
    """Scratch memory for all forms of a model: one buffer, which grows to the largest matrix and stays."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __call__(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The first ``numel`` elements of the buffer, [numel], with whatever is in them."""
        size = numel * dtype.itemsize
        if self._buffer.numel() < size or self._buffer.device != device:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        return self._buffer[:size].view(dtype)
