"""What arms need whose models have other names than Hugging Face's: the checkpoint's configuration and its files."""

import json
from pathlib import Path
from typing import Any


def hf_config(model: str) -> dict[str, Any]:
    """``config.json``, with the base of the rotary angles where older versions of transformers kept it."""
    config: dict[str, Any] = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    config.setdefault("rope_theta", config.get("rope_parameters", {}).get("rope_theta", 10_000.0))
    return config


def weight_files(model: str) -> list[Path]:
    """The shards of the weights."""
    return sorted(Path(model).glob("*.safetensors"))
