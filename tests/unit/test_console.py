"""What a run says: plain lines in a pipe, a live line on a terminal, and nothing that steers the terminal."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from lamina.commands import replay, train
from lamina.replaying import Replayed
from lamina.report.console import Progress, before_after, clean, duration, safe_json
from lamina.run import Result
from lamina.training.loop import Step
from lamina.understand.card import Card

HOSTILE = "\x1b[2Jgone \x9b31m\r\x07\u202eback\ud800"


def shown(number: int, tokens: int = 600, seconds: float = 2.0) -> Step:
    return Step(
        step=number,
        loss=1.25,
        tokens=tokens,
        supervised_tokens=100,
        learning_rate=2e-4,
        grad_norm=1.0,
        seconds=seconds,
        memory_bytes=3 << 29,
    )


def progress_over(steps: int, stream: io.StringIO, clock: Callable[[], float] = lambda: 0.0) -> Progress:
    progress = Progress(stream, clock)
    progress.start(steps, 0)
    return progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_plain_line_says_rate_remaining_time_loss_rate_and_memory() -> None:
    stream = io.StringIO()
    progress = progress_over(101, stream)
    progress.step(shown(1))
    progress.close()
    assert stream.getvalue() == ("step 1/101  loss 1.2500  lr 2.00e-04  300 tokens/s  3 min 20 s left  1.50 GiB\n")


def test_plain_lines_are_few_but_never_more_than_ten_seconds_apart() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = progress_over(1000, stream, clock)
    for step in range(1, 101):  # fast: one line for the first step, then one per twentieth of the run
        progress.step(shown(step))
    fast = stream.getvalue().splitlines()
    assert [line.split()[1] for line in fast] == ["1/1000", "51/1000"]
    for step in range(101, 111):  # slow: 4 s a step
        clock.now += 4
        progress.step(shown(step))
    slow = stream.getvalue().splitlines()[len(fast) :]
    assert [line.split()[1] for line in slow] == ["101/1000", "104/1000", "107/1000", "110/1000"]


def test_the_last_step_is_always_shown() -> None:
    stream = io.StringIO()
    progress = progress_over(1000, stream)
    progress.step(shown(999))
    progress.step(shown(1000))
    assert stream.getvalue().splitlines()[-1].startswith("step 1000/1000 ")


def test_the_rate_is_an_average_over_recent_steps() -> None:
    stream = io.StringIO()
    progress = progress_over(2, stream)
    progress.step(shown(1, tokens=100, seconds=1.0))
    progress.step(shown(2, tokens=500, seconds=2.0))
    assert "200 tokens/s  0 s left" in stream.getvalue().splitlines()[-1]


def test_held_out_losses_are_compared_with_the_base() -> None:
    stream = io.StringIO()
    progress = progress_over(10, stream)
    progress.evaluation(0, 2.0)
    progress.evaluation(10, 1.5)
    assert stream.getvalue().splitlines() == [
        "step 0/10  held-out loss 2.0000 (the untouched base)",
        "step 10/10  held-out loss 1.5000 (base 2.0000)",
    ]
    resumed = io.StringIO()
    progress_over(10, resumed).evaluation(8, 1.5)
    assert resumed.getvalue() == "step 8/10  held-out loss 1.5000\n"


def test_a_terminal_gets_a_live_line_and_a_pipe_never_an_escape_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream, escapes in ((Terminal(), True), (io.StringIO(), False)):
        progress = progress_over(2, stream)
        progress.step(shown(1))
        progress.line("a line")
        progress.step(shown(2))
        progress.close()
        before_after([("loss", "2.0", "1.5")], [("q", "", "a", "b")], stream)
        assert ("\x1b" in stream.getvalue()) is escapes
        assert "step 2/2" in stream.getvalue()
        assert "a line" in stream.getvalue()


def test_untrusted_text_cannot_steer_the_terminal() -> None:
    assert clean(HOSTILE) == "\ufffd[2Jgone \ufffd31m\ufffd\ufffd\ufffdback\ufffd"
    assert clean("tab\tand\nline, Ünïcödé, 👩‍🚀") == "tab\tand\nline, Ünïcödé, 👩‍🚀"
    stream = io.StringIO()
    Progress(stream).line(HOSTILE)
    before_after([], [(HOSTILE, HOSTILE, "[red]markup[/red]", "z" * 700)], stream)
    text = stream.getvalue()
    assert not set("\x1b\x9b\r\x07\u202e") & set(text)
    assert "[red]markup[/red]" in text
    assert text.count("z") == 600


def test_json_stays_faithful_and_harmless() -> None:
    text = safe_json({"answer": HOSTILE + "é"})
    assert json.loads(text) == {"answer": HOSTILE + "é"}
    assert text.isprintable()
    assert "é" in text


def test_the_base_stands_beside_the_adapter() -> None:
    stream = io.StringIO()
    before_after(
        [("held-out loss", "2.0000", "1.5000"), ("exact match", "0.0 %", "96.0 %")],
        [("Where does Ada live?", "Oslo", "Once upon a time", "Oslo")],
        stream,
    )
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines() if line.strip()]
    assert lines[0] == "base adapter"
    assert "held-out loss 2.0000 1.5000" in lines
    assert "prompt base adapter expected" in lines
    assert "Where does Ada live? Once upon a time Oslo Oslo" in lines


def test_the_change_and_what_else_there_is_to_say() -> None:
    stream = io.StringIO()
    before_after(
        [("loss", "2.0", "1.5", "-0.5 [-0.6, -0.4]")], [("p", "", "a", "b")], stream, ["learnt most: " + HOSTILE]
    )
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines() if line.strip()]
    assert lines[0] == "base adapter change [95 % interval]"
    assert "loss 2.0 1.5 -0.5 [-0.6, -0.4]" in lines
    assert lines.index("prompt base adapter") > next(
        n for n, line in enumerate(lines) if line.startswith("learnt most")
    )
    assert not set("\x1b\x9b\r\x07\u202e") & set(stream.getvalue())


def test_the_place_of_a_run_is_cleaned_too(capsys: pytest.CaptureFixture[str]) -> None:
    """A job file of somebody else may name it."""
    folder = Path(f"runs/{HOSTILE}")
    train.show(Result(folder, Card()), as_json=False)
    replay._print(Replayed(folder, ()), machines=False)
    said = capsys.readouterr().out
    assert "The run is in runs/" in said and "The replay is in runs/" in said
    assert not set("\x1b\x9b\r\x07\u202e") & set(said)


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 05 min"), (59.6, "1 min 00 s")]
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def broken_pipe() -> TextIO:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", encoding="utf-8")


def test_a_run_goes_on_when_nobody_listens() -> None:
    with broken_pipe() as stream:
        progress = Progress(stream)
        progress.start(2, 0)
        for number in (1, 2):
            progress.step(shown(number))
        progress.close()
        print("what others write later", file=stream, flush=True)


def test_a_table_that_nobody_reads_is_left_to_the_command_line() -> None:
    stream = broken_pipe()
    with pytest.raises(BrokenPipeError):
        before_after([("loss", "2.0", "1.5")], [], stream)
    with pytest.raises(BrokenPipeError):  # its buffer is still full
        stream.close()
