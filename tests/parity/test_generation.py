"""Generation gives what transformers' ``generate`` gives: greedy texts, and what its logits processors leave to draw from."""

from typing import Any

import pytest
import torch
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, hosted, some_tokens, tiny

from lamina.generation import Generated, Sampling, generate
from lamina.model.weights import load_model
from lamina.ops.sampling import penalise, warp

LENGTHS = (1, 5, 19, 40, 12)


def theirs(guest: Any, prompt: list[int], stop: set[int], **options: Any) -> Generated:
    """Greedy text of transformers for one prompt, without padding."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=sorted(stop) or None, **options)
    guest.generation_config = GenerationConfig()  # whose eos_token_id would stand in for none
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = guest.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    tokens = out[0, len(prompt) :].tolist()
    stopped = tokens[-1] in stop
    return Generated(tuple(tokens[:-1] if stopped else tokens), stopped)


FAST = {("llama", 1.2)} | {(family, 1.0) for family in ("llama-grouped", "qwen3-windows")}
"""In `make check`: every kind of attention; a penalty asks what was seen, not which family saw it."""


@pytest.mark.parametrize(
    ("family", "penalty"),
    [
        pytest.param(family, penalty, marks=[pytest.mark.slow] * ((family, penalty) not in FAST))
        for family in (*FAMILIES, "qwen3-windows")
        for penalty in (1.0, 1.2)
    ],
)
def test_greedy_texts_of_every_family(family: str, penalty: float) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
    changes, family = (windows, "qwen3") if family == "qwen3-windows" else ({}, family)
    model = tiny(family, **changes)
    guest = hosted(model, family, **changes)
    prompts = [tokens.tolist() for tokens in some_tokens(LENGTHS).split(LENGTHS)]
    options = {"max_new_tokens": 40, "repetition_penalty": penalty}  # five windows, and past both places to stop at
    sampling = Sampling(**options)
    expected = [theirs(guest, p, set(), **options) for p in prompts]
    assert generate(model, prompts, sampling, set(), seed=0) == expected
    stop = {expected[0].tokens[20], expected[2].tokens[33]}
    expected = [theirs(guest, p, stop, **options) for p in prompts]
    assert any(answer.stopped for answer in expected)
    assert generate(model, prompts, sampling, stop, seed=0) == expected


STORIES = (
    "Once upon a time",
    "Lily had a red ball. She",
    "The",
    "One day, Tom and his mom went to the big park. Tom saw",
)


@pytest.mark.slow
def test_greedy_texts_of_a_real_checkpoint() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data("tinystories-656k-hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    guest = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokenizer(text).input_ids for text in STORIES]
    model, end = load_model(folder, "fp32", "cpu"), {tokenizer.eos_token_id}
    for new_tokens, stop in ((64, set[int]()), (300, end)):
        expected = [theirs(guest, prompt, stop, max_new_tokens=new_tokens) for prompt in prompts]
        assert generate(model, prompts, Sampling(max_new_tokens=new_tokens), stop, seed=0) == expected


@settings(deadline=None, max_examples=60)
@given(
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
    penalty=st.sampled_from([1.0, 0.7, 1.5]),
    seed=st.integers(0, 99),
    bf16=st.booleans(),
)
def test_what_is_left_to_draw_from(
    temperature: float, top_k: int, top_p: float, penalty: float, seed: int, bf16: bool
) -> None:
    from transformers.generation import logits_process as processors

    random = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(5, 50, generator=random)
    logits = logits.bfloat16().float() if bf16 else logits  # many equal logits
    tokens = torch.randint(50, (5, 12), generator=random)
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits)
    expected = processors.TemperatureLogitsWarper(temperature)(tokens, expected)
    if top_k:
        expected = processors.TopKLogitsWarper(top_k)(tokens, expected)
    if top_p < 1:
        expected = processors.TopPLogitsWarper(top_p)(tokens, expected)
    seen = torch.zeros(5, 50, dtype=torch.bool).scatter_(1, tokens, True)
    found = warp(penalise(logits, seen, penalty), temperature, top_k, top_p)
    # The same operations. Among equal logits at the border of top_p the sort decides, each in its own way; as many stay.
    assert torch.equal(found.sort(1).values, expected.sort(1).values)
    if not bf16:
        assert torch.equal(found, expected)
