"""The singular values of a low-rank update ΔW = s·B·A, and what they say of its rank.

ΔW is never formed: with B = Q₁R₁ and Aᵀ = Q₂R₂ it is Q₁(s·R₁R₂ᵀ)Q₂ᵀ, and the core in the middle is R × R. So a matrix of
4096 × 11008 with R = 64 costs two thin QR decompositions and the SVD of 64 × 64, all in float64: some hundredths of a second
where the dense SVD takes most of a minute. Rejected: the eigenvalues of AAᵀ and BᵀB, cheaper still, which square the
condition number and lose every singular value below 1e-8 of the largest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.ops.shapes import Float


@dataclass(frozen=True)
class Spectrum:
    """ΔW = left · diag(values) · rightᵀ in float64, the values falling; Q is the smallest of R and the sides of ΔW.

    Attributes:
        left: directions [out, Q] that the update writes to, orthonormal.
        values: singular values [Q].
        right: directions [in, Q] that the update reads from, orthonormal.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def norm(self) -> float:
        """‖ΔW‖, the Frobenius norm."""
        return float(torch.linalg.vector_norm(self.values))

    @property
    def rank(self) -> int:
        """The number of singular values above the rounding of float64: σ > σ₁·max(out, in)·2⁻⁵²; 0 where ΔW is zero."""
        rounding = max(len(self.left), len(self.right)) * torch.finfo(torch.float64).eps
        return int((self.values > self.values[0] * rounding).sum())

    @property
    def effective_rank(self) -> float:
        """exp(-Σ p log p) with p = σ/Σσ (Roy & Vetterli 2007): n for n equal values, 1 for a single one; 0 where ΔW is zero."""
        total = self.values.sum()
        return float(torch.special.entr(self.values / total).sum().exp()) if total > 0 else 0.0

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖²/σ₁²; 0 where ΔW is zero."""
        return (self.norm / float(self.values[0])) ** 2 if self.values[0] > 0 else 0.0

    def energy(self, rank: int) -> float:
        """Share of ‖ΔW‖² in its best approximation of this rank; 1 where ΔW is zero."""
        squares = self.values.square()
        return float(squares[:rank].sum() / squares.sum()) if squares[0] > 0 else 1.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [k, in] = √Σ·Vᵀ and B [out, k] = U·√Σ, fp32, whose product is the best approximation of this rank.

        The best in the Frobenius and in the spectral norm (Eckart & Young 1936). The scale is in them: s is 1. Those of a lower
        rank are the first rows and columns of those of a higher.
        """
        roots = self.values[:rank].sqrt()
        a, b = roots[:, None] * self.right[:, :rank].t(), self.left[:, :rank] * roots
        return a.float().contiguous(), b.float().contiguous()


@torch.no_grad()
def spectrum(a: Float[Tensor, "R D"], b: Float[Tensor, "out R"], scale: float) -> Spectrum:
    """Decomposes s·B·A, of whatever rank: zero columns, dependent rows and an R above the sides of the matrix are all right."""
    q_out, r_out = torch.linalg.qr(b.double())
    q_in, r_in = torch.linalg.qr(a.double().t())
    u, values, vh = torch.linalg.svd(r_out @ r_in.t(), full_matrices=False)
    return Spectrum(q_out @ u, values * scale, q_in @ vh.t())
