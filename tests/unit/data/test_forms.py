import math
from typing import Any

import pytest

from lamina.data.forms import Example, Message, example, is_llama2
from lamina.errors import DataError

QA = (Message("user", "q"), Message("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "sharegpt"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"instruction": "q", "input": math.nan, "output": "a"}, "alpaca"),
        ({"instruction": "q", "context": "", "response": "a"}, "alpaca"),
        ({"prompt": "q", "completion": "a"}, "prompt/completion"),
        ({"question": "q", "answer": "a"}, "question/answer"),
        ({"input": "q", "output": "a"}, "input/output"),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            "prompt/completion",
        ),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, "messages"),
        ({"messages": None, "question": "q", "answer": "a"}, "question/answer"),
    ],
)
def test_forms_of_a_conversation(row: dict[str, Any], form: str) -> None:
    found = example(row, 7)
    assert (found.row, found.form, found.messages, found.text) == (7, form, QA, "")


def test_alpaca_input_follows_the_instruction() -> None:
    found = example({"instruction": "Add.", "input": "1 2", "output": "3", "text": "unused"}, 1)
    assert found.messages[0] == Message("user", "Add.\n\n1 2")
    assert found.ignored == ("text",)


def test_parts_and_weights() -> None:
    parts = [{"type": "text", "value": "a"}, {"type": "text", "text": "b"}]
    row = {
        "messages": [
            {"role": "user", "content": parts, "loss_weight": 0.0},
            {"role": "assistant", "content": "first", "weight": 0},
            {"role": "assistant", "content": "second", "weight": 1},
        ]
    }
    assert example(row, 1).messages == (
        Message("user", "ab", trained=False),
        Message("assistant", "first", trained=False),
        Message("assistant", "second"),
    )


def test_system_column() -> None:
    assert example({"system": "s", "question": "q", "answer": "a"}, 1).messages == (Message("system", "s"), *QA)
    assert example({"system": " ", "question": "q", "answer": "a"}, 1).messages == QA
    own = {"system": "s", "conversations": [{"from": "system", "value": "t"}, {"from": "gpt", "value": "a"}]}
    assert example(own, 1).messages[0] == Message("system", "t")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("once upon a time", "text"),
        ("", "text"),
        ("<s>[INST] q [/INST] a </s>", "llama2-text"),
        (" <s> <s>\n[INST] q [/INST] a", "llama2-text"),
        ("[INST] q [/INST]", "llama2-text"),
        ("[INST] never closed", "text"),
        ("The marker [INST] and [/INST]", "text"),
        ("<script>alert(1)</script>", "text"),
    ],
)
def test_text(text: str, form: str) -> None:
    assert example({"text": text}, 1) == Example(1, form, text=text)
    assert is_llama2(text) == (form == "llama2-text")


def test_a_rendered_prompt_with_its_completion() -> None:
    for prompt, answer in [("<s>[INST] q [/INST]", "a </s>"), ("<s>[INST] q [/INST] ", "a </s>")]:
        found = example({"prompt": prompt, "completion": answer}, 1)
        assert found == Example(1, "llama2-text", text="<s>[INST] q [/INST] a </s>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "the row is a list, expected an object with named columns"),
        ("x", "the row is a text, expected an object"),
        ({}, "no known form in the columns none"),
        ({"a": 1, "b": 2}, "no known form in the columns 'a', 'b'"),
        ({f"c{index}": 1 for index in range(40)}, "'c10', 'c11', …"),
        ({"question": "q", "answer": None}, r"column 'answer' has no value \(a row without an answer\)"),
        ({"question": None, "answer": "a"}, "column 'question' has no value$"),
        ({"text": None}, "column 'text' has no value$"),
        ({"text": math.nan}, "column 'text' has no value"),
        ({"text": 3}, "text is 3, expected text"),
        ({"question": "q", "answer": ""}, "a row without an answer: column 'answer' is empty"),
        ({"question": "q", "answer": 4}, "answer is 4, expected text"),
        ({"prompt": "[INST] q [/INST]", "completion": " "}, "a row without an answer: column 'completion' is empty"),
        ({"messages": 5}, "messages is 5, expected a list of messages"),
        ({"messages": "[{"}, "messages is not a JSON list: "),
        ({"messages": "hello"}, "messages is a text, expected a list of messages"),
        ({"messages": []}, "messages is an empty list, expected messages"),
        ({"messages": ["hello"]}, r"messages\[0\] is a text, expected an object with role and content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\] has the role 'tool', expected system, user"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has the role None, expected system"),
        ({"messages": [{"role": [], "content": "x"}]}, r"messages\[0\] has the role \[\]"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content is null, expected text"),
        ({"messages": [{"role": "user", "content": True}]}, r"messages\[0\].content is True, expected text"),
        ({"messages": [{"role": "user", "content": {}}]}, r"messages\[0\].content is an object, expected text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "an object of type 'image', expected a part of",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "has the weight 0.5, expected 0 or 1"),
        (
            {"messages": [{"role": "user", "content": "q"}]},
            "a row without an answer: 'messages' holds no assistant message",
        ),
        (
            {"conversations": [{"from": "gpt", "value": " "}]},
            "a row without an answer: 'conversations' holds no assistant",
        ),
        ({"text": "a\ud83e"}, r"text: character 2 is half of a surrogate pair \(\\ud83e\), not text"),
    ],
)
def test_what_cannot_be_an_example(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        example(row, 1)
