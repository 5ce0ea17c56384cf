"""The card's size follows from the job and the data, within a tenth of the training, and obeys what was set."""

from dataclasses import replace

import numpy as np
import pytest

from lamina.data.store import TokenStore
from lamina.evaluation import Evaluating
from lamina.neutral import NEUTRAL_TOKENS
from lamina.training.loop import Training
from lamina.understand.budget import (
    DOSE_TOKENS,
    NEW_SCALES,
    SAMPLES,
    STEP,
    TOKENS,
    WRITTEN,
    Sizes,
    lengths_of,
    sizes,
    some,
)


def store(rows: int, tokens: int) -> TokenStore:
    ends = np.arange(1, rows + 1, dtype=np.int64) * tokens
    return TokenStore(np.zeros(rows * tokens, dtype=np.int32), ends, np.arange(rows, dtype=np.int64))


def cost(found: Sizes, prompt: int) -> float:
    """In ways forward of a token, with every part as large as it may be."""
    writing = 2 * (found.samples * prompt + found.new_tokens * (STEP + WRITTEN * found.samples))
    return writing + 2 * found.compared + 2 * found.neutral + 2 * NEW_SCALES * found.dosed


@pytest.mark.parametrize(("rows", "tokens"), [(1000, 200), (5000, 100), (20_000, 400), (800, 2000)])
def test_the_card_costs_a_tenth_of_the_training_at_most(rows: int, tokens: int) -> None:
    found = sizes(Evaluating(), Training(), store(rows, tokens), store(50, tokens))
    training = 2 * rows * tokens
    assert cost(found, tokens) <= 0.1 * training
    assert SAMPLES[0] <= found.samples <= SAMPLES[1]


def test_a_longer_run_measures_more_up_to_a_most() -> None:
    train, held_out = store(1000, 200), store(50, 200)
    short, long, endless = (
        sizes(Evaluating(), Training(steps=steps), train, held_out) for steps in (1, 250, 10_000_000)
    )
    for name in ("samples", "compared", "neutral", "dosed"):
        assert getattr(short, name) < getattr(long, name) < getattr(endless, name), name
    assert (short.samples, short.compared, short.neutral, short.dosed) == (
        SAMPLES[0],
        TOKENS[0],
        TOKENS[0],
        DOSE_TOKENS[0],
    )
    assert (endless.samples, endless.compared, endless.neutral, endless.dosed) == (
        SAMPLES[1],
        TOKENS[1],
        NEUTRAL_TOKENS,
        DOSE_TOKENS[1],
    )
    assert sizes(Evaluating(), Training(epochs=4.0), train, held_out) == sizes(
        Evaluating(), Training(steps=500), train, held_out
    ), "4 × 1,000 rows are 500 steps of 8"


def test_runs_of_about_the_same_length_are_measured_on_the_same_rows() -> None:
    train, held_out = store(1000, 200), store(50, 200)
    one, other = (sizes(Evaluating(), Training(steps=steps), train, held_out) for steps in (300, 320))
    assert one == other
    assert one.compared.bit_count() == one.neutral.bit_count() == one.dosed.bit_count() == one.samples.bit_count() == 1


@pytest.mark.parametrize("samples", [0, 3, 500])
def test_a_number_of_answers_that_is_set_is_obeyed(samples: int) -> None:
    settings = Evaluating(eval_samples=samples)
    found = sizes(settings, Training(), store(100, 50), store(9, 50))
    assert found.samples == samples
    assert replace(found, samples=0) == replace(
        sizes(Evaluating(), Training(), store(100, 50), store(9, 50)), samples=0
    )


def test_the_rows_are_the_same_each_time_and_from_all_parts() -> None:
    lengths = lengths_of(store(1000, 10))
    places = some(lengths, 1000)
    assert len(places) == 100 and (np.diff(places) > 0).all()
    assert (some(lengths, 1000) == places).all()
    # A hundred places drawn of a thousand: the mean deviates by 288/10 = 29; four of them.
    assert abs(places.mean() - 500) < 116
    assert len(some(lengths, 3)) == 1, "one row there always is"
    assert (some(lengths, 10_000) == np.arange(1000)).all()
