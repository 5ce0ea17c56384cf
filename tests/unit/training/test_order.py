"""Which examples make up which step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.training.order import by_length, grouped, rows_of_step, shuffled, steps_of

sizes = st.integers(1, 60)


def run(examples: int, batch: int, epochs: float, seed: int) -> list[list[int]]:
    last = round(examples * epochs)
    return [rows_of_step(step, examples, batch, seed, last) for step in range(steps_of(examples, batch, epochs))]


@given(examples=sizes, batch=sizes, epochs=st.integers(1, 4), seed=st.integers(0, 2**63))
def test_every_epoch_is_a_permutation(examples: int, batch: int, epochs: int, seed: int) -> None:
    steps = run(examples, batch, epochs, seed)
    rows = [row for step in steps for row in step]
    assert all(len(step) == batch for step in steps[:-1]) and 1 <= len(steps[-1]) <= batch
    for epoch in range(epochs):
        assert sorted(rows[epoch * examples : (epoch + 1) * examples]) == list(range(examples))
    assert len(rows) == epochs * examples


@given(examples=sizes, batch=sizes, seed=st.integers(0, 9), step=st.integers(0, 50))
def test_a_step_is_a_function_of_seed_and_step(examples: int, batch: int, seed: int, step: int) -> None:
    expected = rows_of_step(step, examples, batch, seed)
    for other in (0, 49, 3):
        rows_of_step(other, examples + other, batch, seed + other)  # whatever was asked before
    assert rows_of_step(step, examples, batch, seed) == expected
    assert len(expected) == batch


def test_seeds_and_epochs_differ() -> None:
    orders = {tuple(rows_of_step(step, 20, 20, seed)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "steps"),
    [(8, 8, 1, 1), (9, 8, 1, 2), (7, 8, 1, 1), (10, 4, 0.5, 2), (10, 4, 1.25, 3), (3, 8, 2, 1), (2, 1, 0.1, 1)],
)
def test_steps_of_epochs(examples: int, batch: int, epochs: float, steps: int) -> None:
    assert steps_of(examples, batch, epochs) == steps


def test_part_of_an_epoch_ends_short() -> None:
    assert [len(rows) for rows in run(10, 4, 0.5, 0)] == [4, 1]
    assert [len(rows) for rows in run(10, 4, 1.5, 0)] == [4, 4, 4, 3]


@given(examples=sizes, batch=sizes, seed=st.integers(0, 9))
def test_by_length_every_epoch_is_a_permutation(examples: int, batch: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 9, examples)
    order = by_length(lengths, batch)
    for epoch in range(2):
        assert sorted(order(seed, epoch, examples).tolist()) == list(range(examples))
    again = by_length(lengths, batch)(seed, 1, examples)  # whatever was asked before
    assert order(seed, 1, examples).tolist() == again.tolist()


def test_by_length_the_rows_of_a_step_are_alike() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 400)

    def spread(order) -> float:
        steps = [rows_of_step(step, 400, 4, 0, None, order) for step in range(1, 100)]
        return float(np.mean([np.ptp(lengths[rows]) for rows in steps]))

    assert spread(by_length(lengths, 4)) < 0.1 * spread(shuffled)
    assert lengths[by_length(lengths, 4)(0, 0, 400)[0]] == lengths.max()


@pytest.mark.parametrize(("examples", "batch"), [(1, 4), (7, 4), (16, 4), (103, 4), (1000, 4), (1000, 1)])
def test_by_length_is_the_order_of_transformers(examples: int, batch: int) -> None:
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = np.random.default_rng(1).permutation(examples) + 1  # none equal: torch's argmax leaves ties open
    mixed = torch.randperm(examples, generator=torch.Generator().manual_seed(3)).numpy()
    theirs = get_length_grouped_indices(lengths.tolist(), batch, generator=torch.Generator().manual_seed(3))
    assert grouped(mixed, lengths, batch).tolist() == theirs
