"""Rendering with the tokenizers of real checkpoints."""

import time
from typing import Any

import numpy as np
import pytest
from conftest import shared_data

from lamina.data.examples import read_examples
from lamina.data.forms import Example, Message
from lamina.data.render import render, render_prompt
from lamina.model.tokenizer import load_tokenizer

U, A, S = (
    (lambda text: Message("user", text)),
    (lambda text: Message("assistant", text)),
    (lambda t: Message("system", t)),
)


@pytest.fixture(scope="module")
def llama2() -> Any:
    return load_tokenizer(shared_data("llama2-tokenizer"))


def talk(*messages: Message) -> Example:
    return Example(1, "messages", messages)


def rendered_text(text: str) -> Example:
    return Example(1, "llama2-text", text=text)


TEXTS = [
    "Héllo 🦙🇩🇪 日本",
    "a  b\n\n c",
    "e\u0301 \u200b\r\n\0 ﬁ",
    "<script>alert('&amp;')</script> </div><s>",
    "1</s> 2",
    "👩‍👩‍👧 ünï",
]


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_of_the_real_tokenizer(llama2: Any, text: str) -> None:
    """Every answer's text comes back from its tokens, whatever it holds."""
    found = render(talk(U(text), A(text), U("more"), A(text)), llama2)
    answers = [llama2.decode(found.tokens[turn.start : turn.stop]) for turn in found.turns]
    expected = llama2.decode(llama2(f" {text.strip()} </s>", add_special_tokens=False)["input_ids"])
    assert [answer.split() for answer in answers] == [expected.split()] * 2
    assert all(found.tokens[turn.stop - 1] == llama2.eos_token_id for turn in found.turns)
    inside = np.zeros(len(found.tokens), dtype=bool)
    for turn in found.turns:
        inside[turn.start : turn.stop] = True
    assert inside.tolist() == found.trained.tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_the_prompt_is_the_beginning_of_the_whole(llama2: Any, text: str) -> None:
    messages = [S("Be brief."), U(text), A(text), U("more")]
    prompt = render_prompt(messages, llama2)
    whole = render(talk(*messages, A(text)), llama2)
    assert prompt == whole.tokens[: len(prompt)].tolist()
    assert whole.turns[-1].start == len(prompt)


def test_guanaco(llama2: Any) -> None:
    """The reference data: every turn's answer is found, and every one ends with its end token."""
    examples = list(read_examples(shared_data("guanaco-llama2-1k")))
    begun = time.perf_counter()
    found = [render(example, llama2) for example in examples]
    assert time.perf_counter() - begun < 20  # a second in prepare; a bound only against something quadratic
    turns = [example.text.count("[INST]") for example in examples]
    assert [turns.count(1), turns.count(2), sum(count > 2 for count in turns)] == [647, 336, 17]
    blank = examples[899].text.count("[/INST]  </s>")  # row 900: one answer of two spaces
    assert sum(len(item.turns) for item in found) == sum(turns) - blank == 1379
    assert all(turn.ended for item in found for turn in item.turns)
    assert sum(len(item.tokens) for item in found) == 461_907
    for example, item in zip(examples[::50], found[::50], strict=True):
        said = [llama2.decode(item.tokens[turn.start : turn.stop]).split() for turn in item.turns]
        assert said == [
            part.split("<s>")[0].replace("</s>", " </s>").split() for part in example.text.split("[/INST]")[1:]
        ]


def test_a_row_of_100_000_tokens(llama2: Any) -> None:
    text = "[INST] count [/INST] " + " ".join(map(str, range(20_000))) + " </s>"
    found = render(rendered_text("<s>" + text), llama2)
    assert len(found.tokens) > 100_000
    assert found.turns[0].ended and found.turns[0].stop == len(found.tokens)


def test_white_space_without_end_is_read_at_once(llama2: Any) -> None:
    found = render(rendered_text("<s>[INST] q [/INST] a" + " " * 200_000 + "b </s>"), llama2)
    assert found.turns[0].ended


def test_a_checkpoint_that_hides_its_special_tokens() -> None:
    """Its tokenizer.json looks for them after ``▁`` was put before the text, so that none is found after a word."""
    tokenizer = load_tokenizer(shared_data("tinystories-656k-hf"))
    found = render(Example(1, "text", text="Once upon é 🦙."), tokenizer)
    assert found.tokens[0] == tokenizer.bos_token_id and found.tokens[-1] == tokenizer.eos_token_id
    assert found.turns[0].ended
    found = render(talk(U("what"), A("two."), U("what"), A("three")), tokenizer)
    assert (found.tokens == tokenizer.bos_token_id).sum() == 2 and [turn.ended for turn in found.turns] == [True, True]
