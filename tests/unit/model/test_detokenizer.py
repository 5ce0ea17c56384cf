"""Text that is shown while it is written is the text that the tokens decode to."""

from typing import Any

import pytest
from conftest import shared_data
from hypothesis import given
from hypothesis import strategies as st
from tokens import pieces

from lamina.model.detokenizer import Detokenizer


def shown(tokenizer: Any, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


SMALL = pieces()


@given(st.text(st.sampled_from("abc  \n€你😀é"), max_size=12), st.text(st.sampled_from("ab 你"), max_size=4))
def test_the_pieces_are_the_text(text: str, more: str) -> None:
    tokens = [*SMALL(text).input_ids, SMALL.eos_token_id, *SMALL(more).input_ids]
    assert "".join(shown(SMALL, tokens)) == SMALL.decode(tokens, skip_special_tokens=True)


def test_a_character_is_shown_once_it_is_whole() -> None:
    def byte(value: int) -> int:
        return 3 + value

    a = SMALL.convert_tokens_to_ids("▁a")
    tokens = [a, *(byte(value) for value in "😀".encode()), a]
    assert shown(SMALL, tokens) == ["a", "", "", "", "😀", " a", ""]
    assert shown(SMALL, tokens[:3]) == ["a", "", "", "\ufffd\ufffd"]
    # A character before bytes that are none: decode gives up all of them, but the character is shown by then.
    assert shown(SMALL, [*(byte(value) for value in b"\xc3\xa9\xf0"), a]) == ["", "é", "", "\ufffd a", ""]


TEXTS = [
    "Hello world",
    " leading and  two  spaces\n\n\tand a tab",
    "你好，世界！ 日本語 text 한국어",
    "😀👩‍👩‍👧 family 🇩🇪!",
    "naïve café, don 't , stop .",
    "",
    "  ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_real_llama_2_tokenizer(text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data("llama2-tokenizer"))
    alone = tokenizer(text, add_special_tokens=False).input_ids
    for tokens in (alone, tokenizer(text).input_ids, [*alone, tokenizer.eos_token_id, tokenizer.bos_token_id, *alone]):
        found = shown(tokenizer, tokens)
        assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in found)


def test_special_tokens_that_the_decoder_does_not_know_are_shown_as_it_shows_them() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data("tinystories-656k-hf"))
    tokens = tokenizer("Once upon a time").input_ids
    assert "".join(shown(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)
