"""The command line: finds the command, and turns errors into exit states. Commands are in ``lamina.commands``.

Exit status: 0 done; 2 the user's mistake, told in one line; 130 interrupted; 141 the reader of a pipe went away; 1 a bug
of ours, with its traceback. A command is imported when it is called, so that ``lamina --help`` loads nothing heavy.
"""

import argparse
import difflib
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lamina.errors import ConfigError, Error, memory_told
from lamina.process import prepare

COMMANDS = {
    "init": "print a complete, commented job.toml",
    "check": "say what is wrong with a job, why it matters and how to mend it; trains nothing",
    "plan": "say what a job will need: memory item by item, and time",
    "train": "fine-tune: train JOB, or train --model M --data D; train --resume RUN goes on",
    "replay": "run a reference job again with its faults, one by one: replay A, B or C",
    "eval": "measure a run on its held-out rows, the base beside the adapter",
    "compare": "put the cards of runs side by side",
    "explain": "say what an adapter is: its size, its rank, where it sits, which rank would have done",
    "report": "write a run's page, report.html: what it learnt, forgot and cost, with charts",
    "generate": "answer a file of prompts with a run or a model",
    "chat": "talk to a run or a model, and to its base",
    "merge": "write the model with the adapter merged in, checked against both",
    "jobs": "list the built-in jobs, or print one",
}
_EXAMPLES = """\
  lamina train demo                          a first fine-tune, in two minutes on a laptop
  lamina train --model M --data D            M, D: a folder or file, or a name on the Hugging Face Hub
  lamina init > job.toml; lamina train job.toml
  lamina chat runs/demo-1"""
_MORE_MEMORY = "what was saved is untouched; free some memory, or run where there is more (--device)"
# What the machine refuses, not what Lamina gets wrong: the user can mend these.
_USERS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "name another place, or make this one writable",
    errno.EACCES: "name another place, or give yourself the right to this one",
    errno.EPERM: "name another place, or give yourself the right to this one",
}


class Parser(argparse.ArgumentParser):
    """argparse with errors of ours: one line, exit status 2, the nearest flag named."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments, none left over.

        Raises:
            ConfigError: an unknown flag, with the nearest known one; a word too many; a flag without its value.
        """
        known = [option for action in self._actions for option in action.option_strings]
        unknown = [word.split("=")[0] for word in arguments if word.startswith("--") and len(word) > 2]
        if problems := [_unknown("flag", word, known) for word in unknown if word not in known]:
            self.error("; ".join(problems))
        namespace, extra = self.parse_known_args(arguments)
        if extra:
            self.error(f"found {extra[0]!r}, which no argument expects")
        return namespace


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 must not end a run at a "≥"
            stream.reconfigure(errors="backslashreplace")
    try:
        with memory_told(_MORE_MEMORY):  # what a run says itself, with its folder, passes
            _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except Error as error:
        return _refuse(str(error), 2)
    except KeyboardInterrupt as interrupt:
        return _refuse(str(interrupt) or "interrupted", 130)
    except BrokenPipeError:  # `lamina jobs | head -1`: nobody is left to tell
        _drop_output()
        return 141
    except OSError as error:
        if error.errno not in _USERS:
            raise
        if error.filename is None:
            _drop_output()
        return _refuse(f"{error.filename or 'writing'}: {error.strerror}; {_USERS[error.errno]}", 2)
    return 0


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"lamina {version('lamina')}")
        return
    name = arguments[0]
    if name not in COMMANDS:
        raise ConfigError(f"{_unknown('command', name, list(COMMANDS))}; see `lamina --help`")
    prepare()  # before torch is loaded, below
    command = importlib.import_module(f"lamina.commands.{name}")
    parser = parser_of(name, command)
    command.run(parser.parse(arguments[1:]))


def parser_of(name: str, command: Any) -> Parser:
    """The parser of a command's module."""
    parser = Parser(prog=f"lamina {name}", description=command.__doc__)
    command.arguments(parser)
    return parser


def usage() -> str:
    """What ``lamina --help`` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: lamina COMMAND [arguments]\n\nFine-tunes Llama-2 and its family with LoRA, exactly, and shows what it did.\n\n"
        f"commands:\n{commands}\n\nexamples:\n{_EXAMPLES}\n\n"
        "`lamina COMMAND --help` lists a command's arguments; `lamina --version` says which Lamina this is."
    )


def _unknown(kind: str, word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"found {kind} {word!r}, which is unknown" + (f"; did you mean {close[0]}?" if close else "")


def _drop_output() -> None:
    """What standard output cannot take must not be tried again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(message: str, status: int) -> int:
    """Tells an error in one line, whatever a data set or a model put into it."""
    line = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(message.split()))
    print(f"lamina: {line}", file=sys.stderr)
    return status
