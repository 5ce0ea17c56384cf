"""Adapters on disk: read back as written, and every refusal by its text. Files between here and PEFT are in tests/parity."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import logits, some_tokens, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lamina.adapter import LoRA, adapted, attach
from lamina.adapter_files import CONFIG, WEIGHTS, fingerprint, load_adapter, outline_adapter, read_config, save_adapter
from lamina.errors import AdapterError, CheckpointError
from lamina.model.decoder import Decoder

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
LAYOUTS = [
    LoRA(rank=4),
    LoRA(rank=4, alpha=7.5, rslora=True, dropout=0.1, targets=("q_proj", "v_proj")),
    LoRA(rank=4, layers="1-2", targets=("mlp.up_proj", "o_proj")),
    LoRA(rank=4, targets=(r"layers\.0\.self_attn\.q_proj", r"layers\.[12]\.mlp\.down_proj")),
    LoRA(rank=4, layers="0,2", rank_pattern={"q_proj": 2, r"layers\.2\..*": 3}, alpha_pattern={"up_proj": 3.0}),
]


def trained(lora: LoRA, seed: int = 0, **changes: Any) -> Decoder:
    """A tiny model with an adapter whose B is not zero."""
    model = tiny(num_hidden_layers=3, **changes)
    for module in attach(model, lora, seed).values():
        nn.init.normal_(module.b, std=0.1)
    return model


def refusal(folder: Path, model: Decoder | None = None) -> str:
    """The message with which an adapter is refused; the model must be the base again."""
    model = model or tiny(num_hidden_layers=3)
    with pytest.raises(AdapterError) as error:
        load_adapter(model, folder)
    assert not adapted(model)
    return str(error.value)


def change(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(trained(LoRA(rank=4)), tmp_path, LoRA(rank=4), "some/base")
    return tmp_path


@pytest.mark.parametrize("lora", LAYOUTS)
def test_read_back_as_written(lora: LoRA, tmp_path: Path) -> None:
    model, tokens = trained(lora), some_tokens([20])
    save_adapter(model, tmp_path / "new" / "adapter", lora, "some/base", "main")
    again = tiny(num_hidden_layers=3)
    read = load_adapter(again, tmp_path / "new" / "adapter")
    assert list(adapted(again)) == list(adapted(model))
    for path, module in adapted(model).items():
        other = adapted(again)[path]
        assert torch.equal(module.a, other.a) and torch.equal(module.b, other.b)
        assert (module.scale, module.dropout) == (other.scale, other.dropout)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    save_adapter(again, tmp_path / "again", read, "some/base", "main")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / "adapter" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [CONFIG, WEIGHTS]


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    """The library writes metadata in an order that is random for every file: twenty files, one content."""
    model = trained(LoRA(rank=4))
    found = set()
    for _ in range(20):
        save_adapter(model, tmp_path, LoRA(rank=4), "some/base")
        found.add((tmp_path / WEIGHTS).read_bytes())
    assert len(found) == 1
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "lamina_base": fingerprint(model)}


def test_config_says_where_in_the_fewest_words() -> None:
    from lamina.adapter_files import _where

    assert _where(list(adapted(trained(LAYOUTS[0]))), LAYOUTS[0], 3)["layers_to_transform"] is None
    assert _where(list(adapted(trained(LAYOUTS[2]))), LAYOUTS[2], 3) == {
        "target_modules": ["o_proj", "up_proj"],
        "layers_to_transform": [1, 2],
    }
    assert _where(list(adapted(trained(LAYOUTS[3]))), LAYOUTS[3], 3)["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    ]


def test_nothing_there(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: found no adapter_config.json, so this is no adapter folder"


def test_weights_absent_or_pickled(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    assert refusal(saved) == f"{saved}: found no adapter_model.safetensors"
    (saved / "adapter_model.bin").touch()
    assert refusal(saved).endswith("is a pickle and is not read: save it again with safe_serialization=True)")


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_damaged_weights(saved: Path, kept: int) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:kept])
    assert re.search(r"damaged or incomplete \(.*\); copy it again from where it was written$", refusal(saved))


def test_broken_config(saved: Path) -> None:
    (saved / CONFIG).write_text('{\n "r": 8,\n oops')
    assert refusal(saved).startswith(f"{saved / CONFIG}:3: broken JSON (Expecting property name")


def test_another_kind_of_adapter(saved: Path) -> None:
    change(saved, peft_type="IA3")
    assert refusal(saved) == f"{saved / CONFIG}: found peft_type 'IA3', expected 'LORA'"
    (saved / CONFIG).write_text("[1]")
    assert refusal(saved) == f"{saved / CONFIG}: found peft_type [1], expected 'LORA'"


FOREIGN = {
    "use_dora": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "target_parameters": ["experts.up"],
    "exclude_modules": ["q_proj"],
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "alora_invocation_tokens": [1, 2],
    "not_yet_invented": 3,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_feature_that_is_not_computed_is_refused_by_name(saved: Path, name: str) -> None:
    change(saved, **{name: FOREIGN[name]})
    assert refusal(saved) == f"{saved / CONFIG}: asks for what Lamina does not compute: {name}"


def test_all_features_are_named_at_once(saved: Path) -> None:
    change(saved, **FOREIGN)
    assert refusal(saved).endswith(": " + ", ".join(sorted(FOREIGN)))


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "mica"])
def test_adapters_of_a_changed_base_are_refused(saved: Path, way: str) -> None:
    change(saved, init_lora_weights=way)
    assert refusal(saved).endswith(f": init_lora_weights '{way}', which changes the base's own weights")


@pytest.mark.parametrize("way", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_other_ways_to_draw_do_not_matter(saved: Path, way: object) -> None:
    change(saved, init_lora_weights=way)
    load_adapter(tiny(num_hidden_layers=3), saved)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"r": None}, "rank: found none, expected an integer ≥ 1"),
        (
            {"r": "8", "lora_alpha": -1},
            "rank: found '8', expected an integer ≥ 1; alpha: found -1, expected a number > 0",
        ),
        ({"target_modules": None}, "targets: found none, expected a list of texts"),
        ({"target_modules": {"q_proj": 1}}, "targets: found {q_proj = 1}, expected a list of texts"),
        ({"layers_to_transform": [-1]}, "layers: found '-1', expected text that matches"),
    ],
)
def test_config_out_of_range(saved: Path, values: dict[str, Any], text: str) -> None:
    change(saved, **values)
    assert refusal(saved).startswith(f"{saved / CONFIG}: {text}")


def test_targets_that_the_model_lacks(saved: Path) -> None:
    change(saved, target_modules=["c_attn"])
    assert "does not fit the model: adapter.targets: found nothing to adapt" in refusal(saved)
    change(saved, target_modules=["("])
    assert "does not fit the model: adapter.targets: found nothing" in refusal(saved)
    change(saved, target_modules=["q_proj"], layers_to_transform=[7])
    assert "does not fit the model: adapter.layers: found '7', expected layers between 0 and 2" in refusal(saved)


def test_a_broken_expression(saved: Path) -> None:
    change(saved, target_modules="(")
    assert "targets: '^(?:()' is no regular expression" in refusal(saved)
    change(saved, target_modules=["q_proj"], rank_pattern={"[": 2})
    assert "rank_pattern: '[' is no regular expression" in refusal(saved)


def test_every_misfit_is_listed_in_one_error(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 32)
    del tensors[f"{Q0}.lora_A.weight"]
    tensors[f"{Q0}.lora_B.weight"] = torch.zeros(32, 5)
    tensors[f"{Q0.replace('0', '2')}.lora_A.weight"][1, 3] = float("inf")
    tensors[f"{Q0.replace('0', '2')}.lora_B.weight"][1, 3] = float("nan")
    save_file(tensors, saved / WEIGHTS)
    found = refusal(saved).partition(f"{saved}: this adapter does not fit the model (5 misfits): ")[2]
    assert set(found.split("; ")) == {
        f"missing {Q0}.lora_A.weight",
        "unexpected base_model.model.lm_head.lora_A.weight",
        f"{Q0}.lora_B.weight has shape [32, 5], the model's takes [32, 4]",
        f"{Q0.replace('0', '2')}.lora_A.weight holds non-finite numbers",
        f"{Q0.replace('0', '2')}.lora_B.weight holds non-finite numbers",
    }


def test_tensors_of_a_target_all_missing(saved: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(saved / WEIGHTS).items() if "v_proj" not in name}
    save_file(tensors, saved / WEIGHTS)
    assert "(6 misfits): missing base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight" in refusal(saved)


def test_another_base(saved: Path) -> None:
    other = tiny(num_hidden_layers=3, seed=1)
    assert re.fullmatch(
        rf"{re.escape(str(saved))}: this adapter was trained on another base \(fingerprint \w{{12}}\) than the model at "
        rf"hand \({fingerprint(other)[:12]}\); load the base it was trained on",
        refusal(saved, other),
    )


def test_a_second_adapter(saved: Path) -> None:
    model = tiny(num_hidden_layers=3)
    load_adapter(model, saved)
    with pytest.raises(AdapterError, match="already carries an adapter"):
        load_adapter(model, saved)
    assert len(adapted(model)) == 21


def test_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    """As before the first step: it would load and do nothing, and nobody would be told."""
    model = tiny(num_hidden_layers=3)
    modules = attach(model, LoRA(rank=4))
    save_adapter(model, tmp_path, LoRA(rank=4), "some/base")
    assert refusal(tmp_path) == (
        f"{tmp_path}: this adapter changes nothing: every B is zero, as before the first step; train it, or use the base "
        "without it"
    )
    next(reversed(modules.values())).b.data[0, 0] = 1e-6  # one number is enough
    save_adapter(model, tmp_path, LoRA(rank=4), "some/base")
    load_adapter(tiny(num_hidden_layers=3), tmp_path)


@pytest.mark.parametrize("lora", LAYOUTS)
def test_an_adapter_on_an_outline(lora: LoRA, tmp_path: Path) -> None:
    model = trained(lora)
    save_adapter(model, tmp_path, lora, "some/base")
    outline = tiny(num_hidden_layers=3).to("meta")
    with pytest.raises(AdapterError, match="trained on another base"):
        outline_adapter(outline, tmp_path, "another")
    tensors = outline_adapter(outline, tmp_path, fingerprint(model))
    assert {path: module.scale for path, module in adapted(outline).items()} == {
        path: module.scale for path, module in adapted(model).items()
    }
    expected = {name: tensor for name, tensor in model.named_parameters() if name.endswith((".a", ".b"))}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_a_failed_save_leaves_the_last_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (saved / WEIGHTS).read_bytes()

    def full(*_: object, **__: object) -> None:
        (saved / (WEIGHTS + ".partial")).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lamina.adapter_files.save_file", full)
    with pytest.raises(
        CheckpointError, match=r"cannot be saved \(.*No space left on device\); what was saved there before"
    ):
        save_adapter(trained(LoRA(rank=4)), saved, LoRA(rank=4), "some/base")
    assert (saved / WEIGHTS).read_bytes() == before
    assert not list(saved.glob("*.partial"))


def test_config_alone(saved: Path) -> None:
    change(saved, r=3, lora_alpha=6, target_modules=["v_proj", "self_attn.q_proj"], layers_to_transform=1)
    assert read_config(saved) == LoRA(rank=3, alpha=6.0, targets=(r"self_attn\.q_proj", "v_proj"), layers="1")
