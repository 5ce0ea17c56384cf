"""Tiny models with random weights, the same in Lamina's decoder and in transformers, and batches to feed them."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.data.render import Rendered
from lamina.model.architecture import read_architecture
from lamina.model.decoder import Decoder
from lamina.ops.attention import Packed

SIZE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-grouped": {"num_key_value_heads": 2},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """What ``config.json`` says of the tiny model of a family."""
    return {"model_type": "llama", **SIZE, **FAMILIES[family], **changes}


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Decoder:
    """A frozen decoder with random weights: norms about 1, the rest of standard deviation 0.15, biases too."""
    torch.manual_seed(seed)
    model = Decoder(read_architecture(config(family, **changes), "tests/models.py"))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.15)
    return model.to(dtype).requires_grad_(False).eval()


def hosted(model: Decoder, family: str = "llama", **changes: Any) -> Any:
    """The model of transformers with the weights of ``model``, which carries no adapter yet."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**config(family, **changes))
    guest = AutoModelForCausalLM.from_config(settings, dtype=model.vocabulary.dtype)
    misfit = guest.load_state_dict(model.state_dict(), strict=False)
    assert not misfit.unexpected_keys
    assert set(misfit.missing_keys) <= {"lm_head.weight"}  # tied
    guest.tie_weights()
    return guest.eval()


def peft_model(model: Any, folder_or_config: Any, **options: Any) -> Any:
    """PEFT around a model of transformers: a new adapter from a ``LoraConfig``, or the one in a folder."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(folder_or_config, LoraConfig):
        return get_peft_model(model, folder_or_config, **options)
    return PeftModel.from_pretrained(model, folder_or_config, **options)


def save_peft(model: Any, folder: Any) -> None:
    """PEFT's own file; it warns that a model made in memory has no ``config.json`` in which to look up its vocabulary."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        model.save_pretrained(folder)


def places(lengths: Sequence[int]) -> Tensor:
    """The position of each packed token in its example."""
    return torch.cat([torch.arange(length) for length in lengths])


def some_tokens(lengths: Sequence[int], seed: int = 0) -> Tensor:
    """Random ids for packed examples."""
    return torch.randint(SIZE["vocab_size"], (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def hidden(model: Decoder, tokens: Tensor, lengths: Sequence[int], checkpointed: int = 0) -> Tensor:
    """Hidden states of packed examples."""
    out: Tensor = model(tokens, places(lengths), Packed(lengths), checkpointed)
    return out


def logits(model: Decoder, tokens: Tensor) -> Tensor:
    """Logits of one example, with the projection as transformers writes it."""
    return F.linear(hidden(model, tokens, [len(tokens)]), model.vocabulary)


def error(found: Tensor, truth: Tensor) -> float:
    """The distance to the truth, relative to its norm."""
    truth = truth.double()
    return float((found.double() - truth).norm() / truth.norm())


def examples(count: int, seed: int = 0, shortest: int = 3, longest: int = 24) -> list[Rendered]:
    """Random examples of various lengths, of each the last third or so to be learnt; their rows count from 101."""
    random = np.random.default_rng(seed)
    made = []
    for row in range(101, 101 + count):
        tokens = random.integers(0, SIZE["vocab_size"], int(random.integers(shortest, longest + 1)), dtype=np.int32)
        made.append(Rendered(tokens, np.arange(len(tokens)) >= 2 * len(tokens) // 3, row))
    return made
