import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIG

from lamina.errors import ModelError
from lamina.model.architecture import FAMILIES, Architecture, Rope, read_architecture, read_config

LLAMA2_7B = """{"_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "architectures": ["LlamaForCausalLM"],
"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
"intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
"num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
"rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0",
"use_cache": true, "vocab_size": 32000}"""

LLAMA32_1B = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
"mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
"num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
"high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
"rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
"use_cache": true, "vocab_size": 128256}"""

QWEN25_05B = """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
"eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
"intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
"transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}"""

MISTRAL_7B = """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
"model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
"torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}"""


def read(**changes: Any) -> Architecture:
    """The architecture of a small llama with ``changes``; a value of ... removes the key."""
    config = CONFIG | changes
    return read_architecture({key: value for key, value in config.items() if value is not ...}, "config.json")


def test_llama2_7b() -> None:
    assert read_architecture(json.loads(LLAMA2_7B), "") == Architecture(
        family="llama",
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_width=128,
        mlp_width=11008,
        vocabulary=32000,
        norm_eps=1e-5,
        rope=Rope(10000.0),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied=False,
        windows=(None,) * 32,
        max_position=4096,
    )


def test_llama32() -> None:
    a = read_architecture(json.loads(LLAMA32_1B), "")
    assert a.rope == Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert (a.tied, a.head_width, a.kv_heads) == (True, 64, 8)


def test_qwen25_has_biases_on_q_k_v_and_no_window() -> None:
    a = read_architecture(json.loads(QWEN25_05B), "")
    assert (a.qkv_bias, a.output_bias, a.mlp_bias, a.qk_norm) == (True, False, False, False)
    assert a.windows == (None,) * 24


def test_mistral_has_its_window_in_every_layer() -> None:
    assert read_architecture(json.loads(MISTRAL_7B), "").windows == (4096,) * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_5_writes_is_read_and_means_the_same(family: str) -> None:
    """Also with every default left in place: each key that transformers writes is known here."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    a = read_architecture(config.to_dict() | {"model_type": family}, "config.json")
    assert (a.width, a.layers, a.heads) == (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert (a.kv_heads, a.mlp_width, a.vocabulary) == (
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    )
    assert a.rope.theta == config.rope_parameters["rope_theta"]
    assert a.max_position == config.max_position_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    least = {"hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32}
    least |= {"intermediate_size": 64, "vocab_size": 100}
    full = AutoConfig.for_model(family, **least).to_dict()
    assert read_architecture({"model_type": family, **least}, "") == read_architecture(full, "")


def test_explicit_null_head_counts_mean_as_many_as_query_heads() -> None:
    a = read(num_key_value_heads=None, head_dim=None)
    assert (a.kv_heads, a.head_width) == (4, 8)


def test_qwen_windows_start_at_max_window_layers() -> None:
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    assert read(model_type="qwen2", **window).windows == (None, 16)


def test_layer_types_say_where_the_windows_are() -> None:
    kinds = ["sliding_attention", "full_attention"]
    a = read(model_type="qwen3", use_sliding_window=True, sliding_window=16, layer_types=kinds)
    assert a.windows == (16, None)


def test_biases_of_llama() -> None:
    a = read(attention_bias=True, mlp_bias=True)
    assert a.qkv_bias
    assert a.output_bias
    assert a.mlp_bias


def test_scaling_of_transformers_4_and_5_is_the_same() -> None:
    old = read(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5000)
    new = read(rope_theta=..., rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    assert old.rope == new.rope == Rope(5000.0, "linear", 2.0)


def test_unknown_keys_that_are_off_are_accepted() -> None:
    read(some_new_switch=False, another=None, empty={}, none=[], use_cache=True, unsloth_version="2026.1")


@pytest.mark.parametrize("family", ["mixtral", "gemma2", "phi3", "gpt2", None])
def test_other_families_are_refused_by_name(family: str | None) -> None:
    expected = rf"config.json: model_type is {family!r}; the decoder computes llama, mistral, qwen2, qwen3"
    with pytest.raises(ModelError, match=expected):
        read(model_type=family)


REFUSED = {
    "hidden_act": ({"hidden_act": "gelu"}, r'hidden_act "gelu" \(computed: silu\)'),
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
        r"RoPE scaling 'yarn' \(computed: default, linear, llama3\)$",
    ),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic'"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "RoPE scaling 'longrope'"),
    "unknown rope key": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.2}},
        r"unknown key rope_scaling.attention_factor = 1.2",
    ),
    "rope per layer type": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters: found .*, expected one flat object for all layers",
    ),
    "llama3 without factors": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling.low_freq_factor: missing, expected a number above 0; rope_scaling.high_freq_factor: missing",
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5 \(computed: 1\)"),
    "partial rotary in rope": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        r"rope_parameters.partial_rotary_factor 0.25 \(computed: 1\)",
    ),
    "dropout": ({"attention_dropout": 0.1}, r"attention_dropout 0.1 \(computed: 0\)"),
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config: the weights are stored quantised by gptq, computed are bitsandbytes' 4-bit and 8-bit forms; name "
        "the unquantised model that this one was made from as --model, with --base nf4 for four bits",
    ),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised by awq"),
    "own code": (
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        "auto_map: the checkpoint brings its own code",
    ),
    "softcapping": ({"final_logit_softcapping": 30.0}, "unknown key final_logit_softcapping = 30.0"),
    "window in llama": ({"sliding_window": 512}, "unknown key sliding_window = 512"),
    "mixed llama layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types .*: llama attends in the same way in every layer",
    ),
    "linear attention": (
        {"model_type": "qwen3", "layer_types": ["linear_attention", "full_attention"]},
        r"layer_types linear_attention \(computed: full_attention, sliding_attention\)",
    ),
    "short layer_types": (
        {"model_type": "qwen3", "layer_types": ["full_attention"]},
        "layer_types: found .*, expected a list of 2 names",
    ),
    "window without size": (
        {"model_type": "qwen2", "layer_types": ["sliding_attention", "full_attention"]},
        "layer_types names sliding_attention, but use_sliding_window and sliding_window do not set a window",
    ),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    "width": (
        {"hidden_size": 34},
        "hidden_size 34 is not a multiple of num_attention_heads 4 and head_dim is not given",
    ),
    "odd head": ({"head_dim": 9}, "head_dim 9 is odd; rotary positions turn pairs"),
    "missing": ({"hidden_size": ...}, "hidden_size: missing, expected an integer of at least 1"),
    "text for a number": ({"vocab_size": "many"}, 'vocab_size: found "many", expected an integer of at least 1'),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers: found 0, expected an integer of at least 1"),
    "negative epsilon": ({"rms_norm_eps": -1}, "rms_norm_eps: found -1, expected a number above 0"),
    "text for a switch": ({"mlp_bias": "yes"}, 'mlp_bias: found "yes", expected true or false'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ModelError, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json: the decoder does not compute this model: ")
    assert "\n" not in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        read(hidden_act="relu", mlp_bias=1.5, vocab_size=None, query_scale=0.3, rope_scaling={"type": "ntk"})
    for name in ("hidden_act", "mlp_bias", "vocab_size", "query_scale", "'ntk'"):
        assert name in str(caught.value)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json; a model folder holds config.json, \*.safetensors"):
        read_config(tmp_path)


def test_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(
        ModelError, match=r"config.json: not valid JSON \(.*line 1 column 16.*\); download the file again"
    ):
        read_config(tmp_path)


def test_config_that_is_not_an_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"config.json: found a JSON list, expected an object"):
        read_config(tmp_path)
