"""The kernels in Triton, compiled, on rows as wide as models have them."""

import device_kernels as kernels
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(("count", "width"), [(1, 64), (3, 100), (300, 4096), (5, 8192), (1000, 128)])
def test_norm(count: int, width: int) -> None:
    kernels.check_norm("cuda", count, width)


@pytest.mark.parametrize(("count", "width"), [(1, 1), (7, 300), (500, 11008)])
def test_gate(count: int, width: int) -> None:
    kernels.check_gate("cuda", count, width)


@pytest.mark.parametrize(("count", "heads", "width"), [(1, 1, 2), (5, 3, 32), (900, 32, 128)])
def test_rotation(count: int, heads: int, width: int) -> None:
    kernels.check_rotation("cuda", count, heads, width)


@pytest.mark.parametrize(("count", "vocabulary"), [(1, 7), (3, 5000), (200, 32_000), (20, 128_256)])
def test_cross_entropy(count: int, vocabulary: int) -> None:
    kernels.check_cross_entropy("cuda", count, vocabulary)


@pytest.mark.parametrize(("count", "width"), [(1, 16), (6, 100), (500, 11008), (5, 28672)])
def test_rows_in_fp8(count: int, width: int) -> None:
    kernels.check_rows_in_fp8("cuda", count, width)


@pytest.mark.parametrize(("count", "width"), [(1, 1), (100, 130), (4096, 11008)])
def test_transpose(count: int, width: int) -> None:
    kernels.check_transpose("cuda", count, width)
