"""An update beside its matrix: against dense computation, and on matrices whose answer is known."""

import pytest
import torch
from torch import Tensor

from lamina.understand import alignment
from lamina.understand.alignment import EPSILON, TOP, leading, relate
from lamina.understand.spectrum import Spectrum, spectrum


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns))[0]


def known(outputs: int = 96, inputs: int = 64, power: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W with singular values that fall like those of trained weights; W, U, σ, V."""
    side = min(outputs, inputs)
    u, v = orthonormal(outputs, side, 1), orthonormal(inputs, side, 2)
    values = 10 * torch.arange(1, side + 1) ** -power
    return (u * values) @ v.t(), u, values, v


def along(left: Tensor, values: list[float], right: Tensor) -> Spectrum:
    return Spectrum(left.double(), torch.tensor(values, dtype=torch.float64), right.double())


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
def test_against_dense_computation(shape: tuple[int, int]) -> None:
    weight, torch_seed = known(*shape)[0], 3
    torch.manual_seed(torch_seed)
    update = spectrum(torch.randn(4, shape[1]), torch.randn(shape[0], 4), 0.05)
    found = relate(weight, update)

    delta = ((update.left * update.values) @ update.right.t()).double()
    wide = weight.double()
    u, _, vh = torch.linalg.svd(wide, full_matrices=False)
    count = 64 // 8
    assert (found.exact, found.directions, found.top) == (True, count, TOP)
    # fp32 all along: products of a hundred terms, off by some 1e-6.
    assert found.size == pytest.approx(float(wide.norm()), rel=1e-5)
    assert found.relative == pytest.approx(float(delta.norm() / wide.norm()), rel=1e-5)
    assert found.left == pytest.approx(float((u[:, :count].t() @ delta).norm() / delta.norm()) ** 2, rel=1e-4)
    assert found.right == pytest.approx(float((delta @ vh[:count].t()).norm() / delta.norm()) ** 2, rel=1e-4)
    through = (update.left.t() @ wide @ update.right).norm()
    assert found.amplification == pytest.approx(float(delta.norm() / through), rel=1e-4)
    tuned = torch.linalg.svd(wide + delta, full_matrices=False)[0][:, :TOP]
    assert found.intruders == int(((u.t() @ tuned).abs().amax(0) < EPSILON).sum())


@pytest.mark.parametrize("dense", [True, False])
def test_an_update_along_the_matrix_and_one_beside_it(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "DENSE", 1024 if dense else 0)
    weight, u, values, v = known()
    same = relate(weight, along(u[:, :2], [1.0, 0.5], v[:, :2]))
    assert same.exact == dense
    assert same.left == pytest.approx(1, abs=1e-4) and same.right == pytest.approx(1, abs=1e-4)
    assert same.intruders == 0
    assert same.amplification == pytest.approx(1.25**0.5 / float(values[:2].norm()), rel=1e-4)

    # A direction outside of the columns of W, and one far down: no singular vector of W is near the first.
    outside = torch.linalg.qr(torch.cat([u, orthonormal(96, 1, 5)], 1))[0][:, -1:]
    other = relate(weight, along(outside, [20.0], v[:, -1:]))
    assert other.left < 1e-4 and other.right < 1e-4
    assert other.intruders == 1
    assert other.amplification is None or other.amplification > 1e4


def test_a_direction_from_further_down_is_no_intruder_but_may_count_as_one_in_the_estimate() -> None:
    """Hence the count of the estimate is a bound from above."""
    weight, u, _, v = known(320, 320)
    update = along(u[:, 200:201], [30.0], v[:, 200:201])
    assert relate(weight, update).intruders == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "DENSE", 0)
        assert relate(weight, update).intruders == 1
        assert relate(weight, update, exact=True).intruders == 0


def test_the_estimate_is_close_to_the_dense_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = known(400, 300)[0]
    torch.manual_seed(3)
    for scale in (0.002, 0.02, 0.1):
        update = spectrum(torch.randn(4, 300), torch.randn(400, 4), scale)
        exact = relate(weight, update)
        monkeypatch.setattr(alignment, "DENSE", 0)
        found = relate(weight, update)
        monkeypatch.undo()
        assert not found.exact
        # Values that fall by 1/(2·32) from one to the next at the end of the span: the iteration separates these by 1e-3.
        assert found.left == pytest.approx(exact.left, abs=2e-3)
        assert found.right == pytest.approx(exact.right, abs=2e-3)
        assert found.intruders == exact.intruders
        assert (found.relative, found.amplification) == (exact.relative, exact.amplification)


def test_leading_directions_of_a_sum_that_is_not_formed() -> None:
    weight = known(200, 150)[0]
    torch.manual_seed(4)
    b, a = torch.randn(200, 3), torch.randn(150, 3) * 0.3
    left, right = leading(weight, b, a, 6)
    u, _, vh = torch.linalg.svd(weight + b @ a.t())
    assert torch.allclose((u[:, :6].t() @ left).abs(), torch.eye(6), atol=1e-3)
    assert torch.allclose((vh[:6] @ right).abs(), torch.eye(6), atol=1e-3)


@pytest.mark.parametrize("dense", [1024, 0])
def test_nothing_on_either_side(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "DENSE", dense)
    weight, u, _, v = known()
    nothing = relate(weight, along(u[:, :2], [0.0, 0.0], v[:, :2]))
    assert (nothing.relative, nothing.amplification, nothing.intruders) == (0, None, 0)
    assert (nothing.left, nothing.right) == (0, 0)
    assert relate(torch.zeros(96, 64), along(u[:, :2], [1.0, 0.0], v[:, :2])).relative is None


def test_a_matrix_with_fewer_rows_than_are_looked_at() -> None:
    found = relate(torch.randn(4, 6), spectrum(torch.randn(2, 6), torch.randn(4, 2), 1.0))
    assert (found.directions, found.top) == (1, 4)
