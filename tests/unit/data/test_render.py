from typing import Any

import numpy as np
import pytest
import tokens

from lamina.data.forms import Example, Message
from lamina.data.offsets import encode
from lamina.data.render import Rendered, end_tokens, render, render_prompt, show
from lamina.errors import DataError, ModelError

U, A, S = (
    (lambda text: Message("user", text)),
    (lambda text: Message("assistant", text)),
    (lambda t: Message("system", t)),
)


def learnt(rendered: Rendered, tokenizer: Any) -> str:
    """What the targets say, with a bar where the mask is broken."""
    text, before = "", True
    for piece, trained in show(rendered, tokenizer):
        text += ("" if before or not text else "|") + piece if trained else ""
        before = trained
    return text


def talk(*messages: Message) -> Example:
    return Example(1, "messages", messages)


def rendered_text(text: str) -> Example:
    return Example(1, "llama2-text", text=text)


def test_llama2_conversation() -> None:
    tokenizer = tokens.pieces()
    found = render(talk(S("be brief"), U("what"), A("the cat"), U("and"), A("two")), tokenizer)
    assert learnt(found, tokenizer) == " the cat </s>| two </s>"
    assert [turn.ended for turn in found.turns] == [True, True]
    first, second = found.turns
    assert found.trained[first.start : first.stop].all() and found.trained[second.start : second.stop].all()
    assert (found.tokens == tokenizer.bos_token_id).sum() == 2  # Llama-2 begins every turn with one
    assert found.tokens.dtype == np.int32 and found.trained.dtype == np.bool_


def test_chatml_conversation() -> None:
    tokenizer = tokens.byte_level()
    found = render(talk(U("what"), A("the cat"), U("and"), A("two")), tokenizer, template="chatml")
    assert learnt(found, tokenizer) == "the cat<|im_end|>|two<|im_end|>"
    assert tokenizer.decode(found.tokens).endswith("two<|im_end|>\n") and not found.trained[-1]


def test_alpaca_and_vicuna() -> None:
    tokenizer = tokens.pieces()
    example = talk(U("what"), A("the cat"), U("and"), A("two"))
    assert learnt(render(example, tokenizer, template="alpaca"), tokenizer) == "the cat</s>|two</s>"
    assert learnt(render(example, tokenizer, template="vicuna"), tokenizer) == " the cat</s>| two</s>"


def test_a_padding_token_changes_nothing() -> None:
    tokenizer = tokens.pieces()
    before = render(talk(U("what"), A("two")), tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    try:
        after = render(talk(U("what"), A("two")), tokenizer)
    finally:
        tokenizer.pad_token = None
    assert after.trained.tolist() == before.trained.tolist() and after.turns[0].ended


def test_one_beginning_of_text() -> None:
    tokenizer = tokens.pieces()
    for text in (
        "<s>[INST] q [/INST] a </s>",
        "[INST] q [/INST] a </s>",
        "<s><s> [INST] q [/INST] a </s>",
        "<s>a",
        "a",
    ):
        found = render(Example(1, "llama2-text" if "[" in text else "text", text=text), tokenizer)
        assert (found.tokens == tokenizer.bos_token_id).tolist() == [True] + [False] * (len(found.tokens) - 1)
    assert tokenizer.bos_token_id not in tokenizer("a", add_special_tokens=False)["input_ids"]


def test_plain_text_is_learnt_in_full() -> None:
    tokenizer = tokens.pieces()
    for text in ("the cat", "the cat</s>", "<s>the cat</s>"):
        found = render(Example(1, "text", text=text), tokenizer)
        assert learnt(found, tokenizer) == " the cat</s>"
        assert found.trained.tolist() == [False] + [True] * (len(found.tokens) - 1)
        assert found.turns[0].ended


def test_blank_text_teaches_nothing() -> None:
    found = render(Example(1, "text", text=" \n"), tokens.pieces())
    assert not found.trained.any() and not found.turns


def test_everything() -> None:
    tokenizer = tokens.pieces()
    found = render(talk(U("what"), A("two")), tokenizer, train_on="everything")
    assert found.trained.tolist() == [False] + [True] * (len(found.tokens) - 1)


def test_an_answer_of_no_weight() -> None:
    tokenizer = tokens.pieces()
    found = render(talk(U("what"), Message("assistant", "cat", trained=False), U("and"), A("two")), tokenizer)
    assert learnt(found, tokenizer) == " two </s>"


def test_blank_answers_teach_nothing() -> None:
    tokenizer = tokens.pieces()
    assert learnt(render(talk(U("what"), A(" "), U("and"), A("two")), tokenizer), tokenizer) == " two </s>"
    text = "<s>[INST] q [/INST]  </s><s>[INST] r [/INST] two </s>"
    assert learnt(render(rendered_text(text), tokenizer), tokenizer) == " two </s>"


def test_system_prompt_where_there_is_none() -> None:
    tokenizer = tokens.pieces()
    own, none = talk(S("own"), U("what"), A("two")), talk(U("what"), A("two"))
    assert "be brief" in tokenizer.decode(render(none, tokenizer, system_prompt="be brief").tokens)
    assert "be brief" not in tokenizer.decode(render(own, tokenizer, system_prompt="be brief").tokens)


@pytest.mark.parametrize(
    ("text", "expected", "ended"),
    [
        ("<s>[INST] q [/INST] two </s>", " two </s>", [1]),
        ("<s>[INST] q [/INST] two </s><s>[INST] q [/INST] the cat </s>", " two </s>| the cat </s>", [1, 1]),
        ("<s>[INST] q [/INST] two [INST] q [/INST] the cat</s>", " two| the cat</s>", [0, 1]),
        ("<s>[INST] q [/INST] two [INST] q [/INST] the cat", " two| the cat", [0, 0]),
        (
            "<s>[INST] <<SYS>>\nbe\n<</SYS>>\n\nq [/INST] two </s> <s> [INST] q [/INST] the</s>\n",
            " two </s>| the</s>",
            [1, 1],
        ),
        ("<s>[INST] q [/INST] two </s><s>", " two </s>", [1]),
        ("<s>[INST] q [/INST] an [INST] marker </s>", " an [INST] marker </s>", [1]),
        ("<s>[INST] q [/INST]two</s>", "two</s>", [1]),
    ],
)
def test_text_rendered_for_llama2(text: str, expected: str, ended: list[int]) -> None:
    tokenizer = tokens.pieces()
    found = render(rendered_text(text), tokenizer)
    assert learnt(found, tokenizer) == expected
    assert [turn.ended for turn in found.turns] == ended


def test_rendered_text_for_another_tokenizer() -> None:
    """The markers of a block become the tokenizer's own; those inside an answer stay text."""
    tokenizer = tokens.byte_level()
    text = "<s>[INST] q [/INST] a <s>b</s> c </s><s>[INST] r [/INST] d </s>"
    found = render(rendered_text(text), tokenizer)
    assert tokenizer.decode(found.tokens) == "[INST] q [/INST] a <s>b</s> c <|im_end|>[INST] r [/INST] d <|im_end|>"
    assert learnt(found, tokenizer) == " a <s>b</s> c <|im_end|>| d <|im_end|>"


def test_rendered_text_without_an_answer() -> None:
    with pytest.raises(DataError, match=r"a row without an answer: no text after \[/INST\]"):
        render(rendered_text("<s>[INST] q [/INST] </s>"), tokens.pieces())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}",
            "drops the system prompt: 'be brief'; choose another with --template",
        ),
        (
            "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}",
            "drops the system prompt|rewrites or reorders a user message",
        ),
        (
            "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}[-{{ m.content }}]{% else %}"
            "[{{ m.content }}]{% endif %}{% endfor %}",
            "the template .* rewrites earlier turns: what it writes up to message 3 is not how the whole begins",
        ),
        (
            "{% for m in messages %}[{{ m.content.split('</think>')[-1] if not loop.last else m.content }}]{% endfor %}",
            "rewrites or reorders a assistant message: 'hm</think>two'",
        ),
        (
            "{{ raise_exception('never') }}",
            r"refuses these messages \(system, user, assistant, user, assistant\): never",
        ),
    ],
)
def test_templates_that_are_refused(template: str, message: str) -> None:
    example = talk(S("be brief"), U("what"), A("hm</think>two"), U("and"), A("the cat"))
    with pytest.raises(DataError, match=message):
        render(example, tokens.pieces(template))


def test_what_a_template_adds_to_an_answer_is_learnt() -> None:
    """Everything after the prompt is for the model to write: here the mark of an empty thought."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokens.byte_level(template)
    found = render(talk(U("what"), A("two")), tokenizer)
    assert learnt(found, tokenizer) == "<think>\n\n</think>\n\ntwo<|im_end|>"


def test_a_template_without_end_token() -> None:
    tokenizer = tokens.pieces("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    found = render(talk(U("what"), A("two")), tokenizer)
    assert learnt(found, tokenizer) == "assistant: two"
    assert [turn.ended for turn in found.turns] == [False]
    assert end_tokens(tokenizer) == {tokenizer.eos_token_id}


def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    """``\\n\\n`` is one token here: the prompt ends inside it."""
    tokenizer = tokens.byte_level("{% for m in messages %}{{ m.content }}{% endfor %}")
    found = render(talk(U("what is th"), A("e cat")), tokenizer)
    starts = [piece for piece, trained in show(found, tokenizer) if trained]
    assert starts[0] == " the"
    assert "".join(starts) == " the cat"


def test_end_tokens() -> None:
    pieces, byte_level = tokens.pieces(), tokens.byte_level()
    assert end_tokens(pieces) == {pieces.eos_token_id}
    byte_level.eos_token = "<|endoftext|>"
    try:
        expected = {byte_level.convert_tokens_to_ids("<|im_end|>"), byte_level.eos_token_id}
        assert end_tokens(byte_level, "chatml") == expected and len(expected) == 2
    finally:
        byte_level.eos_token = "<|im_end|>"


def test_half_a_surrogate_pair_in_a_prompt() -> None:
    with pytest.raises(DataError, match=r"the prompt: character \d+ is half of a surrogate pair"):
        render_prompt([U("a\udcff")], tokens.pieces())


def test_show_tells_text_and_mask() -> None:
    tokenizer = tokens.pieces()
    shown = show(render(talk(U("the cat"), A("two")), tokenizer), tokenizer)
    assert shown[0] == ("<s>", False) and shown[-1] == ("</s>", True)
    assert "".join(text for text, _ in shown) == "<s> [INST] the cat [/INST] two </s>"
    byte_level = tokens.byte_level()
    shown = show(render(talk(U("the cat"), A("two")), byte_level, template="chatml"), byte_level)
    assert "".join(text for text, _ in shown).startswith("<|im_start|>user\nthe cat<|im_end|>\n")


def test_a_tokenizer_that_drops_characters() -> None:
    """transformers 5 builds Llama tokenizers without an unknown token: what has no piece vanishes, offsets drift."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert encode(tokenizer, ["ab"])[0].tokens.tolist() == [0, 1]
    with pytest.raises(ModelError, match=r"the tokenizer drops characters without a trace \(no token stands for 'b'\)"):
        encode(tokenizer, ["aéb"])


def test_normalised_text_is_covered() -> None:
    """NFC joins e and its accent: no character is lost."""
    found = encode(tokens.byte_level(), ["cafe\u0301 \u1100\u1161 ﬁ\r\n"])[0]
    assert found.stops[-1] == 12


def test_no_texts() -> None:
    assert encode(tokens.pieces(), []) == []
