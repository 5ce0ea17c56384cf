"""Bases and jobs for the doctor: checkpoints of the true width whose weights take no room, for no rule reads them."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import shared_data
from tiny import CONFIG

from lamina import jobfile
from lamina.doctor.checkup import check
from lamina.job import SECTIONS, Job
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
REFERENCE = (
    "demo", "guanaco-7b", "kdnuggets", "kdnuggets-faithful", "miniguanaco", "miniguanaco-faithful", "origin", "origin-faithful",
)  # fmt: skip
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


def built_in(name: str, **changes: Any) -> Job:
    """A built-in job with some settings changed: ``model={"device": "cpu"}``."""
    job = Job.of(jobfile.load(name, SECTIONS))
    return replace(job, **{part: replace(getattr(job, part), **values) for part, values in changes.items()})


def reference(name: str, place: Path) -> Job:
    """A reference job as it is, on a base of the true shape, with its data or rows of their form."""
    if name == "demo":
        return built_in(name)
    chat = name.startswith(("miniguanaco", "origin"))
    base = hollow(place / "base", chat=chat, max_position_embeddings=2048 if name == "guanaco-7b" else 4096)
    if chat:
        data = str(shared_data("guanaco-llama2-1k"))
    elif name == "guanaco-7b":
        made = [
            {"text": f"### Human: What is {n} and {n}?### Assistant: It is {2 * n}, as always."} for n in range(1200)
        ]
        data = write_rows(place / "rows.jsonl", made)
    else:
        task = "Write a sentence that contradicts the input. Answer in JSON."
        answer = '{{"contradiction": "Nobody mends the {} nets."}}'
        rows = [
            {"instruction": task, "input": f"{n} people mend nets.", "output": answer.format(n)} for n in range(1200)
        ]
        data = write_rows(place / "rows.jsonl", rows)
    return built_in(
        name,
        model={"model": str(base), "device": "cpu"},
        data={"data": data},
        train={"memory_gib": 24.0},  # not what happens to be free
    )


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    """Writes rows as JSON lines; a text stands for itself, broken as it may be."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def golden(name: str, place: Path) -> str:
    """What the doctor finds in a reference job, as its golden file holds it: the lists of rows by their beginning."""
    found = check(reference(name, place)).diagnosis.as_json()
    for finding in found["findings"]:
        finding["rows"] = finding["rows"][:10]
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"
