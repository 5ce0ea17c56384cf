"""Where the time of a run goes: every second counts to one part, the innermost that was open."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Adds up the seconds of named parts: ``with watch("saving"): …``.

    A part inside another stops the outer one for its time, so the parts add up to the time that passed and no second
    counts twice: what is evaluated in the middle of training is not training.

    Attributes:
        seconds: of each part so far, in the order in which they were first opened. What is open counts up to the last
            time that a part was opened or closed.
        stopped: the part in which an error came up, if one did.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self.stopped: str | None = None
        self._clock, self._open, self._since = clock, list[str](), 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._charge()
        self._open.append(part)
        self.seconds.setdefault(part, 0.0)
        ended = False
        try:
            yield
            ended = True
        finally:
            if not ended:
                self.stopped = self.stopped or part
            self._charge()
            self._open.pop()

    def add(self, earlier: Mapping[str, float]) -> None:
        """Adds the parts of an earlier process, whose run this one goes on with."""
        for part, seconds in earlier.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def _charge(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
