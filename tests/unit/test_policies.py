"""What is added to a stored matrix, and what is told about it, against the formula in one piece and in fp64."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lamina import policies
from lamina.model.checkpoint import Stored
from lamina.policies import Update, account, add, dense_dtype

NAME = "model.layers.1.mlp.down_proj"


def operands(dtype: torch.dtype, std: float) -> tuple[Tensor, Update, Tensor]:
    """W [32, 64] as it is stored, an update whose B has deviation ``std``, and ΔW in one piece, fp64."""
    torch.manual_seed(0)
    weight = (torch.randn(32, 64) * 0.15).to(dtype)
    a, b = torch.randn(4, 64) / 8, torch.randn(32, 4) * std
    return weight, Update(a, b, 1.5), 1.5 * b.double() @ a.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1.0, 1e-3, 1e-5])
def test_the_update_and_its_account(dtype: torch.dtype, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_SLICE", 200)  # three rows of 64 at a time, the last slice smaller
    weight, update, delta = operands(dtype, std)
    found = weight.clone()
    matrix = add(NAME, found, weight, update)
    expected = (weight.double() + delta).to(dtype)
    # A product of rank 4 in slices may be summed in another order than in one piece: off by some 2^-24 of ΔW, which may tip
    # a rounding of W'; so equal but for one step of the stored dtype.
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected.double(), rtol=torch.finfo(dtype).eps, atol=1e-7 * std)

    assert matrix == account(NAME, weight, weight, found, update)
    before, moved = weight.double(), found.double() - weight.double()
    assert (matrix.name, matrix.layer) == (NAME, 1)
    assert matrix.relative == pytest.approx(float(delta.norm() / before.norm()), rel=1e-5)
    assert matrix.survived == pytest.approx(float((moved * delta).sum() / delta.square().sum()), rel=1e-4, abs=1e-6)
    # In fp32 the missing part is itself of the size of one rounding.
    assert matrix.error == pytest.approx(float((moved - delta).norm() / before.norm()), rel=1e-3, abs=1e-7)
    if dtype == torch.bfloat16:
        assert (matrix.survived > 0.99) == (std == 1.0)
        assert (matrix.survived < 0.2) == (std == 1e-5)


def test_a_base_that_training_did_not_see_is_an_error_and_no_loss_of_the_update() -> None:
    weight, update, delta = operands(torch.float32, 0.1)
    seen = weight + torch.randn(32, 64) * 0.01
    matrix = add(NAME, weight.clone(), seen, update)
    assert matrix.survived == pytest.approx(1, abs=1e-5)
    assert matrix.error == pytest.approx(float((weight - seen).norm() / seen.norm()), rel=1e-4)
    assert matrix.relative == pytest.approx(float(delta.norm() / seen.double().norm()), rel=1e-5)


def test_no_update_and_no_base() -> None:
    weight, update, _ = operands(torch.float32, 0.0)
    matrix = account(NAME, weight, weight, weight, update)
    assert (matrix.relative, matrix.error, matrix.survived) == (0, 0, 1)
    nothing, update = torch.zeros(32, 64), operands(torch.float32, 1.0)[1]
    matrix = add(NAME, nothing.clone(), nothing, update)
    assert matrix.relative == math.inf and matrix.survived == pytest.approx(1, abs=1e-6)


def test_the_dtype_of_a_merge_is_that_of_the_checkpoint() -> None:
    """Most matrices decide; of those stored quantised it is the dtype of the computation; no numbers, no answer."""
    codes = {"a.weight": "F16", "b.weight": "F16", "c.weight": "F32", "norm.weight": "F32", "embed.weight": "F32"}
    codes |= {
        "d.weight": "U8",
        "d.weight.absmax": "F32",
        "d.weight.quant_state.bitsandbytes__nf4": "U8",
        "e.weight": "I32",
    }
    stored = {name: Stored(name, Path("model.safetensors"), code, (1,), 0) for name, code in codes.items()}
    assert dense_dtype(stored, ["a", "b", "c"], torch.bfloat16) == torch.float16
    assert dense_dtype(stored, ["c"], torch.bfloat16) == torch.float32
    assert dense_dtype(stored, ["d"], torch.bfloat16) == torch.bfloat16
    for paths in (["e"], ["missing"], []):
        assert dense_dtype(stored, paths, torch.bfloat16) is None
