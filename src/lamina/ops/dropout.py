"""Dropout whose mask is drawn again where it is needed, and kept nowhere (Srivastava et al. 2014, jmlr.org/papers/v15).

torch's own keeps a mask, and what it is laid on keeps a result, for every adapted linear. Here a call is its seed: the same one gives
the same places, forward, backward, and when a checkpointed layer is computed again, as torch then restores the state of the
generator that seeds come from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lamina.ops.shapes import Float

SEEDS = 2**63 - 1


class Dropout(NamedTuple):
    """What one call of dropout zeroes: a function of the seed and of the shape, precision and device of what it is given.

    Attributes:
        share: p, the probability that a number is zeroed, below 1.
    """

    share: float
    seed: int

    @staticmethod
    def drawn(share: float) -> "Dropout":
        """A call of its own, by torch's global generator on the CPU: no device has to be waited for."""
        return Dropout(share, int(torch.randint(SEEDS, (), device="cpu")))

    def __call__(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """x/(1 - p) where a number is kept, rounded once, and zero elsewhere. It is linear, so it is also what takes a gradient back."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        with torch.no_grad():
            kept = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.share, generator=generator)
            return kept.mul_(x).div_(1 - self.share)
