"""The knee is where its definition says, on curves of all forms, and the sentence about it is true."""

import math

import pytest

from lamina.understand.dose import SCALES, Dose, knee


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0), 1.0),  # a straight line: nine tenths lie between 0.75 and 1
        ((4.0, 0.4, 0.2, 0.1, 0.0, 0.0, 0.0), 0.25),  # exactly nine tenths of the gain
        ((4.0, 0.41, 0.2, 0.1, 0.0, 0.0, 0.0), 0.5),
        ((4.0, 3.0, 1.0, 2.0, 5.0, 9.0, 9.0), 0.5),  # overdone: the largest gain counts, not the trained scale's
        ((4.0, 3.9, 3.8, 3.7, 3.6, 3.5, 3.4), 1.5),  # it would gain more yet
        ((4.0, None, 1.0, None, 0.0, None, None), 1.0),
        ((4.0, 4.1, 4.2, 4.3, 4.4, 4.5, 4.6), None),
        ((4.0, 3.995, 3.995, 3.995, 3.995, 3.995, 3.995), None),  # half a hundredth of a nat is no gain
        ((None, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), None),
    ],
)
def test_the_knee_is_the_smallest_scale_with_nine_tenths_of_the_gain(
    losses: tuple[float | None, ...], expected: float | None
) -> None:
    assert knee(SCALES, losses) == expected


def test_the_sentence() -> None:
    losses = (4.0, 2.0, 0.6, 0.1, 0.0, 0.2, 9.0)
    found = Dose(SCALES, losses, None, knee(SCALES, losses), 12)
    assert found.line() == (
        "dose: at 0.75 of its strength the adapter has 98% of the gain that any strength has (loss 0.1000 on 12 rows; at 1: 0.0000)"
    )
    text = Dose(SCALES, losses, (1.0, 1.1, 1.2, 1.3, 1.5, 2.0, None), 0.75, 12)
    assert text.line().endswith("; loss of neutral text there 1.3000, at 0 1.0000, at 1 1.5000")
    flat = Dose(SCALES, (4.0,) * 7, None, None, 12)
    assert flat.line() == "dose: at no scale of the adapter is the held-out loss 0.01 nats below the base's"
    assert not any(isinstance(value, float) and math.isnan(value) for value in flat.as_json().values())
