"""The decoder's logits are those of transformers: bit for bit in fp32 on a CPU, within the rule of the house in bf16."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared_data
from llama2c import convert, tokenizer
from torch import Tensor
from torch.nn import functional as F

from lamina.generation import Sampling, generate
from lamina.model.decoder import Decoder
from lamina.model.weights import load_model
from lamina.ops.attention import Packed

LENGTHS = (1, 7, 16, 17, 64, 200)
SIZE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-grouped": {"num_attention_heads": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {"head_dim": 24, "num_key_value_heads": 2},
    "llama-odd-sizes": {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 97},
    "llama3-rope": {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "code-llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "mistral-short-window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 16},
    "mistral-long-window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 4096},
    "mistral-no-window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2-windows": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-biases-windows": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 40,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}


def write_model(folder: Path, changes: dict[str, Any]) -> Path:
    """A model that transformers makes and saves, every parameter random (its own initialisation has zero biases)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"model_type": "llama", **SIZE, **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.15)
    model.save_pretrained(folder)
    return folder


def peer(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in transformers, its weights moved to aligned memory as ours are.

    transformers leaves them where the file happens to be mapped, at addresses that are multiples of 8 only, and there
    the matrix-vector kernel of one-token inputs sums in another order: on the same weights it does not equal itself.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def logits(model: Decoder, *examples: Tensor) -> Tensor:
    position = torch.cat([torch.arange(len(tokens)) for tokens in examples])
    hidden = model(torch.cat(examples), position, Packed([len(tokens) for tokens in examples]))
    return F.linear(hidden, model.vocabulary)


@torch.no_grad()
def peer_logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens[None], use_cache=False).logits[0]


def text(length: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any, Path]:
    folder = write_model(tmp_path_factory.mktemp(request.param), MODELS[request.param])
    return load_model(folder, "fp32", "cpu"), peer(folder), folder


@pytest.mark.parametrize("length", LENGTHS)
def test_fp32_logits_equal_transformers_bit_for_bit(pair: tuple[Decoder, Any, Path], length: int) -> None:
    model, other, _ = pair
    tokens = text(length, model.architecture.vocabulary)
    assert torch.equal(logits(model, tokens), peer_logits(other, tokens))


def test_packed_examples_have_the_logits_they_have_alone(pair: tuple[Decoder, Any, Path]) -> None:
    """Matrix products over more rows may sum in another order, so close within fp32 sums of 172 terms, not equal."""
    model, other, _ = pair
    examples = [text(length, model.architecture.vocabulary) for length in (7, 1, 64, 40)]
    alone = torch.cat([peer_logits(other, tokens) for tokens in examples])
    # Each of about 30 operations on the way rounds relative to its largest term (2⁻²⁴ each); 1e-5 of the largest
    # logit is 170 such roundings. A leak between examples moves logits by their own size.
    assert torch.allclose(logits(model, *examples), alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


def test_bf16_is_no_worse_than_transformers_in_bf16(pair: tuple[Decoder, Any, Path]) -> None:
    """House rule: the error to the fp32 truth is at most 1.2 times that of the plain path in the same precision."""
    _, other, folder = pair
    tokens = text(200, other.config.vocab_size)
    truth = peer_logits(other, tokens)
    ours = logits(load_model(folder, "bf16", "cpu"), tokens).float() - truth
    theirs = peer_logits(peer(folder, torch.bfloat16), tokens).float() - truth
    assert ours.norm() <= 1.2 * theirs.norm()


def test_tinystories_checkpoint() -> None:
    folder = shared_data("tinystories-656k-hf")
    model, other = load_model(folder, "fp32", "cpu"), peer(folder)
    for length in LENGTHS:
        tokens = text(length, model.architecture.vocabulary)
        assert torch.equal(logits(model, tokens), peer_logits(other, tokens))


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = shared_data("stories260k")
    return convert(source / "stories260K.bin", tmp_path_factory.mktemp("stories260k"))


def test_stories260k_checkpoint(stories: Path) -> None:
    model, other = load_model(stories, "fp32", "cpu"), peer(stories)
    for length in LENGTHS:
        tokens = text(length, model.architecture.vocabulary)
        assert torch.equal(logits(model, tokens), peer_logits(other, tokens))


@pytest.mark.slow
def test_stories260k_tells_the_published_story(stories: Path) -> None:
    """The greedy text that its author publishes: 256 tokens of it, so a wrong position or mask anywhere would show."""
    source = shared_data("stories260k")
    published = (source / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    model, decode = load_model(stories, "fp32", "cpu"), tokenizer(source / "tok512.bin")
    (answer,) = generate(model, [[1]], Sampling(max_new_tokens=256), {1}, seed=0)
    tokens = torch.tensor([1, *answer.tokens, *[1] * answer.stopped])
    assert torch.equal(logits(model, tokens[:-1]).argmax(1), tokens[1:])  # greedy without generate's cache, too
    assert decode(list(answer.tokens)).strip() == published.strip()
