from pathlib import Path
from typing import Any

import pytest
import tokens
from conftest import shared_data

from lamina.data.forms import Message
from lamina.data.templates import BUILT_IN, chat_format
from lamina.errors import DataError, ModelError

TALK = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello!"),
    Message("user", "Bye"),
)
WRITTEN = {
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "vicuna": "Be brief. USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT:",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in(name: str) -> None:
    tokenizer = tokens.byte_level() if name == "chatml" else tokens.pieces()
    assert chat_format(tokenizer, name).write(TALK, answer_next=True) == WRITTEN[name]


def test_without_a_system_prompt() -> None:
    for name, begins in {"llama2": "<s>[INST] Hi", "alpaca": "Below is an ", "vicuna": "A chat between "}.items():
        assert chat_format(tokens.pieces(), name).write(TALK[1:2]).startswith(begins)


def test_llama2_is_that_of_the_real_checkpoint() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data("llama2-tokenizer"))
    own, built_in = chat_format(tokenizer), chat_format(tokenizer, "llama2")
    assert (own.name, built_in.name) == ("of the tokenizer", "llama2")
    for length in range(1, 5):
        assert own.write(TALK[:length]) == built_in.write(TALK[:length])
        assert own.write(TALK[1 : length + 1]) == built_in.write(TALK[1 : length + 1])
    for found in (own, built_in):
        with pytest.raises(
            DataError, match=r"refuses these messages \(user, user\): Conversation roles must alternate"
        ):
            found.write([TALK[1], TALK[3]])


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    assert chat_format(tokens.pieces()).name == "llama2"
    assert chat_format(tokens.pieces("{{ messages[0]['content'] }}")).write(TALK) == "Be brief."
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}:é {% endfor %}", encoding="utf-8")
    assert chat_format(tokens.pieces(), str(path)).write(TALK[:2]) == "system:é user:é "


def test_named_templates_of_a_tokenizer() -> None:
    tokenizer = tokens.byte_level(None)
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    try:
        assert chat_format(tokenizer).write(TALK) == "1"
    finally:
        tokenizer.chat_template = None


def test_no_such_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"template 'lama2': neither built in nor a file; did you mean llama2\?"):
        chat_format(tokens.pieces(), "lama2")
    with pytest.raises(DataError, match="neither built in nor a file; built in are llama2, chatml, alpaca, vicuna"):
        chat_format(tokens.pieces(), "zzz")
    path = tmp_path / "bad.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="bad.jinja': the file cannot be read"):
        chat_format(tokens.pieces(), str(path))


def test_chatml_needs_its_tokens() -> None:
    with pytest.raises(DataError, match=r"template chatml: the tokenizer has no token <\|im_end\|>, .* choose llama2"):
        chat_format(tokens.pieces(), "chatml")


def test_a_tokenizer_without_offsets() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="the tokenizer Slow reports no character offsets, expected a fast one"):
        chat_format(Slow())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", r"template .*: not a template, line 1: "),
        ("{{ raise_exception('no such role') }}", r"the template .* refuses these messages \(user\): no such role"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ messages[9]['content'] }}", "refuses these messages"),
        ("{{ 1 // 0 }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),  # the sandbox
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
    ],
)
def test_a_template_that_fails(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(source)
    with pytest.raises(DataError, match=message):
        chat_format(tokens.pieces(), str(path)).write(TALK[1:2])


@pytest.mark.parametrize(
    ("make", "bos", "eos"), [(tokens.pieces, "<s>", "</s>"), (tokens.byte_level, "", "<|im_end|>")]
)
def test_beginning_of_text(make: Any, bos: str, eos: str) -> None:
    chat = chat_format(make())
    assert (chat.bos, chat.eos) == (bos, eos)
    assert set(chat.special_texts) >= {eos} and chat.tokenizer.eos_token_id in chat.specials
    if bos:
        assert chat.one_bos("a") == ("<s>a", 0, 3)
        assert chat.one_bos("<s>a") == ("<s>a", 1, 0)
        assert chat.one_bos("<s><s><s>a<s>") == ("<s>a<s>", 3, -6)
    else:
        assert chat.one_bos("<s>a") == ("<s>a", 0, 0)


def test_todays_date_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    )
    assert chat_format(tokens.pieces(), str(path)).write(TALK) == "26 Jul 2024"


@pytest.mark.parametrize(
    "template", ["{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "{{ 'a' * 10**18 }}"]
)
def test_a_template_without_end_is_refused(template: str) -> None:
    with pytest.raises(
        DataError, match="^template of the tokenizer: calls itself without end, or writes more than the"
    ):
        chat_format(tokens.pieces(template)).write(TALK)
