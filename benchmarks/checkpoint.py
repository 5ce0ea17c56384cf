"""A random checkpoint of Llama-2-7B's shape: as large as the true one, which a benchmark of loading needs and no more.

fp16 in three shards with their index, as the true one lies on the hub. It is written tensor by tensor, and a tensor piece by
piece, so that it takes a few megabytes of memory: a safetensors header depends on shapes alone and goes first. All numbers
are drawn (normal, std 0.02, as Llama's are initialised; norms are 1). At 290 M a second for one core that is half a minute of
13.5 GB, and less than the disk takes. Rejected: to cut the tensors from one pool of numbers, which saves nothing then. Where
there is a GPU it draws other numbers, in no time; the shards are written at one time then, and left to the page cache.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from workload import SEED, Shape

from lamina.model.architecture import read_architecture
from lamina.model.decoder import Decoder

LLAMA_2_7B = Shape(width=4096, layers=32, mlp=11008, heads=32, vocabulary=32_000, rank=16)
SHARDS, STD = 3, 0.02
PIECE = {"cpu": 2**22, "cuda": 2**26}
"""Numbers that are drawn at one time."""


def write(build: Path, shape: Shape) -> Path:
    """The folder of the checkpoint under ``build``; one that is there already is kept."""
    folder = build / f"llama-{shape.width}x{shape.layers}-fp16"
    if folder.exists():
        return folder
    print(f"writing {folder}: once", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = config_of(shape)
    (partial / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator, places, device = torch.Generator().manual_seed(SEED), {}, "cuda" if torch.cuda.is_available() else "cpu"
    with ThreadPoolExecutor(SHARDS if device == "cuda" else 1) as pool:
        written = []
        for number, tensors in enumerate(_shards(config), 1):
            name = f"model-{number:05}-of-{SHARDS:05}.safetensors"
            own = torch.Generator(device).manual_seed(SEED + number) if device == "cuda" else generator
            written.append(pool.submit(_write_shard, partial / name, tensors, own))
            places |= dict.fromkeys(tensors, name)
        for shard in written:
            shard.result()
    index = json.dumps({"metadata": {}, "weight_map": places})
    (partial / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    partial.rename(folder)
    return folder


def config_of(shape: Shape) -> dict[str, Any]:
    """``config.json`` of a Llama 2 of these sizes."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }


def _shards(config: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of each shard's tensors, in the model's order, in parts of about the same size."""
    with torch.device("meta"):
        shapes = {
            name: tuple(p.shape) for name, p in Decoder(read_architecture(config, "config.json")).named_parameters()
        }
    total, before = sum(map(math.prod, shapes.values())), 0
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    for name, shape in shapes.items():
        shards[SHARDS * before // total][name] = shape
        before += math.prod(shape)
    return shards


def _write_shard(file: Path, tensors: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            for numbers in _numbers(name, math.prod(shape), generator):
                out.write(numbers.data)
        out.flush()
        if generator.device.type == "cpu":
            os.fsync(out.fileno())


def _numbers(name: str, count: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    most = PIECE[generator.device.type]
    for first in range(0, count, most):
        piece = torch.ones(min(most, count - first), device=generator.device)
        if "norm" not in name:
            piece.normal_(0.0, STD, generator=generator)
        yield piece.half().cpu().numpy()
