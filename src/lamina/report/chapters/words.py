"""How the page writes numbers, intervals and names; no line ends between a number and its unit."""

import math

from lamina.report.forms import Change, Interval

GIB = 2**30


def loss(value: float | None) -> str:
    """A loss in nats."""
    return _number(value, ".3f" if value is not None and abs(value) < 100 else ".4g")


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{_number(100 * value, f',.{digits}f')}\u00a0%"


def fine_percent(value: float) -> str:
    """A share of whatever size: two digits of a small one."""
    return f"{100 * value:.2g}\u00a0%" if abs(value) < 0.1 else percent(value)


def plain(value: float | None) -> str:
    """A number with four digits."""
    return _number(value, ",.4g")


def size(bytes_: int) -> str:
    """Bytes as people say them."""
    return f"{bytes_ / GIB:,.2f}\u00a0GiB" if bytes_ >= GIB else f"{bytes_ / 2**20:,.1f}\u00a0MiB"


def span(interval: Interval, form: str) -> str:
    """An interval behind a number; nothing where there is none."""
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"


def interval_of(change: Change | None) -> Interval:
    """The interval of a change, if it has one."""
    if change is None or change[1] is None or change[2] is None:
        return None
    return change[1], change[2]


def certain(change: Change | None) -> bool:
    """Whether chance is ruled out: the interval has both ends on one side of zero."""
    interval = interval_of(change)
    return interval is not None and (interval[0] > 0) == (interval[1] > 0) and 0 not in interval


def layer_name(layer: str) -> str:
    """The number of a layer; the path, where it is not in the usual place."""
    stack, _, number = layer.rpartition(".")
    return number if stack in ("model.layers", "") and number else layer or "outside"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "–"
    return format(value, form).replace("-", "−") if math.isfinite(value) else ("∞" if value > 0 else str(value))
