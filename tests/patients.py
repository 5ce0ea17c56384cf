"""Bases and jobs for the doctor: checkpoints of the true width whose weights take no room, for no rule reads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import shared_data
from tiny import CONFIG

from lamina.model.architecture import read_architecture
from lamina.model.decoder import Decoder

SEVEN_B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def hollow(folder: Path, chat: bool = True, **changes: Any) -> Path:
    """A checkpoint with Llama-2's tokenizer, of Llama-2-7B's shape or another one, whose weights are a hole in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | SEVEN_B | changes
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Decoder(read_architecture(config, "config.json"))
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        size = 2 * parameter.numel()
        header[name] = {"dtype": "F16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    for file_name in TOKENIZER:
        shutil.copyfile(shared_data("llama2-tokenizer") / file_name, folder / file_name)
    if not chat:
        (folder / "chat_template.jinja").unlink()
    return folder
