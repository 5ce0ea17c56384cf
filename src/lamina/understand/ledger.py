"""The ledger: whether every adapted matrix learns, step by step.

Of each matrix and step it holds ‖A‖, ‖B‖, ‖ΔW‖ = s·‖B·A‖, ‖ΔW‖/‖W‖, the norm of its gradient before clipping, and how far the
step moved it. All norms are Frobenius norms, in fp32.

* ΔW is never formed: ‖B·A‖² = ⟨BᵀB, A·Aᵀ⟩, two Gram matrices of R×R, whose diagonals are ‖A‖² and ‖B‖² as well.
* The norms of the gradients are those that the loop sums up for its clipping (``State.grad_norms``).
* How far a step moves a matrix can only be seen around the optimiser: a copy of A and B lives from just before its step to
  just after it, when activations are gone and gradients are about to go. Torch's own hooks are the place; the training loop
  knows nothing of the ledger. Rejected: the difference from AdamW's moments, which is true of one kind of optimiser only and
  takes no fewer passes over memory; keeping the copy from step to step, which adds it to the peak.

Matrices of one shape are stacked, so that a step takes some ten operations a shape and not a matrix. Everything is computed on the
device before the loop reads its loss there, and comes to the host as one small tensor after it: there is no new wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.adapter import AdaptedLinear, adapted
from lamina.model.decoder import Decoder
from lamina.model.quantised import form_of
from lamina.training.loop import State

COLUMNS = ("a_norm", "b_norm", "update_norm", "relative", "grad_norm", "ratio")
"""What is held of a matrix: ‖A‖, ‖B‖, ‖ΔW‖, ‖ΔW‖/‖W‖, the gradient's norm, and the norm of the change of (A, B) by that of (A, B)."""

_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Place:
    """Where an adapted matrix is: its layer, and its module in the layer, as ``self_attn.q_proj``."""

    layer: int
    module: str


@dataclass(frozen=True)
class Row:
    """The ledger of one step, after its update: ``values`` is [len(COLUMNS), M] over the M matrices in the model's order."""

    step: int
    values: NDArray[np.float32]

    def __getitem__(self, column: str) -> NDArray[np.float32]:
        """One column, [M]."""
        found: NDArray[np.float32] = self.values[COLUMNS.index(column)]
        return found


def places(model: Decoder) -> tuple[Place, ...]:
    """Where the adapted matrices are, in the model's order."""
    parts = [path.split(".", 3) for path in adapted(model)]  # model.layers.3.self_attn.q_proj
    return tuple(Place(int(layer), module) for _, _, layer, module in parts)


@torch.no_grad()
def weight_norms(model: Decoder) -> Tensor:
    """‖W‖ of every adapted matrix, [M] in fp32, one matrix dense at a time; of a quantised one the value it computes with."""
    return torch.stack([_norm(form_of(module.base).dense()) for module in adapted(model).values()])


class Observer:
    """Watches the optimiser of a run and measures what its steps do, until it is closed.

    Args:
        every: measure the steps that this divides.
    """

    def __init__(self, model: Decoder, state: State, every: int = 1) -> None:
        modules = list(adapted(model).values())
        self._state, self._every = state, every
        self._groups = _of_one_shape(modules)
        order = [number for numbers, _ in self._groups for number in numbers]
        self._order = torch.tensor(order, device=modules[0].a.device).argsort()
        self._weights = weight_norms(model).clamp_(min=_TINY)
        self._scales = torch.tensor([module.scale for module in modules], device=modules[0].a.device)
        self._before: list[tuple[Tensor, Tensor]] = []
        self._found: Tensor | None = None
        optimizer = state.optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._copy),
            optimizer.register_step_post_hook(self._measure),
        ]

    def close(self) -> None:
        """Lets go of the optimiser."""
        for hook in self._hooks:
            hook.remove()

    def row(self) -> Row | None:
        """What the last step did; None where it was not measured."""
        found, self._found = self._found, None
        return None if found is None else Row(self._state.step, found.cpu().numpy())

    def _copy(self, *given: Any) -> None:
        if (self._state.step + 1) % self._every == 0:
            self._before = [_stacked(group) for _, group in self._groups]

    @torch.no_grad()
    def _measure(self, *given: Any) -> None:
        if not self._before:
            return
        before, self._before = self._before, []
        parts = []
        for (_, group), (a_before, b_before) in zip(self._groups, before, strict=True):
            a, b = _stacked(group)
            a_gram, b_gram = a @ a.mT, b.mT @ b  # [G, R, R]
            change = torch.linalg.vector_norm(a_before.sub_(a), dim=(1, 2)).square()
            change += torch.linalg.vector_norm(b_before.sub_(b), dim=(1, 2)).square()
            squares = (_trace(a_gram), _trace(b_gram), (a_gram * b_gram).sum((1, 2)), change)
            parts.append(torch.stack(squares))
        a_norm, b_norm, product, change = torch.cat(parts, 1)[:, self._order].clamp_(min=0).sqrt_()
        update = product * self._scales
        gradients = self._state.grad_norms
        assert gradients is not None, "the loop has it before it lets the optimiser step"
        gradient = torch.linalg.vector_norm(gradients.view(-1, 2), dim=1)  # A and B of a matrix follow one another
        ratio = change / torch.hypot(a_norm, b_norm).clamp_(min=_TINY)
        self._found = torch.stack((a_norm, b_norm, update, update / self._weights, gradient, ratio))


def summaries(row: Row, where: Sequence[Place]) -> dict[str, float]:
    """What a curve is worth drawing of: three measures by kind of module over the layers, and one by layer over its modules.

    ``relative`` is a root mean square, which is ‖ΔW‖/‖W‖ of the matrices together where their weights are of one size;
    ``grad_norm`` the norm of their gradients together; ``ratio`` the median, because a single matrix that stands still or
    runs away is told in words.
    """
    modules, layers = np.array([place.module for place in where]), np.array([place.layer for place in where])
    found: dict[str, float] = {}
    for module in dict.fromkeys(modules.tolist()):
        chosen = modules == module
        found[f"ledger_relative/{module}"] = _rms(row["relative"][chosen])
        found[f"ledger_grad_norm/{module}"] = float(np.linalg.norm(row["grad_norm"][chosen].astype(np.float64)))
        found[f"ledger_ratio/{module}"] = float(np.median(row["ratio"][chosen]))
    for layer in dict.fromkeys(layers.tolist()):
        found[f"ledger_relative_by_layer/{layer:02d}"] = _rms(row["relative"][layers == layer])
    return found


def _rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _norm(weight: Tensor) -> Tensor:
    """In two stages: one fp32 sum over tens of millions of squares would lose digits."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    rows: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=kind)
    return torch.linalg.vector_norm(rows).float()  # type: ignore[no-any-return]


def _of_one_shape(modules: Sequence[AdaptedLinear]) -> list[tuple[list[int], list[AdaptedLinear]]]:
    """Groups of matrices that can be stacked, each with their numbers."""
    groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for number, module in enumerate(modules):
        groups.setdefault((module.a.shape, module.b.shape), []).append(number)
    return [(numbers, [modules[number] for number in numbers]) for numbers in groups.values()]


@torch.no_grad()
def _stacked(group: Sequence[AdaptedLinear]) -> tuple[Tensor, Tensor]:
    """A [G, R, in] and B [G, out, R] of a group, copied."""
    return torch.stack([module.a for module in group]), torch.stack([module.b for module in group])


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=1, dim2=2).sum(1)
