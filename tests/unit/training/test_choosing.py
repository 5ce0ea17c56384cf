"""What the plan may choose, in the order of what it costs, and the first of it that fits."""

from itertools import product

import pytest

from lamina.training.choosing import BUSY, Choice, candidates, choose
from lamina.training.plan import Moment, Plan


def pairs(device: str, longest: int, layers: int, dropout: bool = False) -> list[tuple[int, int]]:
    return [(choice.tokens, choice.checkpointed) for choice in candidates(device, longest, layers, dropout)]


def of_size(size: int) -> Plan:
    return Plan((Moment("loss", weights=size, adapters=0, gradients=0, optimiser=0),))


def test_on_a_cpu_layers_are_computed_twice_before_micro_batches_shrink() -> None:
    assert pairs("cpu", 1500, 2) == [(4096, 0), (4096, 1), (4096, 2), (2048, 2), (1500, 2)]


def test_on_a_gpu_the_largest_micro_batches_come_first() -> None:
    expected = [(16_384, 0), (8192, 0), (4096, 0), (4096, 1), (4096, 2), (2048, 2), (1024, 2), (1000, 2)]
    assert pairs("cuda", 1000, 2) == expected
    assert pairs("cuda", 6000, 1) == [(16_384, 0), (8192, 0), (6000, 0), (6000, 1)], "no smaller than an example"


def test_with_dropout_the_cut_is_the_last_resort() -> None:
    """On a GPU too: the cut of a step decides which numbers are drawn."""
    assert pairs("cuda", 1500, 2, dropout=True) == pairs("cpu", 1500, 2, dropout=True) == pairs("cpu", 1500, 2)


def test_an_example_longer_than_the_largest_micro_batch_is_one_of_its_own() -> None:
    for device in ("cpu", "cuda"):
        assert pairs(device, 20_000, 1) == [(20_000, 0), (20_000, 1)]
    assert pairs("cpu", BUSY, 1) == [(BUSY, 0), (BUSY, 1)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_choices_never_cost_less_than_those_before_them(device: str) -> None:
    for longest, layers, dropout in product((1, 37, 4095, 4097, 16_384, 50_000), (1, 3), (False, True)):
        found = pairs(device, longest, layers, dropout)
        assert all(tokens >= longest for tokens, _ in found)
        assert [tokens for tokens, _ in found] == sorted((tokens for tokens, _ in found), reverse=True)
        assert [twice for _, twice in found] == sorted(twice for _, twice in found)
        assert found[0][1] == 0 and found[-1] == (longest, layers)


def test_the_first_that_fits_is_chosen_and_nothing_after_it_is_planned() -> None:
    sizes = {Choice(4, 0): 100, Choice(4, 1): 80, Choice(4, 2): 60, Choice(2, 2): 70}
    asked: list[Choice] = []

    def planned(choice: Choice) -> Plan:
        asked.append(choice)
        return of_size(sizes[choice])

    assert choose(iter(sizes), planned, 80) == (Choice(4, 1), of_size(80), True)
    assert asked == [Choice(4, 0), Choice(4, 1)]


def test_where_nothing_fits_the_one_that_needs_least_is_told() -> None:
    sizes = {Choice(4, 0): 100, Choice(4, 1): 60, Choice(4, 2): 60, Choice(2, 2): 70}
    assert choose(iter(sizes), lambda choice: of_size(sizes[choice]), 59) == (Choice(4, 1), of_size(60), False)
