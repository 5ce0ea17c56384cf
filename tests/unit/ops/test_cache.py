"""Attention over the cache: the kernel as close to the truth as SDPA, over odd widths, groups, lengths and windows."""

import pytest
import torch
from torch import Tensor

from lamina import native
from lamina.ops.cache import Cache

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernels")
LENGTHS, STEPS = (5, 30, 1, 17, 64), 3


def attended(
    dtype: torch.dtype, heads: int, key_heads: int, width: int, window: int | None, keep: bool
) -> tuple[list[Tensor], Tensor]:
    """Some steps over the same numbers in bf16's precision: the outputs and what the cache holds."""
    torch.manual_seed(0)

    def drawn(tokens: int, count: int) -> Tensor:
        return torch.randn(tokens, count, width).bfloat16().to(dtype)

    sizes = {"layers": 1, "kv_heads": key_heads, "head_width": width}
    cache = Cache(LENGTHS, STEPS, **sizes, dtype=dtype, device=torch.device("cpu"))
    total, rows, outs = sum(LENGTHS), list(range(len(LENGTHS))), []
    cache.prefill(range(len(LENGTHS)))(0, drawn(total, heads), drawn(total, key_heads), drawn(total, key_heads), window)
    for step in range(STEPS):
        if keep and step == 1:
            rows = cache.keep([0, 2, 4])
        outs.append(cache(0, drawn(len(rows), heads), drawn(len(rows), key_heads), drawn(len(rows), key_heads), window))
        cache.advance()
    return outs, cache._store[:, :, : len(rows)]


@needs_kernels
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width"), [(4, 4, 64), (6, 2, 32), (4, 1, 16), (3, 3, 80), (2, 1, 256), (12, 4, 48)]
)
def test_no_farther_from_the_truth_than_sdpa(
    heads: int, key_heads: int, width: int, window: int | None, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, kept = attended(torch.bfloat16, heads, key_heads, width, window, keep)
    truth, true_store = attended(torch.float64, heads, key_heads, width, window, keep)
    monkeypatch.setattr(native, "takes", lambda *_: False)
    plain, _ = attended(torch.bfloat16, heads, key_heads, width, window, keep)
    assert torch.equal(kept.double(), true_store)
    for one, other, exact in zip(ours, plain, truth, strict=True):
        # Half a unit of the rounding at the end, and 2e-7 of the largest value for what is summed in fp32.
        assert ((one.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()
        assert (one.double() - exact).norm() <= 1.2 * (other.double() - exact).norm()


@needs_kernels
def test_the_number_of_threads_changes_nothing() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(torch.cat([out.flatten() for out in attended(torch.bfloat16, 12, 12, 64, None, False)[0]]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernels
def test_heads_of_other_widths_are_sdpas() -> None:
    outs, _ = attended(torch.bfloat16, 2, 2, 24, None, False)
    truth, _ = attended(torch.float64, 2, 2, 24, None, False)
    for one, exact in zip(outs, truth, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=0.02, atol=0.02)
