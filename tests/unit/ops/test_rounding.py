"""What rounding leaves of an update, against rounding it."""

import pytest
import torch

from lamina.ops.rounding import NAMES, half_step, surviving


@pytest.mark.parametrize("dtype", NAMES)
def test_half_a_step_is_the_least_that_counts(dtype: torch.dtype) -> None:
    """Just under the next power of two a number's neighbours are nearest, relative to it: 2 - 2·half, and 2."""
    below = torch.nextafter(torch.tensor(2.0, dtype=dtype), torch.tensor(0.0, dtype=dtype)).double()
    assert float(2 - below) / 2 == 2 * half_step(dtype)


def test_the_half_steps() -> None:
    found = [half_step(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert found == [2**-9, 2**-12, 2**-25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relative", [1e-2, 2**-9, 1e-3, 2.5e-4, 1e-4])
def test_the_share_is_that_of_a_drawn_matrix(dtype: torch.dtype, relative: float) -> None:
    torch.manual_seed(0)
    # Weights of the size of Llama-2-7B's: nearly all of them are normal numbers of fp16, as all are in bf16.
    weight = (torch.randn(2**20) / 64).to(dtype).double()
    update = torch.randn(2**20).double() * relative / 64
    written = (weight + update).to(dtype).double()
    share = float(((written - weight) * update).sum() / update.square().sum())
    assert surviving(relative, dtype) == pytest.approx(share, abs=0.02)  # quantiles, and what is drawn, each within 1 %


def test_fp32_keeps_what_bf16_loses() -> None:
    assert surviving(1e-5, torch.bfloat16) < 0.01
    assert surviving(1e-5, torch.float32) == pytest.approx(1, abs=1e-3)
