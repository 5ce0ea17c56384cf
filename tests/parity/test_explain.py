"""Adapters that PEFT wrote, explained; and truncated ones that PEFT reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import hosted, logits, peft_model, save_peft, some_tokens, tiny
from torch import Tensor

from lamina.adapter_files import load_adapter
from lamina.explaining import explain, shrink

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "up_proj": 7, "layers.0.mlp.gate_proj": 3},
    "alpha_pattern": {"q_proj": 3, r"layers\.[01]\.mlp\.up_proj": 7.5},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "patterns": {"target_modules": SEVEN, **PATTERNS},
    "rslora": {"target_modules": SEVEN, "use_rslora": True, **PATTERNS},
    "layers": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "expression": {"target_modules": r".*layers\.(0|1)\.self_attn\.(q|o)_proj", "init_lora_weights": "orthogonal"},
}


def adapter(folder: Path, layout: str) -> tuple[Any, dict[str, Tensor]]:
    """An adapter of PEFT on disk; its model, and PEFT's own s·B·A by the paths of the modules."""
    from peft import LoraConfig

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **LAYOUTS[layout])
    model = peft_model(hosted(tiny()), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    save_peft(model.eval(), folder)
    modules = {path.removeprefix("base_model.model."): module for path, module in model.named_modules()}
    deltas = {
        path: module.get_delta_weight("default").detach().double()
        for path, module in modules.items()
        if path.endswith("_proj")
        and module.__class__.__name__ == "Linear"
        and "default" in getattr(module, "lora_A", {})
    }
    return model, deltas


@pytest.mark.parametrize("layout", LAYOUTS)
def test_singular_values_are_those_of_pefts_update(layout: str, tmp_path: Path) -> None:
    _, deltas = adapter(tmp_path, layout)
    found = explain(tmp_path)
    assert {update.name for update in found.updates} == deltas.keys()
    for update in found.updates:
        expected = torch.linalg.svdvals(deltas[update.name])[: update.rank]
        # PEFT multiplies in fp32: a product of up to seven terms is off by some 2^-22 of ‖ΔW‖.
        found_values = torch.tensor(update.singular_values, dtype=torch.float64)
        assert float((found_values - expected).abs().max()) <= 2**-20 * float(expected.norm())
        assert update.norm == pytest.approx(float(deltas[update.name].norm()), rel=2**-20)
    total = sum(float(delta.square().sum()) for delta in deltas.values())
    for module, share in found.shares("module").items():
        part = sum(float(delta.square().sum()) for path, delta in deltas.items() if path.endswith(module))
        assert share == pytest.approx(part / total, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_truncated_adapter_answers_in_peft_as_the_truncated_update_does(
    layout: str, rank: int, tmp_path: Path
) -> None:
    _, deltas = adapter(tmp_path / "full", layout)
    shrink(tmp_path / "full", rank, tmp_path / "low")
    tokens = some_tokens([20])
    guest = hosted(tiny())
    for path, delta in deltas.items():
        u, values, vh = torch.linalg.svd(delta)
        best = (u[:, :rank] * values[:rank]) @ vh[:rank]
        weight = guest.get_submodule(path).weight.data
        weight.copy_(weight.double() + best)
    expected = guest(tokens[None]).logits[0].detach()
    found = peft_model(hosted(tiny()), tmp_path / "low").eval()(tokens[None]).logits[0].detach()
    base = hosted(tiny())(tokens[None]).logits[0].detach()
    # fp32 on both sides, W + ΔW rounded together there and apart here: 2^-23 of logits about 1, through two layers.
    assert torch.allclose(found, expected, rtol=0, atol=2e-5)
    assert float((found - base).abs().max()) > 1e-2

    model = tiny()
    load_adapter(model, tmp_path / "low")
    assert torch.equal(logits(model, tokens), found), "and the same bits here"


def test_a_truncated_adapter_of_patterns_keeps_lower_ranks_and_scale_one(tmp_path: Path) -> None:
    adapter(tmp_path / "full", "rslora")
    shrink(tmp_path / "full", 3, tmp_path / "low")
    guest = peft_model(hosted(tiny()), tmp_path / "low")
    found = {
        path.removeprefix("base_model.model.model."): (module.r["default"], module.scaling["default"])
        for path, module in guest.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    assert found["layers.1.self_attn.q_proj"] == (2, 1.0)
    assert {pair for path, pair in found.items() if path != "layers.1.self_attn.q_proj"} == {(3, 1.0)}
