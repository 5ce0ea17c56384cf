"""An update beside the matrix it is added to: how large, along which of its directions, and what it puts in their place.

Three questions need singular vectors of W, of which a dense SVD of a 4096 × 11008 matrix takes tens of seconds; a model has
hundreds. So W is decomposed exactly up to ``DENSE``, the smaller side, and where that is asked for. Otherwise its ``REFERENCE``
leading directions, and the ``TOP`` of W + ΔW, come from a block Krylov iteration (Musco & Musco 2015, arXiv:1504.05477), which
needs nothing of a matrix but products with it.

What is lost by that: the shares are of the span that was found, whose last directions are not sharp where the singular
values of W lie close together. And the definition of an intruder asks for *every* singular vector of W, of which only the
leading ones are known; one that has no match among those may have one further down. So the count is then a bound from above, and
is told as one. Neither ‖ΔW‖/‖W‖ nor the amplification is estimated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.ops.shapes import Float
from lamina.understand.spectrum import Spectrum

REFERENCE = 32
"""Leading directions of W on which an update is projected; an eighth of the smaller side where that is less."""

TOP = 10
"""Leading singular vectors of W + ΔW that may be intruders, as in the paper."""

EPSILON = 0.6
"""Cosine below which a singular vector matches none of W's."""

DENSE = 1024
"""Smaller side up to which a matrix is decomposed exactly: at this size that takes about half a second."""

_MORE = 10  # columns of the iteration beyond those that are wanted
_DEPTH = 4  # steps of the iteration


@dataclass(frozen=True)
class Relation:
    """An update ΔW beside its W.

    Attributes:
        size: ‖W‖, Frobenius norm.
        relative: ‖ΔW‖/‖W‖; None where W is zero.
        amplification: ‖ΔW‖/‖UᵀWV‖, with U and V the directions of ΔW (Hu et al. 2021, arXiv:2106.09685, section 7.3): how much
            the update enlarges what W did along them; None where one of both is nothing.
        directions: of W, on which the update was projected.
        left: share of ‖ΔW‖² that it writes to the leading left directions of W, ‖U_WᵀΔW‖²/‖ΔW‖²; ``directions``/out by chance.
        right: share of ‖ΔW‖² that it reads from the leading right ones; ``directions``/in by chance.
        top: leading left singular vectors of W + ΔW that were looked at.
        intruders: how many of those have a cosine below ``EPSILON`` with every left singular vector of W (Shuttleworth et al.
            2024, arXiv:2410.21228).
        exact: whether all this comes from dense SVDs; otherwise left and right are estimates, and there are at most so many
            intruders.
    """

    size: float
    relative: float | None
    amplification: float | None
    directions: int
    left: float
    right: float
    top: int
    intruders: int
    exact: bool


@torch.no_grad()
def relate(weight: Float[Tensor, "out D"], update: Spectrum, exact: bool = False) -> Relation:
    """Compares an update with its matrix, in fp32.

    Args:
        weight: W, fp32.
        exact: dense SVDs of W and W + ΔW, whatever their size.
    """
    side = min(weight.shape)
    exact, count, top = exact or side <= DENSE, max(1, min(REFERENCE, side // 8)), min(TOP, side)
    rank, size = update.rank, float(torch.linalg.vector_norm(weight))
    left, values, right = update.left[:, :rank].float(), update.values[:rank].float(), update.right[:, :rank].float()
    through = float(torch.linalg.vector_norm(left.t() @ weight @ right))
    total = float(torch.linalg.vector_norm(values)) or 1.0
    if exact:
        u, v = _dense(weight)
        tuned = _dense(weight + (left * values) @ right.t())[0] if rank else u
    else:
        u, v = leading(weight, left[:, :0], right[:, :0], min(REFERENCE, side))
        tuned = leading(weight, left * values, right, top)[0] if rank else u
    cosines = (u.t() @ tuned[:, :top]).abs().amax(0)
    return Relation(
        size=size,
        relative=update.norm / size if size else None,
        amplification=update.norm / through if rank and through else None,
        directions=count,
        left=float(torch.linalg.vector_norm(u[:, :count].t() @ left * values) / total) ** 2,
        right=float(torch.linalg.vector_norm(v[:, :count].t() @ right * values) / total) ** 2,
        top=top,
        intruders=int((cosines < EPSILON).sum()),
        exact=exact,
    )


@torch.no_grad()
def leading(
    weight: Float[Tensor, "out D"], b: Float[Tensor, "out R"], a: Float[Tensor, "D R"], count: int
) -> tuple[Float[Tensor, "out K"], Float[Tensor, "D K"]]:
    """The ``count`` leading left and right singular vectors of W + b·aᵀ, by block Krylov iteration from fixed random numbers.

    Costs ``2·_DEPTH + 2`` products of the matrix with ``count + _MORE`` columns, and one with all that came of them.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(weight.shape[1], min(count + _MORE, *weight.shape), generator=generator)
    blocks = []
    for _ in range(_DEPTH + 1):
        blocks.append(torch.linalg.qr(weight @ block + b @ (a.t() @ block))[0])
        block = weight.t() @ blocks[-1] + a @ (b.t() @ blocks[-1])
    basis = torch.linalg.qr(torch.cat(blocks, 1))[0]
    u, _, vh = torch.linalg.svd((weight.t() @ basis + a @ (b.t() @ basis)).t(), full_matrices=False)
    return basis @ u[:, :count], vh[:count].t()


def _dense(matrix: Tensor) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, vh.t()
