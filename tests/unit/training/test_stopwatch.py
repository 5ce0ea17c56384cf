"""Every second counts to one part, and the parts add up."""

import pytest

from lamina.report.opening import time_line
from lamina.training.stopwatch import Stopwatch


def test_what_is_inside_is_not_counted_outside() -> None:
    now = 100.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    watch = Stopwatch(lambda: now)
    with watch("data"):
        passes(1)
    passes(50)  # nobody's
    with watch("training"):
        passes(2)
        with watch("evaluations"):
            passes(4)
            with watch("saving"):
                passes(8)
                assert watch.seconds == {"data": 1, "training": 2, "evaluations": 4, "saving": 0}
            passes(16)
        passes(32)
        with watch("evaluations"):
            passes(64)
    assert watch.seconds == {"data": 1, "training": 34, "evaluations": 84, "saving": 8}
    watch.add({"training": 1000, "load": 3})
    assert watch.seconds == {"data": 1, "training": 1034, "evaluations": 84, "saving": 8, "load": 3}


def test_an_error_stops_the_watch() -> None:
    now = 0.0
    watch = Stopwatch(lambda: now)

    def broken() -> None:
        nonlocal now
        with watch("training"):
            now += 5
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken()
    now += 7
    with watch("card"):
        now += 1
    assert watch.seconds == {"training": 5, "card": 1}


def test_the_line() -> None:
    seconds = {"data": 0.04, "training": 96.2, "base_evaluation": 3.25, "card": 9.5}
    assert time_line(seconds) == "time: 1 min 49 s, of it training 1 min 36 s, base evaluation 3.2 s, card 9.5 s"
    assert time_line({"data": 0.01}) == "time: 0.0 s"
