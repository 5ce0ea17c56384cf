"""Tiny models on disk, written without transformers: a config and random weights under the checkpoint's names."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lamina.model.architecture import read_architecture
from lamina.model.decoder import Decoder

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def tensors(dtype: torch.dtype = torch.float32, std: float = 1 / 8, **changes: Any) -> dict[str, Tensor]:
    """Random weights for ``CONFIG`` with ``changes``."""
    with torch.device("meta"):
        model = Decoder(read_architecture(CONFIG | changes, "config.json"))
    generator = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(parameter.shape, generator=generator) * std + float("norm" in name)).to(dtype)
        for name, parameter in model.named_parameters()
    }


def write_tiny(
    folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, std: float = 1 / 8, **changes: Any
) -> Path:
    """Writes a model's config and weights, in one file or in ``shards`` with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    write_weights(folder, tensors(dtype, std, **changes), shards)
    return folder


def write_weights(folder: Path, weights: dict[str, Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    places = {name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(weights)}
    for shard in sorted(set(places.values())):
        save_file({name: weights[name] for name in weights if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
