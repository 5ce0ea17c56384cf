"""Intervals hold what they promise: on data whose truth is known, and where a resample shows no spread."""

import numpy as np
import pytest

from lamina.understand import bootstrap
from lamina.understand.bootstrap import GROUPS, RESAMPLES, by_row, draws, grouped, interval, paired, three_digits


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., :1] / sums[..., 1:]


def rows_of(random: np.random.Generator, count: int) -> np.ndarray:
    """Rows of 1 to 9 tokens with a loss of their own, which is skewed: Σ loss and Σ tokens. The true mean is 1 a token."""
    tokens = random.integers(1, 10, count)
    return np.stack([random.gamma(2.0, 0.5, count) * tokens, tokens], axis=1).astype(float)


def test_each_repetition_draws_as_many_rows_as_there_are() -> None:
    counts = draws(7)
    assert counts.shape == (RESAMPLES, 7)
    assert (counts.sum(1) == 7).all()
    # Each row is drawn 1,000 times in the mean, with a deviation of √(7000·1/7·6/7) = 29: five of them.
    assert abs(counts.sum(0) - RESAMPLES).max() < 150
    assert (draws(7) == counts).all() and (draws(7, seed=1) != counts).any()


def test_the_truth_lies_in_nineteen_of_twenty_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    random, hits = np.random.default_rng(0), 0
    for seed in range(400):
        low, high = interval(rows_of(random, 60), ratio, seed) or (0, 0)
        hits += low <= 1.0 <= high
    # Percentile intervals of 60 skewed rows fall short by 1 to 3 points; the deviation of 400 trials at 0.93 is 1.3 points.
    assert 0.88 <= hits / 400 <= 0.99


def test_a_paired_difference_is_narrower_than_its_two_sides_and_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    random, hits = np.random.default_rng(1), 0
    for seed in range(200):
        base = rows_of(random, 60)
        adapter = base.copy()
        adapter[:, 0] -= base[:, 1] * random.normal(0.2, 0.1, 60)
        [found] = paired(base, adapter, ratio, seed)
        low, high = found.difference_interval or (0, 0)
        hits += low <= -0.2 <= high
        assert found.base_interval is not None
        assert high - low < (found.base_interval[1] - found.base_interval[0]) / 2
    # As above: 200 trials at 0.93 deviate by 1.8 points.
    assert 0.87 <= hits / 200 <= 1


def test_the_measure_itself_is_that_of_all_rows() -> None:
    base = rows_of(np.random.default_rng(2), 3 * GROUPS + 17)
    [found] = paired(base, base * [2, 1], ratio)
    # Two orders of summing 3,017 terms, each rounded by 2^-53.
    assert found.base == pytest.approx(base[:, 0].sum() / base[:, 1].sum(), rel=1e-12)
    assert found.difference == found.adapter - found.base


def test_groups_of_rows_are_as_uncertain_as_the_rows() -> None:
    rows = rows_of(np.random.default_rng(3), 20 * GROUPS)
    sums = grouped(rows)
    assert len(sums) == GROUPS
    # Sums in another order: 20,000 terms, each rounded by 2^-53 of the sum.
    assert sums.sum(0) == pytest.approx(rows.sum(0), rel=1e-11)
    low, high = interval(rows, ratio) or (0, 0)
    # The deviation of a row's loss a token, weighted by its tokens, over √R; twice 1.96 of it is the width. The bootstrap's own
    # error with 1,000 repetitions is about 5 %.
    residual = rows[:, 0] - rows[:, 1] * rows[:, 0].sum() / rows[:, 1].sum()
    expected = 2 * 1.96 * np.sqrt((residual**2).sum()) / rows[:, 1].sum()
    assert high - low == pytest.approx(expected, rel=0.15)


def test_the_pieces_of_a_row_are_one_row() -> None:
    numbers, sums = by_row([7, 7, 3, 9, 7], np.array([[1.0, 2.0], [10.0, 1.0], [5.0, 1.0], [0.5, 4.0], [100.0, 1.0]]))
    assert numbers.tolist() == [3, 7, 9]
    assert sums.tolist() == [[5.0, 1.0], [111.0, 4.0], [0.5, 4.0]]
    numbers, sums = by_row([], np.zeros((0, 2)))
    assert (numbers.tolist(), sums.tolist()) == ([], [])


def test_pieces_make_a_measure_no_more_certain_than_their_rows() -> None:
    rows = rows_of(np.random.default_rng(4), 60)
    pieces = np.repeat(rows / 2, 2, axis=0)
    _, joined = by_row(np.repeat(np.arange(60), 2), pieces)
    assert interval(joined, ratio) == interval(rows, ratio), "two halves are the whole, to the last bit"
    (low, high), (lowest, highest) = interval(pieces, ratio) or (0, 0), interval(rows, ratio) or (0, 0)
    assert high - low < 0.85 * (highest - lowest), "as rows of their own they would seem more certain, by √2"


def test_where_all_rows_agree_the_open_end_is_the_binomials() -> None:
    def mean(sums: np.ndarray) -> np.ndarray:
        return sums[..., :-1] / sums[..., -1:]

    none, all_of_them = np.array([[0.0, 1.0]] * 60), np.array([[1.0, 1.0]] * 60)
    [found] = paired(none, all_of_them, mean, shares=1)
    others = 1 - 0.05 ** (1 / 60)  # the rule of three: 3/60, nearly
    assert others == pytest.approx(3 / 60, rel=0.05)
    assert found.base_interval == pytest.approx((0, others))
    assert found.adapter_interval == pytest.approx((1 - others, 1))
    assert found.difference_interval == pytest.approx((1 - 2 * others, 1))
    [same] = paired(none, none, mean, shares=1)
    assert same.difference_interval == pytest.approx((-others, others))
    [length] = paired(none + 7, none + 7, mean)
    assert length.base_interval == (7 / 8, 7 / 8), "a mean that is no share has no bounds"


def test_one_row_has_no_interval() -> None:
    row = np.array([[3.0, 2.0]])
    assert interval(row, ratio) is None
    [found] = paired(row, row, ratio)
    assert (found.base, found.base_interval, found.difference_interval) == (1.5, None, None)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0651, "0.0651 [0.0601, 0.0700]"),
        (0.09996, "0.100 [0.060, 0.070]"),
        (2.0, "2.00 [0.06, 0.07]"),
        (0.0, "0.00 [0.06, 0.07]"),
        (-31.44, "-31.4 [0.1, 0.1]"),
        (946.4, "946 [0, 0]"),
        (8.8e-7, "8.80e-07 [6.01e-02, 7.00e-02]"),
        (float("inf"), "inf [0.0601, 0.07]"),
    ],
)
def test_both_ends_of_an_interval_have_the_decimals_of_the_value(value: float, said: str) -> None:
    form = three_digits(value)
    assert f"{value:{form}} [{0.0601:{form}}, {0.07:{form}}]" == said
