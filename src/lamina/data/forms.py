"""The forms a row may have, told from its columns, and the example each becomes.

| form | columns |
|---|---|
| messages | ``messages``: a list of ``{role, content}`` |
| sharegpt | ``conversations``: a list of ``{from, value}`` |
| alpaca | ``instruction`` and ``output`` (or ``response``), with ``input`` (or ``context``) when there is one |
| prompt/completion, question/answer, … | two texts, or two lists of messages |
| text | ``text``; every token of it is trained on |
| llama2-text | ``text`` that is already rendered for Llama-2: ``<s>[INST] … [/INST] … </s>`` |

The form is found for every row, so that files may mix them; the first that fits, from the top, is taken. Columns that
the form does not read are ignored and named in the report. A column without a value (null, NaN) counts as absent.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from lamina.errors import DataError

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
_LISTS = {"messages": "messages", "conversations": "sharegpt", "conversation": "sharegpt"}
_PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("input", "output"),
)  # fmt: skip
KNOWN = "known forms: messages; conversations; instruction + output; prompt + completion; question + answer; text"
COLUMNS = frozenset({"system", "input", "context", "text", *_LISTS}.union(*map(set, _PAIRS)))
"""Every column that some form reads."""
SHOWN_COLUMNS = 12
"""Columns that an error names."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``trained=False`` (``weight: 0`` in the data) keeps an answer out of the loss."""

    role: Role
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Example:
    """One row: its number, the form it was found in, and either its messages or its text."""

    row: int
    form: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    ignored: tuple[str, ...] = ()


def example(row: Any, number: int) -> Example:
    """Turns a row into an example by its columns.

    Raises:
        DataError: without a place: no known form, a wrong type, an unknown role, or no answer.
    """
    if not isinstance(row, dict):
        raise DataError(f"the row is {_kind(row)}, expected an object with named columns")
    full = {name: value for name, value in row.items() if not _absent(value)}
    form, used = _find(full)
    if not form:
        raise DataError(_why_no_form(row))
    text: str | None = None
    messages: tuple[Message, ...] = ()
    if form == "text":
        text = _text(full["text"], "text")
    elif len(used) == 1 or isinstance(full[used[0]], list):
        messages = tuple(message for name in used for message in _messages(full[name], name))
    elif is_llama2(text := _text(full[used[0]], used[0])):
        text = _joined(text, _answer(full, used[1]))
    else:
        used, messages = _pair(full, form, used, text)
        text = None
    if text is not None:
        form = "llama2-text" if is_llama2(text) else "text"
    elif not any(message.role == "assistant" and message.content.strip() for message in messages):
        raise DataError(f"a row without an answer: {used[0]!r} holds no assistant message with text")
    elif "system" in full and messages[0].role != "system":
        used += ("system",)
        system = _text(full["system"], "system")
        messages = (Message("system", system), *messages) if system.strip() else messages
    return Example(number, form, messages, text or "", tuple(name for name in row if name not in used))


def _pair(
    row: dict[str, Any], form: str, used: tuple[str, ...], question: str
) -> tuple[tuple[str, ...], tuple[Message, ...]]:
    """A question and its answer; Alpaca's ``input`` follows the instruction after a blank line."""
    answer = _answer(row, used[1])
    context = next((name for name in ("input", "context") if name in row), None) if form == "alpaca" else None
    if context:
        used += (context,)
        given = _text(row[context], context)
        question = f"{question}\n\n{given}" if given.strip() else question
    return used, (Message("user", question), Message("assistant", answer))


def _answer(row: dict[str, Any], column: str) -> str:
    answer = _text(row[column], column)
    if not answer.strip():
        raise DataError(f"a row without an answer: column {column!r} is empty")
    return answer


def _joined(prompt: str, answer: str) -> str:
    """A rendered prompt with its answer: one space between them, where neither brings any."""
    return prompt + ("" if prompt[-1:].isspace() or answer[:1].isspace() else " ") + answer


def _why_no_form(row: dict[str, Any]) -> str:
    """What keeps a row from having a form: columns without a value, or none that is known."""
    form, used = _find(row)
    if form:
        empty = [name for name in used if _absent(row[name])][-1]
        answer = " (a row without an answer)" if empty in used[1:] else ""
        return f"column {empty!r} has no value{answer}"
    names = [repr(name) for name in row][:SHOWN_COLUMNS]
    names += ["…"] if len(row) > SHOWN_COLUMNS else []
    return f"no known form in the columns {', '.join(names) or 'none'}"


def is_llama2(text: str) -> bool:
    """Whether a text is already rendered for Llama-2: ``[INST]`` first (after ``<s>``), ``[/INST]`` later."""
    head = text.lstrip()
    while head.startswith("<s>"):
        head = head[3:].lstrip()
    return head.startswith("[INST]") and "[/INST]" in head


def bad_unicode(text: str) -> str:
    """What keeps a text from being Unicode (half of a surrogate pair), or nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is half of a surrogate pair (\\u{ord(text[error.start]):04x}), not text"
    return ""


def _find(row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The form and the columns it needs, or nothing."""
    for name, form in _LISTS.items():
        if name in row:
            return form, (name,)
    for question, answer in _PAIRS:
        if question in row and answer in row:
            return ("alpaca" if question == "instruction" else f"{question}/{answer}"), (question, answer)
    return ("text", ("text",)) if "text" in row else ("", ())


def _messages(items: Any, column: str) -> tuple[Message, ...]:
    if isinstance(items, str) and items.lstrip().startswith("["):  # a CSV cell
        try:
            items = json.loads(items)
        except ValueError as error:
            raise DataError(f"{column} is not a JSON list: {error}") from None
    if not isinstance(items, list):
        raise DataError(f"{column} is {_kind(items)}, expected a list of messages")
    if not items:
        raise DataError(f"{column} is an empty list, expected messages")
    return tuple(_message(item, f"{column}[{index}]") for index, item in enumerate(items))


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{where} is {_kind(item)}, expected an object with role and content")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{where} has the role {role!r}, expected system, user or human, assistant or gpt")
    weight = next((item[name] for name in ("weight", "loss_weight") if not _absent(item.get(name))), 1)
    if weight not in (0, 1):
        raise DataError(f"{where} has the weight {weight!r}, expected 0 or 1")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    return Message(_ROLES[role], _text(content, f"{where}.content"), bool(weight))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        raise DataError(f"{where} is {_kind(part)}, expected a part of type text")
    return _text(part.get("text", part.get("value")), where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {_kind(value)}, expected text")
    if problem := bad_unicode(value):
        raise DataError(f"{where}: {problem}")
    return value


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind(value: Any) -> str:
    """A value as an error names it."""
    if _absent(value):
        return "null"
    if isinstance(value, bool | int | float):
        return f"{value!r}"
    if isinstance(value, dict):
        of = f" of type {value['type']!r}" if "type" in value else ""
        return f"an object{of}"
    names: dict[type, str] = {str: "a text", list: "a list"}
    return names.get(type(value), f"a {type(value).__name__}")
