"""Text from a model: prompts in packed, then one token per sequence and step over a cache of keys and values.

Each sequence is continued as if it were alone: its random numbers are a function of (seed, number of the prompt,
position), and its keys are masked from the others'. Results therefore do not depend on the batch, with one reservation:
a matrix product can be rounded differently at another number of rows, and that decides between tokens whose logits are
equal but for the last bits. Finished sequences leave the batch.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lamina.adapter import narrowed
from lamina.errors import DataError, ModelError
from lamina.model.decoder import Decoder
from lamina.ops.cache import Cache
from lamina.ops.products import product
from lamina.ops.sampling import draw, penalise, warp
from lamina.section import section

CACHE_BYTES = 2 << 30
"""Keys and values that a batch may hold: at Llama-2-7B's half megabyte a token in bf16, 4,096 tokens."""

BATCH_SEQUENCES = 128
"""Sequences in a batch at most: the logits of all of them exist at one time."""

PREFILL_TOKENS = 4096
"""Prompt tokens that pass the layers at one time (a longer prompt passes alone)."""


@section
class Sampling:
    """How an answer's tokens are chosen."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Tokens of an answer at most; it ends earlier at a stop token or where the model's context is full."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Divides the logits before a token is drawn; 0 takes the most likely token (greedy)."""

    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw among the k most likely tokens only; 0: all."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the most likely tokens that together have this probability."""

    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides the positive logits of tokens that the prompt or the answer holds already; 1: none."""

    def __post_init__(self) -> None:
        if self.temperature == 0 and (self.top_k > 0 or self.top_p < 1):
            raise ValueError(
                f"top_k {self.top_k} and top_p {self.top_p} narrow a draw, but temperature 0 draws nothing; "
                "set temperature above 0, or top_k 0 and top_p 1"
            )


@dataclass(frozen=True)
class Generated:
    """An answer: its tokens without the stop token, and whether a stop token ended it (otherwise: a limit)."""

    tokens: tuple[int, ...]
    stopped: bool


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: AbstractSet[int], seed: int
) -> list[Generated]:
    """Answers each prompt; answers stand in the order of the prompts.

    Prompts of similar length are answered together, in batches whose cache stays within ``CACHE_BYTES``.

    Args:
        prompts: token ids, ready for the model (template and BOS included).
        stop: the ids that end an answer.

    Raises:
        DataError: prompts are empty.
        ModelError: prompts leave no room in the model's context or hold ids it does not know, or logits are not finite.
    """
    check_prompts(model, prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    for batch in _batches(model, prompts, sampling.max_new_tokens):
        for choices in _steps(model, {row: prompts[row] for row in batch}, sampling, stop, seed):
            for row, token in choices:
                if token in stop:
                    stopped[row] = True
                else:
                    answers[row].append(token)
    return [Generated(tuple(tokens), end) for tokens, end in zip(answers, stopped, strict=True)]


def stream(
    model: Decoder, prompt: Sequence[int], sampling: Sampling, stop: AbstractSet[int], seed: int
) -> Iterator[int]:
    """Answers one prompt token by token: the tokens that ``generate`` gives for it as the only prompt.

    Raises:
        DataError, ModelError: as ``generate``; a faulty prompt at once, not at the first token.
    """
    check_prompts(model, [prompt])
    steps = _steps(model, {0: prompt}, sampling, stop, seed)
    return (token for choices in steps for _, token in choices if token not in stop)


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    """Raises what ``generate`` would raise about these prompts, all of them together."""
    if empty := [row for row, prompt in enumerate(prompts, 1) if not prompt]:
        raise DataError(f"found no tokens in {_numbers(empty)}, expected at least one in each; leave them out")
    most, vocabulary = model.architecture.max_position, model.architecture.vocabulary
    if long := [row for row, prompt in enumerate(prompts, 1) if len(prompt) >= most]:
        longest = max(map(len, prompts))
        raise ModelError(
            f"found no room for an answer after {_numbers(long)} (longest: {longest} tokens); the model takes {most} "
            "tokens (max_position_embeddings), prompt and answer together; shorten them"
        )
    if strange := [row for row, prompt in enumerate(prompts, 1) if min(prompt) < 0 or max(prompt) >= vocabulary]:
        raise ModelError(
            f"found token ids outside 0 … {vocabulary - 1}, the model's vocabulary, in {_numbers(strange)}; "
            "use the tokenizer that belongs to the model"
        )


def _numbers(rows: list[int]) -> str:
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return f"prompt {', '.join(map(str, rows[:10]))}{more}"


def _batches(model: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[list[int]]:
    """Groups prompts, longest first: the batch that needs most memory is the first."""
    a = model.architecture
    token_bytes = 2 * a.layers * a.kv_heads * a.head_width * model.vocabulary.element_size()
    rows = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    while rows:
        slots = len(prompts[rows[0]]) + min(new_tokens, a.max_position)
        count = min(BATCH_SEQUENCES, max(1, CACHE_BYTES // (slots * token_bytes)))
        yield rows[:count]
        del rows[:count]


def _steps(
    model: Decoder, prompts: dict[int, Sequence[int]], sampling: Sampling, stop: AbstractSet[int], seed: int
) -> Iterator[list[tuple[int, int]]]:
    """Yields each step's tokens, as pairs of prompt number and token, a stop token included."""
    with narrowed(model):
        yield from _narrowed_steps(model, prompts, sampling, stop, seed)


def _narrowed_steps(
    model: Decoder, prompts: dict[int, Sequence[int]], sampling: Sampling, stop: AbstractSet[int], seed: int
) -> Iterator[list[tuple[int, int]]]:
    a, device = model.architecture, model.vocabulary.device
    rows, lengths = list(prompts), [len(prompt) for prompt in prompts.values()]
    limits = [min(sampling.max_new_tokens, a.max_position - length) for length in lengths]
    cache = Cache(
        lengths,
        max(limits) - 1,  # the last token is not fed back
        layers=a.layers,
        kv_heads=a.kv_heads,
        head_width=a.head_width,
        dtype=model.vocabulary.dtype,
        device=device,
    )
    choose = _Chooser(prompts, sampling, seed, max(limits), a.vocabulary, device)
    training = [module for module in model.modules() if module.training]  # looked for once, not at each token
    with evaluating(training):
        hidden = _prefill(model, cache, list(prompts.values()))
        tokens = choose(product((hidden, model.vocabulary.t())).float(), 0)
    for step in itertools.count(1):
        chosen = tokens.tolist()
        yield list(zip(rows, chosen, strict=True))
        live = [place for place, token in enumerate(chosen) if token not in stop and step < limits[place]]
        if not live:
            return
        if len(live) < len(rows):
            order = cache.keep(live)
            rows, limits, lengths = ([values[place] for place in order] for values in (rows, limits, lengths))
            choose.keep(order)
            tokens = tokens[order]
        position = torch.tensor([length + step - 1 for length in lengths], device=device)
        with evaluating(training):
            hidden = model(tokens, position, cache)
            tokens = choose(product((hidden, model.vocabulary.t())).float(), step)
        cache.advance()


@contextmanager
def evaluating(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Switches gradients off, and those of the modules that are in training mode to evaluation; all back at the end.

    Not torch's inference mode: a tensor that a module keeps from it would not be fit for training.
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _prefill(model: Decoder, cache: Cache, prompts: list[Sequence[int]]) -> Tensor:
    """Fills the cache and returns the hidden state of each prompt's last token, [B, D]."""
    device, last, first = model.vocabulary.device, [], 0
    while first < len(prompts):
        end, total = first + 1, len(prompts[first])
        while end < len(prompts) and total + len(prompts[end]) <= PREFILL_TOKENS:
            total += len(prompts[end])
            end += 1
        group = prompts[first:end]
        tokens = torch.tensor([token for prompt in group for token in prompt], device=device)
        position = torch.cat([torch.arange(len(prompt), device=device) for prompt in group])
        ends = torch.tensor([len(prompt) for prompt in group], device=device).cumsum(0) - 1
        last.append(model(tokens, position, cache.prefill(range(first, end)))[ends])
        first = end
    return torch.cat(last)


class _Chooser:
    """Chooses each sequence's next token from its logits."""

    def __init__(
        self,
        prompts: dict[int, Sequence[int]],
        sampling: Sampling,
        seed: int,
        steps: int,
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self.sampling = sampling
        self.uniform = self.seen = None
        if sampling.temperature > 0:
            numbers = [torch.rand(steps, generator=_generator(seed, row), dtype=torch.float64) for row in prompts]
            self.uniform = torch.stack(numbers).to(device)  # [B, steps]
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
            for place, prompt in enumerate(prompts.values()):
                self.seen[place, torch.tensor(prompt, device=device)] = True

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        best, tokens = logits.max(1)
        if not best.isfinite().all():
            raise ModelError(
                f"found logits that are not finite at token {step + 1} of an answer; "
                "the weights of the model or the adapter are damaged; load them again or use an earlier adapter"
            )
        if self.seen is not None:
            logits = penalise(logits, self.seen, self.sampling.repetition_penalty)
            tokens = logits.argmax(1)
        if self.uniform is not None:
            logits = warp(logits, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
            tokens = draw(logits, self.uniform[:, step])
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def keep(self, order: list[int]) -> None:
        """Goes on with the sequences that stood at these places."""
        self.uniform = None if self.uniform is None else self.uniform[order]
        self.seen = None if self.seen is None else self.seen[order]


def _generator(seed: int, row: int) -> torch.Generator:
    """Random numbers of one prompt: neighbouring seeds and prompts share nothing."""
    digest = hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
