"""What is trained: a random Llama, tokenised rows and an adapter to begin with, written once as files for all arms."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
ROWS, LONGEST, IGNORED, SEED = 256, 512, -100, 1


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and the adapter's rank."""

    width: int = 768
    layers: int = 12
    mlp: int = 2048
    heads: int = 12
    vocabulary: int = 32_000
    rank: int = 64


TINY = Shape(width=64, layers=2, mlp=128, heads=4, rank=8)


@dataclass(frozen=True)
class Files:
    """Where everything lies. ``whole`` and ``answers`` hold the rows with all and with only the answers' targets."""

    model: Path
    adapter: Path
    whole: Path
    answers: Path
    gate: Path
    about: str


def prepare(build: Path, shape: Shape) -> Files:
    """Writes the workload under ``build``; what is there already is kept."""
    folder = build / f"llama-{shape.width}x{shape.layers}-r{shape.rank}"
    files = Files(
        *(folder / name for name in ("model", "adapter", "whole.jsonl", "answers.jsonl", "gate.jsonl")), about=about()
    )
    stamp, expected = folder / "made.json", asdict(shape) | {"rows": files.about, "version": 2}
    if not stamp.exists() or json.loads(stamp.read_text(encoding="utf-8")) != expected:
        _write_model(files.model, shape)
        _write_adapter(files, shape)
        _write_rows(files)
        stamp.write_text(json.dumps(expected), encoding="utf-8")
    return files


def about() -> str:
    """Which rows these are."""
    real = (DATA / "guanaco-llama2-1k").is_dir() and (DATA / "llama2-tokenizer").is_dir()
    return f"{'guanaco-llama2-1k' if real else 'synthetic'}[:{ROWS}] cut at {LONGEST}"


def _write_model(folder: Path, shape: Shape) -> None:
    """A Llama with transformers' own random weights, in bf16, and a tokenizer of which only the end token is ever used."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def _write_adapter(files: Files, shape: Shape) -> None:
    """An adapter in PEFT's format. B is small but not zero, so that A has a gradient in the first step too."""
    import torch
    from safetensors.torch import load_file, save_file

    from lamina import LoRA, attach, load_model, save_adapter

    model = load_model(files.model, "bf16", "cpu")
    lora = LoRA(rank=shape.rank, alpha=16.0)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for module in attach(model, lora, SEED).values():
            module.b.normal_(0.0, 0.01, generator=generator)
    save_adapter(model, files.adapter, lora, str(files.model))
    weights = files.adapter / "adapter_model.safetensors"
    # Without Lamina's mark of the base, as PEFT writes it: the files are kept, and other versions of Lamina read them too.
    save_file(load_file(weights), weights, metadata={"format": "pt"})


def _write_rows(files: Files) -> None:
    """The gate's four rows are two whole ones and two with targets in the answers only, two for each of its steps."""
    rows = list(_real_rows() if files.about.startswith("guanaco") else _synthetic_rows())
    whole = [_row(tokens, np.arange(len(tokens)) > 0) for tokens, _ in rows]
    answers = [_row(tokens, trained) for tokens, trained in rows if trained.any()]  # some answers lie beyond the cut
    for path, chosen in (
        (files.whole, whole[:ROWS]),
        (files.answers, answers[:ROWS]),
        (files.gate, [whole[0], answers[1], whole[2], answers[3]]),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def _row(tokens: np.ndarray, trained: np.ndarray) -> dict[str, Any]:
    return {"input_ids": tokens.tolist(), "labels": np.where(trained, tokens, IGNORED).tolist()}


def _real_rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from lamina import load_tokenizer, read_examples, render

    tokenizer = load_tokenizer(DATA / "llama2-tokenizer")
    for count, example in enumerate(read_examples(DATA / "guanaco-llama2-1k")):
        if count == ROWS + 64:  # some more, for those without an answer before the cut
            break
        row = render(example, tokenizer)
        yield row.tokens[:LONGEST], row.trained[:LONGEST]


def _synthetic_rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random tokens in rows of lengths like the real ones: log-normal, median 377, a good third of them cut."""
    random = np.random.default_rng(SEED)
    for _ in range(ROWS):
        length = int(np.clip(random.lognormal(np.log(377), 0.7), 16, LONGEST))
        tokens = random.integers(3, 32_000, length)
        yield tokens, np.arange(length) >= max(1, round(0.3 * length))
