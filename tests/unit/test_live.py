"""The instruments that count live bytes, on cases whose bytes are known."""

import torch
from live import Live, allocated_peak
from torch import Tensor

KB = 1024


def zeros(kilobytes: int) -> Tensor:
    return torch.zeros(kilobytes * KB, dtype=torch.uint8)


def test_the_peak_is_of_what_lives_at_one_time() -> None:
    def run() -> None:
        first = zeros(100)
        del first
        kept = zeros(30)
        zeros(20)
        kept.add_(1)
        zeros(60)

    with Live() as live:
        run()
    assert live.peak == allocated_peak(run) == 100 * KB
    assert live.bytes == 0
    assert {row[1:] for row in live.at_peak} == {((100 * KB,), torch.uint8, 100 * KB)}


def test_views_and_results_in_place_count_once() -> None:
    with Live() as live:
        whole = zeros(10)
        parts = [whole[:KB].view(2, -1), whole.add_(1), whole.detach()]
        assert live.bytes == 10 * KB
        del whole, parts[1:]
        assert live.bytes == 10 * KB  # the whole storage lives as long as a view of it
        parts.clear()
        assert live.bytes == live.bytes == 0


def test_what_was_there_before_counts_in_neither() -> None:
    before = zeros(50)

    def run() -> None:
        before.mul_(2)
        zeros(5)

    with Live() as live:
        run()
    assert live.peak == allocated_peak(run) == 5 * KB


def test_a_backward_pass() -> None:
    """x², y = x² · x: the square is kept; its gradient and that of x stand beside it, then a second part of the latter."""
    x = torch.ones(KB, requires_grad=True)

    def run() -> None:
        ((x * x).detach().requires_grad_() * x).sum().backward()
        x.grad = None

    with Live() as live:
        run()
    assert live.peak == allocated_peak(run)
    assert 3 * 4 * KB <= live.peak < 4 * 4 * KB


def test_only_the_allocator_sees_into_kernels() -> None:
    """log Σ exp(x) makes exp(x - max) of its own, which no operation returns."""
    x = torch.ones(8, KB)

    def run() -> None:
        x.logsumexp(1)

    with Live() as live:
        run()
    assert live.peak == 8 * 4
    assert allocated_peak(run) >= 8 * KB * 4
