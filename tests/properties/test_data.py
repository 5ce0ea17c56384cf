"""What must hold of rendering and packing whatever the data."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.fit import Long, fit
from lamina.data.forms import Example, Message, is_llama2
from lamina.data.llama2_text import find_turns
from lamina.data.pack import pack
from lamina.data.render import Rendered, Turn, render, render_prompt
from lamina.data.templates import chat_format
from lamina.errors import DataError

# Any text but lone surrogates, and but the special tokens themselves, which a tokenizer reads as such.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "<" not in text)
words = st.lists(st.sampled_from("the cat sat on a mat, [INST] [/INST] two. é 🦙 \n".split(" ")), max_size=8).map(
    " ".join
)
content = st.one_of(text, words)
answer = content.filter(lambda content: content.strip() != "")
turns = st.lists(st.tuples(content, answer), min_size=1, max_size=3)
cases = pytest.mark.parametrize(
    ("make", "template", "end"), [(tokens.pieces, "llama2", "</s>"), (tokens.byte_level, "chatml", "<|im_end|>")]
)
quick = settings(max_examples=60, deadline=None)


def conversation(turns: list[tuple[str, str]]) -> Example:
    pairs = [(Message("user", question), Message("assistant", answer)) for question, answer in turns]
    return Example(1, "messages", tuple(message for pair in pairs for message in pair))


@cases
@quick
@given(turns=turns)
def test_the_mask_covers_the_answers_and_their_end_tokens(
    make: Any, template: str, end: str, turns: list[tuple[str, str]]
) -> None:
    tokenizer = make()
    found = render(conversation(turns), tokenizer, template=template)
    assert len(found.turns) == len(turns) and all(turn.ended for turn in found.turns)
    covered = np.zeros(len(found.tokens), dtype=np.bool_)
    for turn, (_, said) in zip(found.turns, turns, strict=True):
        covered[turn.start : turn.stop] = True
        written = f" {said.strip()} {end}" if template == "llama2" else f"{said}{end}"
        alone = tokenizer.decode(found.tokens[turn.start : turn.stop])
        expected = tokenizer.decode(tokenizer(written, add_special_tokens=False)["input_ids"])
        assert alone.strip() == expected.strip()
        assert found.tokens[turn.stop - 1] == tokenizer.convert_tokens_to_ids(end)
    assert (covered == found.trained).all()


@cases
@quick
@given(turns=turns)
def test_everything_but_the_first_token(make: Any, template: str, end: str, turns: list[tuple[str, str]]) -> None:
    found = render(conversation(turns), make(), template=template, train_on="everything")
    assert not found.trained[0] and found.trained[1:].all()


@cases
@quick
@given(turns=turns)
def test_the_prompt_begins_the_whole(make: Any, template: str, end: str, turns: list[tuple[str, str]]) -> None:
    """In Llama-2's form always; in ChatML's unless the tokenizer merges the line's end with the answer's beginning."""
    tokenizer, example = make(), conversation(turns)
    prompt = render_prompt(example.messages[:-1], tokenizer, template)
    whole = render(example, tokenizer, template=template)
    if template == "llama2" or not turns[-1][1][0].isspace():
        assert whole.tokens[: len(prompt)].tolist() == prompt
        assert whole.turns[-1].start == len(prompt)


@quick
@given(turns=turns)
def test_rendered_text_is_learnt_as_its_messages_are(turns: list[tuple[str, str]]) -> None:
    if any("INST]" in part for turn in turns for part in turn):
        return
    tokenizer = tokens.pieces()
    example = conversation(turns)
    text = chat_format(tokenizer, "llama2").write(example.messages)
    one, other = render(example, tokenizer), render(Example(1, "llama2-text", text=text), tokenizer)
    assert one.tokens.tolist() == other.tokens.tolist() and one.turns == other.turns
    assert one.trained.tolist() == other.trained.tolist()


Raw = tuple[list[int], list[bool], int]


@st.composite
def raw(draw: st.DrawFn, max_size: int = 40) -> Raw:
    """Token ids, targets (at least one) and a row number."""
    size = draw(st.integers(2, max_size))
    trained = [False, *draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1))]
    trained[draw(st.integers(1, size - 1))] = True
    return draw(st.lists(st.integers(0, 99), min_size=size, max_size=size)), trained, draw(st.integers(1, 10**6))


def rendered(raw: Raw) -> Rendered:
    ids, trained, row = raw
    return Rendered(np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_), row)


@quick
@given(raws=st.lists(raw(), max_size=30), budget=st.integers(1, 60))
def test_packing_loses_nothing(raws: list[Raw], budget: int) -> None:
    examples = [rendered(raw) for raw in raws]
    batches = pack(examples, budget)
    found: Counter[Any] = Counter()
    for batch in batches:
        assert sum(batch.lengths) == len(batch.tokens) == len(batch.targets) == len(batch.position)
        assert sum(batch.lengths) <= budget or len(batch.rows) == 1
        assert batch.real_tokens == sum(batch.real_lengths)
        start = 0
        for row, length, real in zip(batch.rows, batch.lengths, batch.real_lengths, strict=True):
            part = slice(start, start + length)
            assert batch.position[part].tolist() == list(range(length))
            found[row, real, tuple(batch.tokens[part].tolist()), tuple(batch.targets[part].tolist())] += 1
            start += length
    expected: Counter[Any] = Counter()
    for example in examples:
        last = int(np.flatnonzero(example.trained)[-1])
        pairs = zip(example.tokens[1 : last + 1].tolist(), example.trained[1 : last + 1].tolist(), strict=True)
        targets = tuple(token if trained else -100 for token, trained in pairs)
        expected[example.row, len(example.tokens), tuple(example.tokens[:last].tolist()), targets] += 1
    assert found == expected
    sizes = [sum(batch.lengths) for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert [batch.rows for batch in pack(examples, budget)] == [batch.rows for batch in batches]


@quick
@given(
    raw=raw(),
    length=st.integers(8, 40),
    long=st.sampled_from(["drop", "truncate", "split"]),
    bos=st.booleans(),
)
def test_what_is_cut_is_counted(raw: Raw, length: int, long: Long, bos: bool) -> None:
    example = rendered(raw)
    targets = np.flatnonzero(example.trained)
    turns = (Turn(int(targets[0]), int(targets[-1]) + 1, True),)
    example = Rendered(example.tokens, example.trained, example.row, turns)
    count = Counter[str]()
    pieces = fit(example, length, long, int(example.tokens[0]) if bos else None, count)
    assert all(len(piece.tokens) <= length and piece.trained.any() and not piece.trained[0] for piece in pieces)
    kept = Counter(token for piece in pieces for token in piece.tokens[piece.trained].tolist())
    whole = Counter(example.tokens[example.trained].tolist())
    assert kept <= whole and (whole - kept).total() == count["lost_targets"]
    if len(example.tokens) <= length:
        assert pieces == [example] and not count
    if long == "split" and bos:
        assert count["lost_targets"] == 0


@quick
@given(
    parts=st.lists(st.sampled_from(["<s>", "</s>", "[INST]", "[/INST]", " ", "a", "\n", "b c"]), max_size=25).map(
        "".join
    )
)
def test_any_order_of_markers(parts: str) -> None:
    """Rendered text may be broken in any way: it gives an example, or a reason, and never a second beginning."""
    tokenizer = tokens.pieces()
    example = Example(1, "llama2-text" if is_llama2(parts) else "text", text=parts)
    if example.form == "llama2-text" and not find_turns(parts, "<s>", "</s>")[1]:
        with pytest.raises(DataError, match="a row without an answer"):
            render(example, tokenizer)
        return
    found = render(example, tokenizer)
    assert found.tokens[0] == tokenizer.bos_token_id
    assert len(found.tokens) < 2 or found.tokens[1] != tokenizer.bos_token_id
    assert not found.trained[0]
