"""The factored decomposition against the dense SVD of the product in float64, and the measures against their formulas."""

import math

import pytest
import torch
from torch import Tensor

from lamina.understand.spectrum import Spectrum, spectrum


def factors(rank: int, outputs: int = 48, inputs: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(rank, inputs), torch.randn(outputs, rank)


def with_zero_columns() -> tuple[Tensor, Tensor]:
    a, b = factors(8)
    b[:, [0, 3, 7]] = 0
    return a, b


def with_equal_rows() -> tuple[Tensor, Tensor]:
    a, b = factors(8)
    a[1], a[5] = a[0], 2 * a[4]
    return a, b


def of_many_sizes() -> tuple[Tensor, Tensor]:
    a, b = factors(8)
    return a * torch.logspace(0, -7, 8)[:, None], b


CASES = {
    "plain": factors(6),
    "rank one": factors(1),
    "wide": factors(6, 16, 64),
    "zero columns": with_zero_columns(),
    "equal rows": with_equal_rows(),
    "many sizes": of_many_sizes(),
    "rank above both sides": factors(40, 24, 16),
    "rank above one side": factors(20, 24, 16),
    "zero": (factors(4)[0], torch.zeros(48, 4)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_dense_svd_of_the_scaled_product(case: str, dtype: torch.dtype) -> None:
    a, b = (factor.to(dtype) for factor in CASES[case])
    found = spectrum(a, b, 0.75)
    dense = 0.75 * b.double() @ a.double()
    expected = torch.linalg.svdvals(dense)
    size = len(found.values)
    assert size == min(len(a), *dense.shape)
    # Both are backward stable in float64: off by some hundred 2^-53 of the largest value, which is far below 1e-10.
    largest = float(expected[0]) or 1.0
    assert float((found.values - expected[:size]).abs().max()) <= 1e-10 * largest
    assert float(expected[size:].sum()) <= 1e-10 * largest
    assert torch.allclose((found.left * found.values) @ found.right.t(), dense, rtol=0, atol=1e-10 * largest)
    for directions in (found.left, found.right):
        assert torch.allclose(directions.t() @ directions, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-12)
    assert found.rank == int(torch.linalg.matrix_rank(dense))


def test_values_that_a_gram_matrix_would_lose() -> None:
    """σ from 1 to 1e-12: the eigenvalues of AAᵀ would be exact to 1e-8 of the largest only."""
    torch.manual_seed(0)
    values = torch.logspace(0, -12, 5, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(30, 5, dtype=torch.float64))[0] for _ in range(2))
    found = spectrum((left * values.sqrt()).t(), right * values.sqrt(), 1.0)
    assert torch.allclose(found.values, values, rtol=0, atol=1e-15)


def of_values(*values: float) -> Spectrum:
    """An update with these singular values."""
    size = len(values)
    eye = torch.eye(size + 2, size, dtype=torch.float64)
    return Spectrum(eye, torch.tensor(values, dtype=torch.float64), eye)


@pytest.mark.parametrize(
    ("values", "rank", "effective", "stable"),
    [
        ((2.0, 2.0, 2.0, 2.0), 4, 4.0, 4.0),
        ((3.0, 0.0, 0.0), 1, 1.0, 1.0),
        ((0.0, 0.0), 0, 0.0, 0.0),
        # p = (3/4, 1/4): exp(3/4 ln 4/3 + 1/4 ln 4) = (4/3)^(3/4)·√2; (9 + 1)/9
        ((3.0, 1.0), 2, (4 / 3) ** 0.75 * math.sqrt(2), 10 / 9),
    ],
)
def test_ranks_by_their_formulas(values: tuple[float, ...], rank: int, effective: float, stable: float) -> None:
    found = of_values(*values)
    assert found.rank == rank
    assert found.effective_rank == pytest.approx(effective, rel=1e-12)
    assert found.stable_rank == pytest.approx(stable, rel=1e-12)


def test_energy_is_the_share_of_the_best_approximation() -> None:
    found = of_values(3.0, 2.0, 1.0)
    assert [found.energy(rank) for rank in (1, 2, 3, 9)] == pytest.approx([9 / 14, 13 / 14, 1, 1])
    assert of_values(0.0).energy(1) == 1


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_factors_of_a_lower_rank_are_the_best_approximation(rank: int) -> None:
    a, b = factors(6)
    dense = 1.5 * b.double() @ a.double()
    u, values, vh = torch.linalg.svd(dense)
    best = (u[:, :rank] * values[:rank]) @ vh[:rank] if rank < 6 else dense
    found = spectrum(a, b, 1.5)
    low_a, low_b = found.factors(rank)
    assert low_a.dtype == low_b.dtype == torch.float32 and len(low_a) == low_b.shape[1] == min(rank, 6)
    # Each factor is rounded to fp32 by 2^-24; the two roundings add up.
    assert float((low_b.double() @ low_a.double() - best).norm()) <= 2**-22 * float(dense.norm())
    assert torch.allclose(low_a.norm(dim=1), low_b.norm(dim=0)), "the roots of the singular values are in both"
    higher_a, higher_b = found.factors(rank + 1)
    assert torch.equal(low_a, higher_a[:rank]) and torch.equal(low_b, higher_b[:, :rank])
