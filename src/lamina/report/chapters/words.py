"""How the page writes numbers, intervals and names; no line ends between a number and its unit."""

import math

from lamina.report.console import duration
from lamina.report.forms import Change, Interval

GIB = 2**30
_SLIGHT = 1e-3  # of a loss: below it a change shows in no answer, however sure it is
_LEAST_NATS = 1e-4
_LEAST_SHARE = 1e-5


def loss(value: float | None) -> str:
    """A loss in nats."""
    return _number(value, ".3f" if value is not None and abs(value) < 100 else ".4g")


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{_number(100 * value, f',.{digits}f')}\u00a0%"


def fine_percent(value: float) -> str:
    """A share of whatever size: two digits of a small one."""
    if 0 < abs(value) < _LEAST_SHARE:
        return f"less than {100 * _LEAST_SHARE:g}\u00a0%"
    return f"{100 * value:.2g}\u00a0%" if abs(value) < 0.1 else percent(value)


def slight(change: float, of: float) -> bool:
    """Whether a change of a loss is too small to matter, be it chance or not."""
    return abs(change) < _SLIGHT * abs(of)


def nats(value: float) -> str:
    """A distance in nats; below a ten-thousandth it is rounding."""
    return f"less than {_LEAST_NATS:g}" if abs(value) < _LEAST_NATS else f"{value:.3g}"


def lasting(seconds: float) -> str:
    """How long something took; below ten seconds to the tenth."""
    return f"{seconds:.1f}\u00a0s" if seconds < 9.95 else duration(seconds)


def rows_of(count: int) -> str:
    """So many rows."""
    return f"{count:,} row{'' if count == 1 else 's'}"


def plain(value: float | None) -> str:
    """A number with four digits."""
    return _number(value, ",.4g")


def size(bytes_: int) -> str:
    """Bytes as people say them."""
    return f"{bytes_ / GIB:,.2f}\u00a0GiB" if bytes_ >= GIB else f"{bytes_ / 2**20:,.1f}\u00a0MiB"


def span(interval: Interval, form: str) -> str:
    """An interval behind a number; nothing where there is none."""
    return "" if interval is None else f" [{figure(interval[0], form)}, {figure(interval[1], form)}]"


def figure(value: float, form: str) -> str:
    """A number in a form, without the sign of a zero that was negative before it was rounded."""
    sign = form[:1] if form[:1] == "+" else ""
    return format(value, f"{sign}z{form[len(sign) :]}")


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
    return figure(value, form).replace("-", "−") if math.isfinite(value) else ("∞" if value > 0 else str(value))
