"""An example → its tokens, and which of them are learnt.

The text of the whole example is tokenised **once**, and the mask is read off the character offsets of that tokenisation.
Searching for the ids of a marker fails where the tokenizer merges the marker's last character with what follows; parts
that are tokenised one by one do not give the tokens of the whole.

What is learnt (``train_on="answers"``) is what the model has to write: from the end of the prompt, as ``render_prompt``
gives it, to the end token, for every answer. A token that reaches over the beginning of an answer (a leading space
merged with the last character of the prompt) belongs to the answer. White space that a template writes after the end
token does not. Plain text is learnt in full. The token at place 0 has nothing before it that could predict it.

An answer is found by rendering the conversation up to it and up to its end: both must be beginnings of the whole, else
the template rewrites earlier turns, and what it would train on is not what the model sees in use: such templates are
refused. In text that is already rendered for Llama-2 it lies between ``[/INST]`` and the next ``[INST]`` or the end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.data.forms import Example, Message, bad_unicode
from lamina.data.llama2_text import find_turns
from lamina.data.offsets import Encoded, encode
from lamina.data.templates import ChatFormat, chat_format
from lamina.errors import DataError

_ASCII = re.compile(r"<0x([0-7][0-9A-F])>")  # a byte token that stands for a character by itself
TrainOn = Literal["answers", "everything"]


class Turn(NamedTuple):
    """An answer, or a plain text, as token range; ``ended`` tells whether its last token is an end token."""

    start: int
    stop: int
    ended: bool


@dataclass(frozen=True)
class Rendered:
    """An example as tokens, int32 [n], with ``trained``, bool [n]: token i is a target.

    Args:
        turns: the answers among the tokens, as far as known (a store keeps none).
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    row: int
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Marked:
    """An example as text, with the character ranges that the model has to write.

    Args:
        bos_held: tokens that begin a text which it held already; more than one were made one.
        blank: answers without text, which teach nothing but to end at once and are not learnt.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    row: int
    bos_held: int
    blank: int = 0


def render(
    example: Example,
    tokenizer: Any,
    *,
    train_on: TrainOn = "answers",
    template: str | None = None,
    system_prompt: str | None = None,
) -> Rendered:
    """Renders one example: its tokens, and which of them are targets.

    Raises:
        DataError: the template refuses the messages, or rewrites them.
    """
    chat = chat_format(tokenizer, template)
    return tokens_of([mark(example, chat, system_prompt)], chat, train_on)[0]


def render_prompt(
    messages: Sequence[Message], tokenizer: Any, template: str | None = None, system_prompt: str | None = None
) -> list[int]:
    """The tokens that a model reads before it writes the next answer.

    They are the beginning of what ``render`` gives for the conversation with that answer, wherever the tokenizer does
    not merge across the border (Llama's never does: an answer begins with a space).
    """
    chat = chat_format(tokenizer, template)
    text, _, _ = chat.one_bos(chat.write(_with_system(messages, system_prompt), answer_next=True))
    if problem := bad_unicode(text):
        raise DataError(f"the prompt: {problem}")
    return [int(token) for token in encode(tokenizer, [text])[0].tokens]


def end_tokens(tokenizer: Any, template: str | None = None) -> set[int]:
    """The ids that end an answer: the tokenizer's end token, and the one that the template writes."""
    answer = Example(1, "messages", (Message("user", "a"), Message("assistant", "b")))
    rendered = render(answer, tokenizer, template=template)
    ends = {int(rendered.tokens[turn.stop - 1]) for turn in rendered.turns if turn.ended}
    return ends if tokenizer.eos_token_id is None else ends | {int(tokenizer.eos_token_id)}


def show(rendered: Rendered, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of each token, and whether it is learnt: a row as people can check it."""
    pieces = tokenizer.convert_ids_to_tokens(rendered.tokens.tolist())
    if tokenizer.convert_tokens_to_string(["a", "▁b"]) == "a b":
        texts = [_ASCII.sub(lambda byte: chr(int(byte[1], 16)), piece.replace("▁", " ")) for piece in pieces]
    else:
        texts = [tokenizer.convert_tokens_to_string([piece]) for piece in pieces]
    return list(zip(texts, rendered.trained.tolist(), strict=True))


def mark(example: Example, chat: ChatFormat, system_prompt: str | None = None) -> Marked:
    """Writes an example as text and finds the answers in it.

    Raises:
        DataError: the template refuses the messages, or rewrites them.
    """
    if example.messages:
        text, answers, blank = _answers(_with_system(example.messages, system_prompt), chat)
    elif example.form == "llama2-text":
        text, answers, blank = find_turns(example.text, chat.bos, chat.eos)
        if not answers:
            raise DataError("a row without an answer: no text after [/INST]")
    else:
        text = example.text if example.text.endswith(chat.eos) else example.text + chat.eos
        text, held, _ = chat.one_bos(text)
        return Marked(text, ((0, len(text)),) if example.text.strip() else (), example.row, held)
    text, held, moved = chat.one_bos(text)
    return Marked(text, tuple((start + moved, stop + moved) for start, stop in answers), example.row, held, blank)


def tokens_of(examples: Sequence[Marked], chat: ChatFormat, train_on: TrainOn) -> list[Rendered]:
    """Tokenises examples together, each on its own, and puts the marks on their tokens."""
    encoded = encode(chat.tokenizer, [example.text for example in examples])
    return [_rendered(mark, tokens, chat, train_on) for mark, tokens in zip(examples, encoded, strict=True)]


def _rendered(marked: Marked, encoded: Encoded, chat: ChatFormat, train_on: TrainOn) -> Rendered:
    trained = np.zeros(len(encoded.tokens), dtype=np.bool_)
    turns = []
    for start, stop in marked.answers:
        inside = (encoded.stops > start) & (encoded.starts < stop)
        trained |= inside
        if inside.any():
            first, last = np.flatnonzero(inside)[[0, -1]].tolist()
            turns.append(Turn(first, last + 1, int(encoded.tokens[last]) in chat.specials))
    if train_on == "everything" and marked.answers:
        trained[:] = True
    trained[:1] = False
    return Rendered(encoded.tokens, trained, marked.row, tuple(turns))


def _with_system(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    own = any(message.role == "system" for message in messages)
    return tuple(messages) if own or not system_prompt else (Message("system", system_prompt), *messages)


def _answers(messages: Sequence[Message], chat: ChatFormat) -> tuple[str, list[tuple[int, int]], int]:
    """The conversation as text, the ranges of its trained answers with their end tokens, and the number of blank ones."""
    text = chat.write(messages)
    seen = 0
    for message in messages:
        content = message.content.strip()
        place = text.find(content, seen)
        if place < 0:
            does = (
                "drops the system prompt"
                if message.role == "system"
                else f"rewrites or reorders a {message.role} message"
            )
            raise DataError(f"the template {chat.name} {does}: {content[:40]!r}; choose another with --template")
        seen = place + len(content) if message.role != "system" else 0  # some write it inside the first user message
    answers, blank = [], 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = chat.write(messages[:index], answer_next=True)
        upto = text if index == len(messages) - 1 else chat.write(messages[: index + 1])
        if not (upto.startswith(before) and text.startswith(upto)):
            raise DataError(
                f"the template {chat.name} rewrites earlier turns: what it writes up to message {index + 1} is not how the "
                "whole begins; choose another with --template"
            )
        if not message.content.strip():
            blank += 1
        elif message.trained:
            answers.append((len(before), len(upto.rstrip())))
    return text, answers, blank
