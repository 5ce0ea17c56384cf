"""Writes docs/reference.md: every command, flag and setting, from the code."""

import argparse
import importlib
from collections.abc import Iterable
from pathlib import Path

from lamina import cli, jobfile, jobs
from lamina.job import SECTIONS
from lamina.section import expected
from lamina.settings import Setting, default_text, settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
_HEAD = """\
# Reference

Written by `scripts/write_reference.py` from the code; a test compares. Do not edit by hand.

## Commands

Exit status: 0 done; 1 a bug of ours, with its traceback; 2 your mistake, told in one line that begins with `lamina:`;
130 interrupted; 141 the reader of a pipe went away.
"""
_SETTINGS = """\
## Settings

Each setting is a key of a job file, in the section named, and a flag of `lamina train` and `lamina init`. Flags win over the
file, the file over the defaults. Text of a flag: `--targets q_proj,v_proj` for a list, `--rank-pattern 'q_proj=8,k_proj=4'` for
a table, `--rslora` and `--no-rslora` for true and false, `none` where none is allowed (`"none"` in a file). `--epochs` is
refused where steps are set, by a flag or by the job, because steps decide alone: `--epochs 3 --steps none`.
"""


def reference() -> str:
    """The page."""
    parts = [_HEAD]
    for name in cli.COMMANDS:
        command = importlib.import_module(f"lamina.commands.{name}")
        parser = cli.parser_of(name, command)
        parts.append(f"### lamina {name}\n\n{(command.__doc__ or '').strip()}\n")
        parts.append(_arguments(parser))
    parts.append(_SETTINGS)
    for section, cls in {"": jobfile.Head, **SECTIONS}.items():
        title = f"### [{section}]" if section else "### At the top of the file"
        text = " ".join((cls.__doc__ or "").split())
        parts.append(f"{title}\n\n{text}\n")
        parts.append(_table(["key", "flag", "", "default", "expected"], map(_row, settings({section: cls}))))
    listed = [[f"`{name}`", jobs.summary(name)] for name in jobs.names()]
    parts.append("## Built-in jobs\n\n`lamina jobs NAME` prints a job's file, with its reasons.\n")
    parts.append(_table(["job", ""], listed))
    return "\n".join(parts)


def _arguments(parser: argparse.ArgumentParser) -> str:
    """The command's own arguments; of the settings it takes, the sections."""
    own = [
        [f"`{', '.join(action.option_strings) or action.metavar}`", action.help or ""]
        for action in parser._actions
        if "." not in action.dest and action.dest != "help"
    ]
    sections = {action.dest.split(".")[0] or "the top" for action in parser._actions if "." in action.dest}
    table = _table(["argument", ""], own)
    order = ["the top", *SECTIONS]
    taken = ", ".join(f"[{name}]" if name in SECTIONS else name for name in order if name in sections)
    return table + (f"\nAnd the settings of {taken}, as flags.\n" if taken else "")


def _row(setting: Setting) -> list[str]:
    flag = f"`{setting.flag}`"
    if setting.field.annotation is bool:
        flag += f" `--no-{setting.flag[2:]}`"
    return [f"`{setting.name}`", flag, setting.doc, default_text(setting), expected(setting.field)]


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [
        head,
        ["---"] * len(head),
        *([cell.replace("|", "\\|").replace("<", "\\<") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
