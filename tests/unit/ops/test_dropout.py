"""Dropout from a seed: what it zeroes, and that it is one linear map for one seed."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lamina import native
from lamina.ops.dropout import Dropout

Words = NDArray[np.uint32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_is_zeroed_and_the_rest_raised(share: float, dtype: torch.dtype) -> None:
    """Five standard deviations of a binomial distribution. What is kept is rounded once to bf16: 1/(1 - p) in bf16 would shift it all."""
    x = torch.randn(400, 500).to(dtype)
    out = Dropout(share, seed=1)(x)
    zeroed = (out == 0) & (x != 0)
    assert abs(zeroed.double().mean() - share) < 5 * (share * (1 - share) / x.numel()) ** 0.5
    rounding = torch.finfo(dtype).eps * (0.51 if dtype == torch.bfloat16 else 1)
    torch.testing.assert_close(out[~zeroed].double(), x[~zeroed].double() / (1 - share), rtol=rounding, atol=0)
    assert abs(zeroed.double().mean(0) - share).max() < 6 * (share * (1 - share) / 400) ** 0.5, "columns are alike"


def test_a_seed_is_one_linear_map() -> None:
    x, y = torch.randn(2, 30, 40, dtype=torch.float64)
    one, other = Dropout(0.3, seed=5), Dropout(0.3, seed=6)
    torch.testing.assert_close(one(x + 2 * y), one(x) + 2 * one(y))
    assert not torch.equal(one(x) == 0, other(x) == 0)
    strided = x.t().contiguous().t()
    assert torch.equal(one(strided), one(x))


def test_threads_change_no_number() -> None:
    before, x, found = torch.get_num_threads(), torch.randn(300, 500), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(Dropout(0.4, seed=2)(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 41])
def test_it_can_be_added_to_what_is_there(width: int, dtype: torch.dtype) -> None:
    """In fp32 by the kernel, and rounded once; by torch what is dropped is rounded before."""
    x, onto = torch.randn(2, 30, width).to(dtype)
    dropout, before, version = Dropout(0.3, seed=5), onto.clone(), onto._version
    kept = dropout(torch.ones_like(x)) != 0
    found = dropout(x, onto=onto)
    assert found.data_ptr() == onto.data_ptr() and onto._version > version
    part = torch.where(kept, x.double() / 0.7, 0)
    half = torch.finfo(dtype).eps / 2 * (1 + (dtype == torch.float32) / 2)
    assert ((found - (before + part)).abs() <= half * (found.abs() + part.abs())).all()


def test_what_it_is_added_to_may_be_wider() -> None:
    x, onto = torch.randn(30, 48).bfloat16(), torch.zeros(30, 48)
    dropout = Dropout(0.3, seed=5)
    assert torch.equal(dropout(x, onto=onto) == 0, (onto == 0)) and 0.6 < (onto != 0).double().mean() < 0.8


@pytest.mark.parametrize(("share", "expected"), [(1e-12, 1.0), (1 - 1e-12, 0.0)])
def test_shares_at_the_ends(share: float, expected: float) -> None:
    assert (Dropout(share, seed=1)(torch.ones(64, 512).bfloat16()) != 0).double().mean() == expected


def turned(x: Words, by: int) -> Words:
    return x << np.uint32(by) | x >> np.uint32(32 - by)


def mixed(x: Words) -> Words:
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return x ^ x >> np.uint32(16)


def words(count: int, seed: int) -> Words:
    """xoshiro128++ as its authors give it, for sixteen streams of every 4096 numbers."""
    found = []
    for block in range(-(-count // 4096)):
        place = np.arange(64, dtype=np.uint32).reshape(4, 16) + np.uint32(block * 64)
        s = mixed(mixed(mixed(place) ^ np.uint32(seed % 2**32)) ^ np.uint32(seed >> 32))
        for _ in range(4096 // 16):
            found.append(turned(s[0] + s[3], 7) + s[0])
            t = s[1] << np.uint32(9)
            s[2] ^= s[0]
            s[3] ^= s[1]
            s[1] ^= s[2]
            s[0] ^= s[3]
            s[2] ^= t
            s[3] = turned(s[3], 11)
    return np.concatenate(found)[:count]


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")
@pytest.mark.parametrize("shape", [(1, 16), (3, 112), (5, 4096), (7, 1200)])
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7, 2**63 - 1])
def test_the_kernel_draws_the_words_of_its_generator(shape: tuple[int, int], seed: int) -> None:
    x = torch.randn(shape).bfloat16()
    kept = torch.from_numpy(words(x.numel(), seed) >= np.uint32(round(0.3 * 2**32))).view(shape)
    expected = torch.where(kept, x.float() / 0.7, 0)
    torch.testing.assert_close(Dropout(0.3, seed)(x).float(), expected, rtol=2**-8, atol=0)


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")
def test_the_generator_is_even_and_its_streams_know_nothing_of_each_other() -> None:
    """Of 2²⁰ words, every bit and every byte; and the correlation of a word with others of its call and of near calls, five deviations."""
    count = 2**20
    drawn = words(count, 3)
    bits = np.unpackbits(drawn.view(np.uint8)).reshape(count, 32).mean(0)
    assert abs(bits - 0.5).max() < 5 * 0.5 / count**0.5
    for byte in drawn.view(np.uint8).reshape(count, 4).T:
        seen, expected = np.bincount(byte, minlength=256), count / 256
        assert ((seen - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5

    def level(x: Words) -> NDArray[np.float64]:
        return (x.astype(np.float64) / 2**32 - 0.5) * 12**0.5

    others = [np.roll(drawn, lag) for lag in (1, 15, 16, 17, 768, 2048, 4096)]
    others += [words(count, seed) for seed in (2, 4, 3 + 2**32, 3 + 16)]
    for other in others:
        assert abs((level(drawn) * level(other)).mean()) < 5 / count**0.5


def test_calls_are_drawn_by_the_global_generator() -> None:
    torch.manual_seed(3)
    first = [Dropout.drawn(0.1) for _ in range(3)]
    torch.manual_seed(3)
    assert [Dropout.drawn(0.1) for _ in range(3)] == first
    assert len({call.seed for call in first}) == 3
