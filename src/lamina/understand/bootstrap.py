"""How far a measure can be trusted: 95 % intervals by the bootstrap over rows (Efron 1979; percentile intervals).

The rows are what was drawn by chance, and the tokens of a row belong together: so rows are drawn again, with replacement,
and every measure is computed anew from the sums over the drawn rows. A measure here is always a function of such sums (a
mean is Σ loss/Σ tokens), which makes 1,000 repetitions one matrix product. Base and adapter are measured on the same rows
and are drawn together: what makes a row hard for both cancels in their difference, whose interval is therefore narrower
than the two intervals make it look.

Pieces of a row that was cut belong together as its tokens do: they are added up before (``by_row``).

Above ``GROUPS`` rows, sums over groups of rows are drawn in their place: groups of independent rows are independent too, and
the cost is bounded. Where all rows agree (every answer stopped), drawing them again shows no spread though there may
be some: the open end is then the exact one of the binomial distribution, about 3/R (Hanley and Lippman-Hand 1983, "the
rule of three").

Rejected: normal intervals, which leave the range of a share and are symmetric where a perplexity is not; BCa and the
bootstrap-t, whose corrections are of the size of the error that 1,000 repetitions leave.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
GROUPS = 1000
LEVEL = 0.95

Array = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """One measure of base and adapter on the same rows; intervals are None where there is but one row."""

    base: float
    adapter: float
    base_interval: Interval | None
    adapter_interval: Interval | None
    difference_interval: Interval | None
    """Of adapter minus base, paired."""

    @property
    def difference(self) -> float:
        """Adapter minus base."""
        return self.adapter - self.base


def three_digits(value: float) -> str:
    """The form in which a value has three digits, for it and for both ends of its interval: one number of decimals for all."""
    if not math.isfinite(value):
        return ".3g"
    if 0 < abs(value) < 1e-4:
        return ".2e"
    return f".{max(0, 2 - int(f'{value:.2e}'.partition('e')[2]))}f"  # the power of ten after rounding: 0.09996 is 0.100


def draws(rows: int, seed: int = 0) -> Array:
    """How often each row is drawn in each repetition, [RESAMPLES, rows]: multinomial counts."""
    picked = np.random.default_rng(seed).integers(0, rows, (RESAMPLES, rows))
    picked += rows * np.arange(RESAMPLES)[:, None]
    return np.bincount(picked.ravel(), minlength=RESAMPLES * rows).reshape(RESAMPLES, rows).astype(np.float64)


def interval(columns: Array, statistic: Callable[[Array], Array], seed: int = 0) -> Interval | None:
    """The interval of one measure.

    Args:
        columns: what is summed of each row, [R, K].
        statistic: sums [..., K] → the measure [..., 1].
    """
    if len(columns) < 2:
        return None
    columns = grouped(columns)
    return _percentiles(statistic(draws(len(columns), seed) @ columns)[:, 0])


def paired(
    base: Array, adapter: Array, statistic: Callable[[Array], Array], seed: int = 0, shares: int = 0
) -> list[Paired]:
    """Measures base and adapter on the same R rows.

    Args:
        base, adapter: what is summed of each row, [R, K].
        statistic: sums [..., K] → measures [..., M].
        shares: of the measures, so many from the first are shares of rows, of which each row has or has not the property.

    Returns:
        The M measures.
    """
    values = [statistic(side.sum(0)) for side in (base, adapter)]
    count = len(base)
    if count < 2:
        return [Paired(float(b), float(a), None, None, None) for b, a in zip(*values, strict=True)]
    base, adapter = grouped(base), grouped(adapter)
    weights = draws(len(base), seed)
    drawn = [statistic(weights @ side) for side in (base, adapter)]
    found = []
    for m, (b, a) in enumerate(zip(*values, strict=True)):
        apart = drawn[1][:, m] - drawn[0][:, m]
        spans = [_percentiles(values) for values in (drawn[0][:, m], drawn[1][:, m], apart)]
        if m < shares:
            spans = [_opened(spans[0], 0.0, count), _opened(spans[1], 0.0, count), _opened(spans[2], -1.0, count)]
        found.append(Paired(float(b), float(a), *spans))
    return found


def grouped(columns: Array, most: int = GROUPS) -> Array:
    """The sums of at most so many groups of rows, [min(R, most), K]: each row's group is its place modulo their number."""
    if len(columns) <= most:
        return columns
    sums = np.zeros((most, columns.shape[1]))
    np.add.at(sums, np.arange(len(columns)) % most, columns)
    return sums


def by_row(rows: Sequence[int] | NDArray[np.int64], columns: Array) -> tuple[NDArray[np.int64], Array]:
    """The numbers of the rows, in rising order, and the sums of each: the pieces of a row that was cut are added up.

    Args:
        rows: the number of the row that each piece is of, [P].
        columns: what is summed of each piece, [P, K].
    """
    numbers, place = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
    sums = np.zeros((len(numbers), columns.shape[1]))
    np.add.at(sums, place, columns)
    return numbers, sums


def _percentiles(values: Array) -> Interval:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def _opened(span: Interval, lowest: float, rows: int) -> Interval:
    """The interval of a mean of values between ``lowest`` and 1, where all rows agree: so many may yet be otherwise."""
    low, high = span
    if low < high:
        return span
    others = 1 - (1 - LEVEL) ** (1 / rows)  # so rare that in 5 % of the samples of this size there is none of them
    return low - others * (low - lowest), high + others * (1 - high)
