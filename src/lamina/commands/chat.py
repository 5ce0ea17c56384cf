"""Talks to a run, or to a plain model: answers stream, and earlier turns are remembered.

/base switches the adapter off, and on again, to compare; /help lists the other commands. Lines may also be piped in."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from lamina.adapter import adapted, adapter_scale
from lamina.commands.opening import add_opening, add_sampling, open_given, sampling_of
from lamina.data.forms import Message
from lamina.data.render import render_prompt
from lamina.errors import DataError, ModelError
from lamina.generation import stream
from lamina.model.detokenizer import Detokenizer
from lamina.report.console import clean

HELP = """\
/base         switch the adapter off, and on again
/system TEXT  set the system prompt and begin anew; without TEXT, have none
/reset        forget the conversation
/help         this list
/quit         leave; so does Ctrl-D"""

Answer = Callable[[Sequence[Message], bool], Iterator[str]]
"""Pieces of the answer to a conversation; the adapter is on or off."""
Write = Callable[[str], object]


def arguments(parser: argparse.ArgumentParser) -> None:
    add_opening(parser, "folder of a run, of a model, or of an adapter; or a model's id on the hub", bare=True)
    add_sampling(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")


def run(given: argparse.Namespace) -> None:
    opened = open_given(given)
    sampling = sampling_of(given, opened)
    template = opened.job.data.template if opened.job else None
    turns = 0

    def answer(messages: Sequence[Message], adapted: bool) -> Iterator[str]:
        nonlocal turns
        turns += 1  # each answer draws anew, and the same conversation with the same seed is the same
        prompt = render_prompt(messages, opened.tokenizer, template)
        with nullcontext() if adapted else adapter_scale(opened.model, 0.0):
            yield from pieces(opened.tokenizer, stream(opened.model, prompt, sampling, opened.stop, given.seed + turns))

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    system = given.system or (opened.job.data.system_prompt if opened.job else None)
    terminal = sys.stdin.isatty()
    if terminal:
        write(f"{opened.name}. /help lists the commands.\n")
    converse(lines(terminal), answer, write, system, has_adapter=bool(adapted(opened.model)))


def lines(terminal: bool) -> Iterator[str]:
    """What the user says: with a prompt and line editing on a terminal, as it comes from a pipe."""
    if not terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  # importing it gives input() its editing and history

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def converse(said: Iterable[str], answer: Answer, write: Write, system: str | None, has_adapter: bool) -> None:
    """Holds a conversation until there is nothing more said."""
    turns: list[Message] = []
    adapted = has_adapter
    for line in said:
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                pass
            case "/quit":
                return
            case "/help":
                write(HELP + "\n")
            case "/reset":
                turns = []
                write("[the conversation begins anew]\n")
            case "/system":
                turns, system = [], rest.strip() or None
                write(f"[system prompt {'set' if system else 'removed'}; the conversation begins anew]\n")
            case "/base" if has_adapter:
                adapted = not adapted
                write(f"[the adapter is {'on' if adapted else 'off: this is the base'}]\n")
            case "/base":
                write("[this is a base: there is no adapter to switch off]\n")
            case _ if command.startswith("/"):
                write(f"[no command {clean(command)}; /help lists them]\n")
            case _:
                turns = _turn([*turns, Message("user", line.strip())], answer, write, system, adapted)


def _turn(turns: list[Message], answer: Answer, write: Write, system: str | None, adapted: bool) -> list[Message]:
    """Writes one answer as it comes, and returns the conversation with it. Ctrl-C cuts it short."""
    said: list[str] = []
    try:
        for piece in answer([*([Message("system", system)] if system else []), *turns], adapted):
            said.append(piece if said else piece.lstrip())
            write(clean(said[-1]))
    except KeyboardInterrupt:
        if not said:
            raise
        write(" …")
    except (
        DataError,
        ModelError,
    ) as error:  # the template refuses a system prompt, or the context is full: say it, go on
        write(f"[{clean(str(error))}]\n")
        return turns[:-1]
    write("\n")
    return [*turns, Message("assistant", "".join(said).strip())]


def pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come."""
    detokenizer = Detokenizer(tokenizer)
    yield from filter(None, map(detokenizer.push, tokens))
    yield detokenizer.flush()
