"""What is trained: a random Llama, tokenised rows and an adapter to begin with, written once as files for all arms."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import rows
from rows import DATA, SEED

VERSION = 3
LARGE = 2**31
"""Parameters from which on a model is written tensor by tensor, and not made in memory."""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and the adapter's rank, layers and dropout. ``kv_heads`` 0: as many as heads."""

    width: int = 768
    layers: int = 12
    mlp: int = 2048
    heads: int = 12
    vocabulary: int = 32_000
    rank: int = 64
    kv_heads: int = 0
    theta: float = 10_000.0
    adapted: str = "all"
    dropout: float = 0.0

    @property
    def parameters(self) -> int:
        """Numbers in the base model, norms not counted."""
        shared = self.width * self.width * (self.kv_heads or self.heads) // self.heads
        layer = 2 * self.width * self.width + 2 * shared + 3 * self.width * self.mlp
        return 2 * self.vocabulary * self.width + self.layers * layer


TINY = Shape(width=64, layers=2, mlp=128, heads=4, rank=8)
MODELS = {
    "tiny": TINY,
    "15m": Shape(width=192, layers=6, mlp=512, heads=6),
    "134m": Shape(),
    "1.1b": Shape(width=2048, layers=22, mlp=5632, heads=32, kv_heads=4),
    "7b": Shape(width=4096, layers=32, mlp=11008, heads=32),
    "8b": Shape(width=4096, layers=32, mlp=14336, heads=32, kv_heads=8, vocabulary=128_256, theta=500_000.0),
    "70b": Shape(width=8192, layers=80, mlp=28672, heads=64, kv_heads=8),
}
"""15 M, 134 M and 1.1 B (TinyLlama's shape) for a CPU; Llama-2-7B's, Llama-3-8B's and Llama-2-70B's for a GPU."""
ON_GPU = ("7b", "8b", "70b")
GATES = "134m"
"""On a GPU the gates ask this model: two steps of a large one in fp32 take minutes, and its gradients gigabytes."""


@dataclass(frozen=True)
class Files:
    """Where everything lies."""

    model: Path
    adapter: Path
    folder: Path

    def rows(self, workload: str) -> Path:
        """The rows of a workload."""
        return self.folder / f"{workload}.jsonl"

    @property
    def whole(self) -> Path:
        """The rows with all targets."""
        return self.rows("whole")

    @property
    def about(self) -> str:
        """Which rows ``whole`` has."""
        return rows.about("whole", self.folder)

    @property
    def name(self) -> str:
        """Model and adapter, as the results name them."""
        return self.model.parent.name + "-" + self.adapter.name.removeprefix("adapter-")


def prepare(build: Path, shape: Shape) -> Files:
    """Writes the workload under ``build``; what is there already is kept."""
    folder = build / f"llama-{shape.width}x{shape.layers}"
    layers = "" if shape.adapted == "all" else f"-layers{shape.adapted}"
    dropout = f"-dropout{shape.dropout}" if shape.dropout else ""
    adapter = folder / f"adapter-r{shape.rank}{layers}{dropout}"
    files = Files(folder / "model", adapter, rows.write(build / "rows"))
    base = {k: v for k, v in asdict(shape).items() if k not in ("rank", "adapted", "dropout")} | {"version": VERSION}
    if _stale(folder / "made.json", base):
        _write_model(files.model, shape)
        (folder / "made.json").write_text(json.dumps(base), encoding="utf-8")
    if _stale(adapter / "made.json", asdict(shape)):
        _write_adapter(files, shape)
        (adapter / "made.json").write_text(json.dumps(asdict(shape)), encoding="utf-8")
    return files


def _stale(stamp: Path, expected: dict[str, object]) -> bool:
    return not stamp.exists() or json.loads(stamp.read_text(encoding="utf-8")) != expected


def _write_model(folder: Path, shape: Shape) -> None:
    """A Llama with random weights, in bf16 (in fp16 where it is large), and a tokenizer of which only the end token is ever used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    if shape.parameters < LARGE:
        _initialise(folder, shape)
    else:
        import checkpoint

        folder.mkdir(parents=True, exist_ok=True)
        for file in checkpoint.write(folder.parent, shape).iterdir():
            file.rename(folder / file.name)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def _initialise(folder: Path, shape: Shape) -> None:
    """transformers' own random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _write_adapter(files: Files, shape: Shape) -> None:
    """An adapter in PEFT's format. B is small but not zero, so that A has a gradient in the first step too."""
    import torch
    from safetensors.torch import load_file, save_file

    from lamina import LoRA, attach, save_adapter
    from lamina.model.weights import outline

    model, _ = outline(files.model, torch.bfloat16)
    model.to_empty(device="cpu")  # an adapter asks for the shapes alone: the weights are never read, nor touched
    model.fingerprint = ""
    lora = LoRA(rank=shape.rank, alpha=16.0, layers=shape.adapted, dropout=shape.dropout)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for module in attach(model, lora, SEED).values():
            module.b.normal_(0.0, 0.01, generator=generator)
    save_adapter(model, files.adapter, lora, str(files.model))
    weights = files.adapter / "adapter_model.safetensors"
    # Without Lamina's mark of the base, as PEFT writes it: the files are kept, and other versions of Lamina read them too.
    save_file(load_file(weights), weights, metadata={"format": "pt"})


__all__ = ["DATA", "MODELS", "ON_GPU", "SEED", "TINY", "Files", "Shape", "prepare"]
