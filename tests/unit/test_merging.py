"""What is added to a stored matrix, and what is told about it, against the formula in one piece and in fp64."""

import math

import pytest
import torch
from models import tiny
from torch import Tensor, nn

from lamina import merging
from lamina.adapter import AdaptedLinear, LoRA, attach
from lamina.merging import Matrix, MergeRecord

PATH = "model.layers.1.mlp.down_proj"


def one_matrix(std: float) -> tuple[dict[str, AdaptedLinear], dict[str, Tensor]]:
    torch.manual_seed(0)
    modules = attach(tiny(), LoRA(rank=4, alpha=6, targets=("down_proj",), layers="1"))
    nn.init.normal_(modules[PATH].b, std=std)
    return modules, {f"{PATH}.a": modules[PATH].a.data, f"{PATH}.b": modules[PATH].b.data}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1.0, 1e-3, 1e-5])
def test_the_update_and_its_account(dtype: torch.dtype, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_SLICE", 200)  # three rows of 64 at a time, the last slice smaller
    modules, adapter = one_matrix(std)
    module = modules[PATH]
    stored = module.base.weight.to(dtype)
    delta = (module.b.data @ module.a.data) * (6 / 4)
    expected = (stored.float() + delta).to(dtype)

    told: list[Matrix] = []
    update = merging._add(modules, adapter, told)
    bias = torch.ones(32)
    assert update(f"{PATH}.bias", bias) is bias and update("model.norm.weight", bias) is bias
    assert not told
    found = update(f"{PATH}.weight", stored.clone())
    # A product of rank 4 in slices may be summed in another order than in one piece: off by some 2^-24 of ΔW, which may tip
    # a rounding of W'; so equal but for one step of the stored dtype.
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected.double(), rtol=torch.finfo(dtype).eps, atol=1e-7 * std)
    (matrix,) = told
    before, change, moved = (tensor.double() for tensor in (stored, delta, found.double() - stored.double()))
    assert matrix.name == PATH
    assert matrix.relative == pytest.approx(float(change.norm() / before.norm()), rel=1e-5)
    assert matrix.survived == pytest.approx(float((moved * change).sum() / change.square().sum()), rel=1e-4, abs=1e-6)
    if dtype == torch.bfloat16:
        assert (matrix.survived > 0.99) == (std == 1.0)
        assert (matrix.survived < 0.2) == (std == 1e-5)


def test_no_update_and_no_base() -> None:
    modules, adapter = one_matrix(0.0)
    told: list[Matrix] = []
    update = merging._add(modules, adapter, told)
    update(f"{PATH}.weight", modules[PATH].base.weight.clone())
    update(f"{PATH}.weight", torch.zeros(32, 64))
    assert [matrix.survived for matrix in told] == [1, 1]
    assert [matrix.relative for matrix in told] == [0, math.inf]


def test_the_record_in_sentences(tmp_path) -> None:
    matrices = (Matrix("one", 0.5, 0.75), Matrix("two", 0.25, 0.25))
    record = MergeRecord(tmp_path, "run/adapter", matrices, None, "the data is gone")
    assert record.lines() == [
        f"merged run/adapter into 2 matrices: {tmp_path}",
        "largest update: 50 % of the norm of one",
        "share of the update that survived rounding: 50.0% on average, 25.0% in two",
        "not compared: the data is gone",
    ]
    assert record.as_json()["not_compared"] == "the data is gone"
