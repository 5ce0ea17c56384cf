"""Dropout whose mask is drawn again where it is needed, and kept nowhere (Srivastava et al. 2014, jmlr.org/papers/v15).

torch's own keeps a mask, and what it is laid on keeps a result, for every adapted linear. Here a call is its seed: the same one gives
the same places, forward, backward, and when a checkpointed layer is computed again, as torch then restores the state of the
generator that seeds come from. In bf16 on a CPU a kernel of our own draws, where there is one (``native``): torch's generator takes
as long for a number of x as a product of 768 × 768 does.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lamina import native
from lamina.ops.shapes import Float

SEEDS = 2**63 - 1
WORDS = 2**32


class Dropout(NamedTuple):
    """What one call of dropout zeroes: a function of the seed and of the shape, precision and device of what it is given, and of
    whether there is a kernel.

    Attributes:
        share: p, the probability that a number is zeroed, below 1.
    """

    share: float
    seed: int

    @staticmethod
    def drawn(share: float) -> "Dropout":
        """A call of its own, by torch's global generator on the CPU: no device has to be waited for."""
        return Dropout(share, int(torch.randint(SEEDS, (), device="cpu")))

    def __call__(self, x: Float[Tensor, "N D"], onto: Float[Tensor, "N D"] | None = None) -> Float[Tensor, "N D"]:
        """x/(1 - p) where a number is kept, rounded once, and zero elsewhere. It is linear, so it is also what takes a gradient back.

        Args:
            onto: of x's shape and precision; what it is added to, in place.
        """
        to = x if onto is None else onto
        if x.numel() % native.LANES == 0 and to.shape == x.shape and native.takes(x, to):
            out = torch.empty_like(x, memory_format=torch.contiguous_format) if onto is None else onto
            limit = min(round(self.share * WORDS), WORDS - 1)
            raised = 1 / (1 - self.share)
            native.call("dropout", x.contiguous(), out, x.numel(), self.seed, limit, raised, int(onto is not None))
            increment_version(out)
            return out
        generator = torch.Generator(x.device).manual_seed(self.seed)
        with torch.no_grad():
            kept = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.share, generator=generator)
            dropped = kept.mul_(x).div_(1 - self.share)
            return dropped if onto is None else onto.add_(dropped)
