"""Answers a file of prompts with a run, or with a plain model.

The file holds one prompt a line (.txt), or one object a line (.jsonl): {"prompt": "…"} or {"messages": [{"role": "user",
"content": "…"}, …]}. Prompts are put into the chat template of the run."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from lamina.commands.opening import add_opening, add_sampling, open_given, sampling_of
from lamina.data.forms import Message, Role
from lamina.data.render import render_prompt
from lamina.errors import DataError
from lamina.generation import generate
from lamina.report.console import clean, safe_json

Conversation = tuple[Message, ...]


def arguments(parser: argparse.ArgumentParser) -> None:
    add_opening(parser, "folder of a run, of a model, or of an adapter; or a model's id on the hub", bare=True)
    add_sampling(parser)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="the prompts: .txt or .jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")


def run(given: argparse.Namespace) -> None:
    conversations = read_prompts(Path(given.prompts))
    opened = open_given(given)
    sampling = sampling_of(given, opened)
    data = opened.job.data if opened.job else None
    template, system = (data.template, data.system_prompt) if data else (None, None)
    prompts = [render_prompt(messages, opened.tokenizer, template, system) for messages in conversations]
    answers = generate(opened.model, prompts, sampling, opened.stop, given.seed)
    for messages, answer in zip(conversations, answers, strict=True):
        text = opened.tokenizer.decode(
            list(answer.tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).strip()
        prompt = messages[-1].content
        if given.json:
            print(
                safe_json({"prompt": prompt, "answer": text, "tokens": len(answer.tokens), "stopped": answer.stopped})
            )
        else:
            print(f"> {clean(prompt)}\n{clean(text)}{'' if answer.stopped else ' …'}\n")


def read_prompts(path: Path) -> list[Conversation]:
    """The conversations of a file of prompts, each to be answered.

    Raises:
        DataError: the file cannot be read, or holds no prompts; all broken lines.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+2028, \f, …
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), expected a file of prompts") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text, expected a file of prompts") from None
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: found the ending {path.suffix!r}, expected .txt or .jsonl")
    read, problems = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                read.append(_conversation(line) if path.suffix == ".jsonl" else (Message("user", line.strip()),))
            except DataError as error:
                problems.append(f"{path}:{number}: {error}")
    if problems:
        raise DataError("; ".join(problems))
    if not read:
        raise DataError(f"{path}: found no prompts, expected at least one")
    return read


def _conversation(line: str) -> Conversation:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"found broken JSON ({error.msg}), expected an object") from None
    match row:
        case {"messages": [*messages]} if messages:
            turns = tuple(_messages(messages))
            if turns[-1].role == "user":
                return turns
            raise DataError(
                f"found {turns[-1].role} as the last role, expected user: it is its message that is answered"
            )
        case {"prompt": str(prompt)} if prompt.strip():
            return (Message("user", prompt.strip()),)
    raise DataError('found neither {"prompt": "…"} nor {"messages": […]}')


def _messages(messages: list[Any]) -> Iterator[Message]:
    for message in messages:
        match message:
            case {"role": str(role), "content": str(content)} if role in get_args(Role):
                yield Message(role, content)  # type: ignore[arg-type]  # get_args holds exactly the literals of Role
            case _:
                raise DataError(
                    f"found the message {message!r}, expected role ({', '.join(get_args(Role))}) and content"
                )
