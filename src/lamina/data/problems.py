"""The problems of single rows, gathered so that one error names them all."""

from collections.abc import Mapping, Sequence

from lamina.errors import DataError

SHOWN = 10
"""Problems written out; the others are counted."""
ENOUGH = 1000
"""After so many problems reading stops: a data set of the wrong kind is not read to its end to say so."""


class Problems:
    """Collects what is wrong with rows while the rest is read on.

    Args:
        kept: the problems are left to the caller, who goes on with the other rows; ``check`` raises only after too many.

    Attributes:
        ended: whether they have ended the reading.
    """

    def __init__(self, kept: bool = False) -> None:
        self.kept, self.ended = kept, False
        self._places: dict[str, list[str]] = {}
        self._hints: dict[str, None] = {}
        self._count = 0

    def add(self, place: str, problem: str, hint: str = "") -> None:
        """Notes one problem at ``place`` (``file:line``).

        Args:
            hint: advice that several problems share; it stands once, at the end of the message.

        Raises:
            DataError: when so many problems were found that reading on has no use.
        """
        self._places.setdefault(problem, []).append(place)
        if hint:
            self._hints[hint] = None
        self._count += 1
        if self._count >= ENOUGH:
            self.check(stopped=True)

    @property
    def places(self) -> Mapping[str, Sequence[str]]:
        """Where each problem was found, in the order in which they were."""
        return self._places

    @property
    def count(self) -> int:
        """How many were found."""
        return self._count

    @property
    def hints(self) -> str:
        """The advice that several problems share."""
        return "; ".join(self._hints)

    def check(self, stopped: bool = False) -> None:
        """Ends the reading when anything was found.

        Args:
            stopped: kept problems end it too: they are too many, or nothing is left beside them.

        Raises:
            DataError: one line with the first problems, each with its places, the number of the others, and the advice.
        """
        if not self._places or (self.kept and not stopped):
            return
        self.ended = True
        shown = list(self._places.items())[:SHOWN]
        parts = [f"{places[0]}: {problem}{_again(places)}" for problem, places in shown]
        others = self._count - sum(len(places) for _, places in shown)
        if others:
            parts.append(f"and {others:,} more")
        parts += [*self._hints, *(["reading stopped here"] if stopped else [])]
        raise DataError("; ".join(parts)) from None


def _again(places: list[str]) -> str:
    """Where else a problem stands: the lines or rows, without their file."""
    if len(places) == 1:
        return ""
    more = [place.rpartition(":")[2].strip() for place in places[1:SHOWN]]
    rest = f" and {len(places) - SHOWN:,} more" if len(places) > SHOWN else ""
    return f" (also {', '.join(more)}{rest})"
