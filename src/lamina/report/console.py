"""What a run says while it works: a live line on a terminal, plain lines in a pipe or a log, never an escape sequence there.

The text of data sets and models is untrusted: an answer may hold escape sequences that rewrite a terminal. Everything that
came from outside goes through ``clean`` or ``safe_json`` before it is printed.
"""

import io
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lamina.training.loop import Step

Stream = TextIO | io.TextIOWrapper | io.StringIO  # the latter two are TextIO to a type checker, but not at run time
_PLAIN_SECONDS = 10.0  # a log stays readable, and still shows within ten seconds that the run lives
_PLAIN_LINES = 20  # lines over a whole run, where that is more often
_LIVE_SECONDS = 0.2
_WINDOW = 20  # steps over which the rate is averaged: packed steps differ in length
_PIPE_WIDTH = 110
_LONGEST_ANSWER = 600

# C0 but tab and line feed, DEL, C1, the controls of writing direction, and lone surrogates, which no stream can encode.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """The text with every character that could steer a terminal replaced by U+FFFD."""
    return _UNSAFE.sub("\ufffd", text)


def safe_json(value: Any) -> str:
    """The value as one line of JSON, faithful and yet harmless on a terminal: unsafe characters are escaped."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


class Progress:
    """Shows a run as it goes: its lines, steps and evaluations. Use with ``contextlib.closing``: the live line must end."""

    def __init__(self, stream: Stream, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock = 0, clock
        self.console = _console(stream, _Unheard)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if stream.isatty() else None
        self.recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self.shown_at, self.shown_step = -float("inf"), 0
        self.base_loss: float | None = None

    def start(self, steps: int, done: int) -> None:
        """Begins to count: ``done`` of ``steps`` were done before."""
        self.total, self.shown_step = steps, done
        if self.live:
            self.live.start()

    def step(self, step: Step) -> None:
        """Shows a finished step, unless one was shown a moment ago."""
        self.recent.append((step.tokens, step.seconds))
        now, last = self.clock(), step.step == self.total
        text = self._describe(step)
        if self.live:
            if now - self.shown_at >= _LIVE_SECONDS or last:
                self.live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
                self.shown_at = now
        elif now - self.shown_at >= _PLAIN_SECONDS or last or step.step - self.shown_step >= self.total / _PLAIN_LINES:
            self.line(text)
            self.shown_at, self.shown_step = now, step.step

    def evaluation(self, step: int, loss: float) -> None:
        """Shows a held-out loss; the one at step 0 is the untouched base's, to which the others are compared."""
        if step == 0:
            self.base_loss, beside = loss, " (the untouched base)"
        else:
            beside = "" if self.base_loss is None else f" (base {self.base_loss:.4f})"
        self.line(f"step {step}/{self.total}  held-out loss {loss:.4f}{beside}")

    def line(self, text: str) -> None:
        """Prints a line, above the live one if there is one."""
        self.console.print(Text(clean(text)), soft_wrap=True)

    def close(self) -> None:
        """Ends the live line."""
        if self.live:
            self.live.stop()

    def _describe(self, step: Step) -> str:
        tokens, seconds = (sum(column) for column in zip(*self.recent, strict=True))
        left = (self.total - step.step) * seconds / len(self.recent)
        rate = f"{tokens / seconds:,.0f} tokens/s" if seconds else "- tokens/s"
        return (
            f"step {step.step}/{self.total}  loss {step.loss:.4f}  lr {step.learning_rate:.2e}"
            f"  {rate}  {duration(left)} left  {step.memory_bytes / 2**30:.2f} GiB"
        )


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def before_after(
    measures: Sequence[Sequence[str]],
    answers: Sequence[tuple[str, str, str, str]],
    stream: Stream,
    lines: Sequence[str] = (),
) -> None:
    """Prints the untouched base beside the adapter.

    Args:
        measures: (name, base, adapter, change with its interval), numbers formatted by whoever knows their unit; the
            change may be missing.
        answers: (prompt, expected or "", base's answer, adapter's answer).
        lines: what is said between the two.
    """
    console = _console(stream)
    if measures:
        table = _table(*("", "base", "adapter", "change [95 % interval]")[: len(measures[0])])
        for row in measures:
            table.add_row(*map(_cell, row))
        console.print(table)
    for line in lines:
        console.print(Text(clean(line)), soft_wrap=True)
    if answers:
        console.print()
        wanted = any(expected for _, expected, _, _ in answers)
        examples = _table("prompt", "base", "adapter", *(["expected"] if wanted else []))
        for prompt, expected, base, adapter in answers:
            examples.add_row(*map(_cell, [prompt, base, adapter, *([expected] if wanted else [])]))
        console.print(examples)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], stream: Stream) -> None:
    """Prints a table."""
    shown = _table(*map(clean, columns))
    for row in rows:
        shown.add_row(*map(_cell, row))
    _console(stream).print(shown)


class _Piped(Console):
    """Leaves it to the command line to end when the reader goes away: rich itself would, with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Unheard(Console):
    """Falls silent when the reader goes away: hours of training are worth more than their listener."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "wb") as nowhere:  # what is still buffered must go somewhere
            os.dup2(nowhere.fileno(), self.file.fileno())


def say(texts: Iterable[Text], stream: Stream) -> None:
    """Prints texts, one after another, with their colours where the stream is a terminal."""
    console = _console(stream)
    for text in texts:
        console.print(text, soft_wrap=True)


def _console(stream: Stream, kind: type[Console] = _Piped) -> Console:
    """A console that never writes an escape sequence into anything but a terminal, whatever the environment says."""
    terminal = stream.isatty()
    return kind(
        file=stream, force_terminal=terminal, width=None if terminal else _PIPE_WIDTH, highlight=False, markup=False
    )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table


def _cell(text: str) -> Text:
    """Untrusted text as a cell: no markup, no control characters, not endless."""
    text = clean(text.strip())
    return Text(text if len(text) <= _LONGEST_ANSWER else text[:_LONGEST_ANSWER] + " …")
