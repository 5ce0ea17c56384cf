"""Adapters to and from PEFT: the same modules, ranks and scales, the same files, the same bits in fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import hosted, logits, peft_model, save_peft, some_tokens, tiny
from torch import Tensor, nn

from lamina.adapter import LoRA, adapted, attach
from lamina.adapter_files import CONFIG, load_adapter, save_adapter
from lamina.errors import AdapterError

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {r"layers\.2\.self_attn\.q_proj": 2, "q_proj|up_proj": 5, "layers.0.mlp.gate_proj": 3},
    "alpha_pattern": {"q_proj": 3, r"layers\.[01]\.mlp\.up_proj": 7.5},
}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, PEFT's
    "all": ({}, {"target_modules": "all-linear"}),
    "names": ({"targets": ("q_proj", "v_proj")}, {"target_modules": ["q_proj", "v_proj"]}),
    "layers": (
        {"targets": ("mlp.up_proj",), "layers": "0,2-3"},
        {"target_modules": ["mlp.up_proj"], "layers_to_transform": [0, 2, 3]},
    ),
    "expression": (
        {"targets": (r"layers\.(0|3)\.self_attn\.(q|o)_proj",)},
        {"target_modules": r".*layers\.(0|3)\.self_attn\.(q|o)_proj"},
    ),
    "patterns": (PATTERNS, {"target_modules": SEVEN, **PATTERNS}),
    "rslora": (
        {"rslora": True, "rank": 7, **PATTERNS},
        {"use_rslora": True, "r": 7, "target_modules": SEVEN, **PATTERNS},
    ),
}


def lora_config(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})


def shaken(model: Any) -> Any:
    """PEFT's model with random numbers added to every A and B."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def guest_logits(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens[None]).logits[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_modules_ranks_and_scales(layout: str) -> None:
    from peft.tuners.lora import LoraLayer

    ours, theirs = LAYOUTS[layout]
    model = tiny(num_hidden_layers=4)
    guest = peft_model(hosted(model, num_hidden_layers=4), lora_config(**theirs))
    expected = {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in guest.named_modules()
        if path.startswith("base_model.model.model.layers") and isinstance(module, LoraLayer)
    }
    found = attach(model, LoRA(**{"rank": 4, "alpha": 6, **ours}))
    assert {path: (module.a.shape[0], module.scale) for path, module in found.items()} == expected


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", layout) for layout in LAYOUTS]
    + [(family, layout) for family in ("llama-grouped", "mistral", "qwen2", "qwen3") for layout in ("all", "rslora")],
)
def test_an_adapter_written_here_has_the_same_bits_in_peft(family: str, layout: str, tmp_path: Path) -> None:
    lora = LoRA(**{"rank": 4, "alpha": 6, "dropout": 0.1, **LAYOUTS[layout][0]})
    model, tokens = tiny(family, num_hidden_layers=4), some_tokens([20])
    guest = hosted(model, family, num_hidden_layers=4)
    base = guest_logits(guest, tokens)
    for module in attach(model, lora).values():
        nn.init.normal_(module.b, std=0.1)
    save_adapter(model, tmp_path, lora, "some/base")
    there = guest_logits(peft_model(guest, tmp_path).eval(), tokens)
    assert torch.equal(there, logits(model, tokens))
    assert not torch.equal(there, base)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_written_by_peft_has_the_same_bits_here(layout: str, tmp_path: Path) -> None:
    model, tokens = tiny(num_hidden_layers=4), some_tokens([20])
    guest = shaken(peft_model(hosted(model, num_hidden_layers=4), lora_config(lora_dropout=0.1, **LAYOUTS[layout][1])))
    save_peft(guest, tmp_path)
    load_adapter(model, tmp_path)
    assert torch.equal(guest_logits(guest, tokens), logits(model, tokens))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["model.layers.1.self_attn.k_proj", "down_proj"]},
        {"target_modules": ["q_proj", "c_attn", "w1"]},
        {"target_modules": ["v_proj"], "layers_to_transform": 2},
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": r"layers\.0.*q_proj|.*v_proj"},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, "wte": 3}, "alpha_pattern": {"nothing": 2}},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj"], "init_lora_weights": False},
    ],
    ids=str,
)
def test_whatever_peft_accepts_as_targets(settings: dict[str, Any], tmp_path: Path) -> None:
    model, tokens = tiny(num_hidden_layers=4), some_tokens([20])
    guest = shaken(peft_model(hosted(model, num_hidden_layers=4), lora_config(**settings)))
    save_peft(guest, tmp_path)
    load_adapter(model, tmp_path)
    assert torch.equal(guest_logits(guest, tokens), logits(model, tokens))


def test_a_bf16_adapter_of_peft_is_read_into_fp32_masters(tmp_path: Path) -> None:
    model = tiny()
    save_peft(shaken(peft_model(hosted(model), lora_config(target_modules=["q_proj"]))).to(torch.bfloat16), tmp_path)
    load_adapter(model, tmp_path)
    for module in adapted(model).values():
        assert module.a.dtype == torch.float32 and torch.equal(module.a, module.a.bfloat16().float())


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # PEFT's advice on lora_bias
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, "compute: use_dora$"),
        ({"bias": "all"}, "compute: bias$"),
        ({"modules_to_save": ["lm_head"]}, "compute: modules_to_save$"),
        ({"trainable_token_indices": [1, 2]}, "compute: trainable_token_indices$"),
        ({"exclude_modules": ["v_proj"]}, "compute: exclude_modules$"),
        ({"lora_bias": True}, "compute: lora_bias$"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "compute: layer_replication$"),
        ({"init_lora_weights": "pissa"}, "compute: init_lora_weights 'pissa', which changes the base's own weights$"),
        ({"init_lora_weights": "olora"}, "compute: init_lora_weights 'olora', which changes the base's own weights$"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' matches no linear of the model"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "unexpected .*embed_tokens.lora_embedding_A"),
    ],
    ids=str,
)
def test_what_is_not_computed_here_is_refused(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    """The feature is used, so that the name in the file is PEFT's own."""
    model = tiny()
    guest = peft_model(hosted(model), lora_config(**{"target_modules": ["q_proj", "v_proj"], **settings}))
    save_peft(guest, tmp_path)
    with pytest.raises(AdapterError, match=text):
        load_adapter(model, tmp_path)
    assert not adapted(model)


def test_every_setting_of_peft_is_read_ignored_with_reason_or_refused() -> None:
    """PEFT's defaults pass; a setting that is new in PEFT comes to light here when its default is refused."""
    from lamina.adapter_files import _IGNORED, _OFF, _READ

    written = lora_config(target_modules=["q_proj"]).to_dict()
    assert written.keys() >= _READ
    assert not {key: value for key, value in written.items() if value and key not in _READ | _IGNORED | _OFF.keys()}


def test_peft_reads_every_key_that_is_written_here(tmp_path: Path) -> None:
    model = tiny()
    attach(model, LoRA(rank=4))
    save_adapter(model, tmp_path, LoRA(rank=4), "some/base")
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written.keys() <= lora_config(target_modules=["q_proj"]).to_dict().keys()
