"""Reads llama2.c's files (Karpathy 2023): a real pretrained Llama, small enough for tests, with a published story."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def convert(source: Path, folder: Path) -> Path:
    """Writes a llama2.c checkpoint (legacy format, shared classifier) as a Hugging Face folder."""
    raw = source.read_bytes()
    width, mlp, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", raw[:28])
    numbers, at = np.frombuffer(raw, dtype=np.float32, offset=28), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return torch.from_numpy(numbers[at - count : at].copy()).view(shape)

    def unpair(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """llama2.c turns neighbours (x0, x1), Hugging Face halves (x0, x_{h/2}): reorder the rows of each head."""
        return weight.view(heads, -1, 2, width).transpose(1, 2).reshape(-1, width).contiguous()

    narrow = width // heads * kv_heads
    out = {"model.embed_tokens.weight": take(vocabulary, width)}
    for name, shape in {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
        "mlp.up_proj": (mlp, width),
    }.items():
        for layer in range(layers):
            weight = take(*shape)
            if name.endswith(("q_proj", "k_proj")):
                weight = unpair(weight, heads if name.endswith("q_proj") else kv_heads)
            out[f"model.layers.{layer}.{name}.weight"] = weight
    out["model.norm.weight"] = take(width)
    save_file(out, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": abs(vocabulary),
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tokenizer(file: Path, size: int = 512) -> Callable[[Sequence[int]], str]:
    """The decoding half of llama2.c's tokenizer file: per piece a score, a length and its bytes."""
    raw, at, pieces = file.read_bytes(), 4, []
    for _ in range(size):
        _, length = struct.unpack_from("fi", raw, at)
        piece = raw[at + 8 : at + 8 + length]
        at += 8 + length
        byte = piece.startswith(b"<0x") and len(piece) == 6
        pieces.append(bytes([int(piece[3:5], 16)]) if byte else piece)
    return lambda tokens: b"".join(pieces[token] for token in tokens).decode()
