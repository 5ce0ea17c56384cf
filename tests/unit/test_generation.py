"""Generation with a cache gives what the decoder gives without one, whatever else is in the batch.

Models are random and in float64, so that rounding does not decide between two tokens and texts can be compared as they
are (logits are chosen from in fp32; two that fall together there are equally rounded in all runs).
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lamina import generation as module
from lamina.adapter import LoRA, attach
from lamina.errors import ConfigError, DataError, ModelError
from lamina.generation import Generated, Sampling, generate, stream
from lamina.model.architecture import Architecture, Rope
from lamina.model.decoder import Decoder
from lamina.ops.attention import Packed
from lamina.ops.cache import Cache

VOCABULARY = 24


def decoder(windows: tuple[int | None, ...] = (None, None), max_position: int = 64) -> Decoder:
    """A random decoder of two layers with grouped heads, in float64, that has a lot to say."""
    architecture = Architecture(
        family="llama",
        width=16,
        layers=len(windows),
        heads=4,
        kv_heads=2,
        head_width=4,
        mlp_width=24,
        vocabulary=VOCABULARY,
        norm_eps=1e-6,
        rope=Rope(100.0),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied=False,
        windows=windows,
        max_position=max_position,
    )
    torch.manual_seed(1)
    model = Decoder(architecture).double().requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.5)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    return [[(7 * row + 5 * place * place + place) % VOCABULARY for place in range(n)] for row, n in enumerate(lengths)]


def uncached(model: Decoder, tokens: Sequence[int]) -> Tensor:
    """Logits of all tokens, from one pass over all of them."""
    ids = torch.tensor(tokens)
    return F.linear(model(ids, torch.arange(len(ids)), Packed([len(ids)])), model.vocabulary)


def written_out(model: Decoder, prompt: list[int], steps: int, stop: AbstractSet[int], penalty: float) -> Generated:
    """Greedy generation as a definition: the whole text once more for each token."""
    text = list(prompt)
    for _ in range(min(steps, model.architecture.max_position - len(prompt))):
        logits = uncached(model, text)[-1].float()
        for token in set(text):
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        if (token := int(logits.argmax())) in stop:
            return Generated(tuple(text[len(prompt) :]), True)
        text.append(token)
    return Generated(tuple(text[len(prompt) :]), False)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6),
    windows=st.tuples(*[st.sampled_from([None, 1, 3, 8])] * 2),
    stop=st.sets(st.integers(0, VOCABULARY - 1), max_size=6),
    penalty=st.sampled_from([1.0, 1.3]),
    max_position=st.sampled_from([15, 64]),
)
@pytest.mark.slow
def test_a_batch_with_a_cache_gives_what_each_prompt_gives_alone_without(
    lengths: list[int], windows: tuple[int | None, ...], stop: set[int], penalty: float, max_position: int
) -> None:
    model = decoder(windows, max_position)
    given_prompts = prompts(*lengths)
    sampling = Sampling(max_new_tokens=12, repetition_penalty=penalty)
    expected = [written_out(model, prompt, 12, stop, penalty) for prompt in given_prompts]
    assert generate(model, given_prompts, sampling, stop, seed=0) == expected


@pytest.mark.parametrize("windows", [(None, None), (2, 5), (3, None)])
def test_cached_hidden_states_are_the_uncached_ones(windows: tuple[int | None, ...]) -> None:
    model, texts = decoder(windows), prompts(17, 11, 13)
    new = 5
    heads = [text[:-new] for text in texts]
    cache = Cache(
        [len(h) for h in heads],
        new,
        layers=2,
        kv_heads=2,
        head_width=4,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    model(
        torch.tensor([token for head in heads for token in head]),
        torch.cat([torch.arange(len(head)) for head in heads]),
        cache.prefill(range(3)),
    )
    for step in range(new):
        tokens = torch.tensor([text[len(text) - new + step] for text in texts])
        position = torch.tensor([len(text) - new + step for text in texts])
        logits = F.linear(model(tokens, position, cache), model.vocabulary)
        cache.advance()
        for row, text in enumerate(texts):
            # The same sums in another order: 1.1e-16 a rounding, at most some hundred of them deep, values below 100.
            torch.testing.assert_close(logits[row], uncached(model, text)[len(text) - new + step], rtol=0, atol=1e-11)


def test_small_batches_and_small_prefills_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = decoder(), Sampling(max_new_tokens=8)
    given_prompts = prompts(3, 9, 1, 5, 5, 12)
    expected = generate(model, given_prompts, sampling, {3}, seed=0)
    monkeypatch.setattr(module, "PREFILL_TOKENS", 10)
    assert generate(model, given_prompts, sampling, {3}, seed=0) == expected
    monkeypatch.setattr(
        module, "CACHE_BYTES", 2 * (12 + 8) * 2 * 2 * 2 * 4 * 8
    )  # two of the longest, with their answers
    sizes: list[int] = []
    original = module._batches

    def counted(*args: object) -> object:
        for batch in original(*args):  # type: ignore[arg-type]
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(module, "_batches", counted)
    assert generate(model, given_prompts, sampling, {3}, seed=0) == expected
    assert sizes == [2, 3, 1]


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it() -> None:
    model, prompt = decoder(), prompts(6)[0]
    tokens = generate(model, [prompt], Sampling(max_new_tokens=20), set(), seed=0)[0].tokens
    assert len(tokens) == 20
    stop = tokens[7]
    expected = tokens[: tokens.index(stop)]
    assert generate(model, [prompt], Sampling(max_new_tokens=20), {stop}, seed=0) == [Generated(expected, True)]
    assert list(stream(model, prompt, Sampling(max_new_tokens=20), {stop}, seed=0)) == list(expected)
    first = generate(model, [prompt], Sampling(max_new_tokens=20), {tokens[0]}, seed=0)
    assert first == [Generated((), True)]


def test_generation_ends_where_the_context_is_full() -> None:
    model = decoder(max_position=20)
    answers = generate(model, prompts(19, 4), Sampling(max_new_tokens=50), set(), seed=0)
    assert [len(answer.tokens) for answer in answers] == [1, 16]
    assert not any(answer.stopped for answer in answers)


DRAWN = Sampling(max_new_tokens=16, temperature=1.5)


def test_drawn_text_is_a_function_of_seed_and_prompt_number() -> None:
    model = decoder()
    one = generate(model, prompts(5, 9, 2), DRAWN, {3}, seed=7)
    assert generate(model, prompts(5, 9, 2), DRAWN, {3}, seed=7) == one
    assert generate(model, prompts(5, 9, 2), DRAWN, {3}, seed=8) != one
    assert generate(model, [prompts(5)[0], [1], [2] * 12, [4]], DRAWN, {3}, seed=7)[0] == one[0]
    assert tuple(stream(model, prompts(5)[0], DRAWN, {3}, seed=7)) == one[0].tokens
    same = generate(model, [[5, 6]] * 4, DRAWN, set(), seed=7)
    assert len({answer.tokens for answer in same}) == 4


@pytest.mark.parametrize("narrow", [{"top_p": 1e-6}, {"top_k": 1}, {"temperature": 1e-5}])
def test_narrow_draws_are_greedy(narrow: dict[str, float]) -> None:
    model = decoder()
    greedy = generate(model, prompts(5, 9, 2), Sampling(max_new_tokens=16), {3}, seed=0)
    drawn = Sampling(**{"max_new_tokens": 16, "temperature": 2.0, **narrow})  # type: ignore[arg-type]
    assert generate(model, prompts(5, 9, 2), drawn, {3}, seed=1) == greedy


def test_a_repetition_penalty_ends_repetition() -> None:
    # A huge penalty makes every token that was seen the least likely, as long as there are others.
    tokens = generate(decoder(), [[1, 2]], Sampling(max_new_tokens=10, repetition_penalty=1e6), set(), seed=0)[0].tokens
    assert len({1, 2, *tokens}) == 12


class Dropped(nn.Module):
    """A projection with dropout, as an adapter in training has it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.dropout(x))
        return out


def test_dropout_is_off_while_the_model_runs_and_on_again_afterwards() -> None:
    model = decoder()
    plain = generate(model, prompts(4, 6), Sampling(max_new_tokens=8), set(), seed=0)
    dropped = Dropped(model.model.layers[0].mlp.up_proj).train()
    dropped.inner.eval()
    model.model.layers[0].mlp.up_proj = dropped
    assert generate(model, prompts(4, 6), Sampling(max_new_tokens=8), set(), seed=0) == plain
    modes = [
        (dropped.training, dropped.dropout.training, dropped.inner.training, model.training)
        for _ in stream(model, prompts(4)[0], Sampling(max_new_tokens=3), set(), seed=0)
    ]
    assert modes == [(True, True, False, False)] * 3


def test_a_model_can_be_trained_between_the_tokens_of_a_stream() -> None:
    model = decoder().requires_grad_(True)
    modules = attach(model, LoRA(rank=2)).values()
    for _ in stream(model, [1, 2, 3], Sampling(max_new_tokens=2), set(), seed=0):
        assert torch.is_grad_enabled()
        uncached(model, [1, 2, 3]).sum().backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert all(one.b.grad is not None for one in modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_cast_for_the_answer_and_free_to_learn_after_it(dtype: torch.dtype) -> None:
    model = decoder().to(dtype)
    modules = attach(model, LoRA(rank=2)).values()
    answers = []
    for _ in range(2):
        tokens = stream(model, prompts(9)[0], Sampling(max_new_tokens=8), set(), 0)
        first = next(tokens)
        assert all(one.narrow is not None and one.narrow[0].dtype == dtype for one in modules)
        answers.append([first, *tokens])
        assert all(one.narrow is None for one in modules)
        for one in modules:
            torch.nn.init.normal_(one.b, std=2.0)
    assert answers[0] != answers[1]


def test_no_prompts_give_no_answers() -> None:
    assert generate(decoder(), [], Sampling(), set(), seed=0) == []


def test_faulty_prompts_are_refused_together_and_at_once() -> None:
    model = decoder(max_position=20)
    with pytest.raises(
        DataError, match=r"^found no tokens in prompt 2, 3, expected at least one in each; leave them out$"
    ):
        generate(model, [[1], [], []], Sampling(), set(), seed=0)
    with pytest.raises(
        ModelError, match=r"no room for an answer after prompt 1, 3 \(longest: 25 tokens\); the model takes 20 "
    ):
        generate(model, prompts(20, 19, 25), Sampling(), set(), seed=0)
    with pytest.raises(
        ModelError, match=r"token ids outside 0 … 23, the model's vocabulary, in prompt 1, 2; use the tok"
    ):
        generate(model, [[24], [-1], [0]], Sampling(), set(), seed=0)
    with pytest.raises(DataError, match=r"prompt 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more, expected"):
        generate(model, [[]] * 12, Sampling(), set(), seed=0)
    with pytest.raises(DataError, match="found no tokens in prompt 1"):
        stream(model, [], Sampling(), set(), seed=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(temperature: float) -> None:
    model = decoder()
    model.model.norm.weight[3] = torch.nan
    with pytest.raises(
        ModelError, match="logits that are not finite at token 1 of an answer; the weights of the model or"
    ):
        generate(model, [[1, 2]], Sampling(temperature=temperature), set(), seed=0)


def test_settings_out_of_range_or_without_effect_are_refused() -> None:
    for wrong in ({"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: found .*, expected"):
            Sampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="repetition_penalty: found 0.0, expected a number > 0"):
        Sampling(repetition_penalty=0.0)
    for narrow in ({"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(
            ConfigError, match="narrow a draw, but temperature 0 draws nothing; set temperature above 0"
        ):
            Sampling(**narrow)  # type: ignore[arg-type]
