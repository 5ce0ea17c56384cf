"""The kernels for CUDA, run by Triton's interpreter on a CPU."""

import device_kernels as kernels
import pytest
import torch

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: tests/gpu"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NaN and infinity, which are meant
]


@pytest.mark.parametrize(("count", "width"), [(1, 64), (3, 100), (2, 768)])
def test_norm(count: int, width: int) -> None:
    kernels.check_norm("cpu", count, width)


@pytest.mark.parametrize(("count", "width"), [(1, 1), (7, 300), (2, 1024)])
def test_gate(count: int, width: int) -> None:
    kernels.check_gate("cpu", count, width)


@pytest.mark.parametrize(("count", "heads", "width"), [(1, 1, 2), (5, 3, 32), (9, 4, 128)])
def test_rotation(count: int, heads: int, width: int) -> None:
    kernels.check_rotation("cpu", count, heads, width)


@pytest.mark.parametrize(("count", "vocabulary"), [(1, 7), (3, 5000), (5, 4096)])
def test_cross_entropy(count: int, vocabulary: int) -> None:
    kernels.check_cross_entropy("cpu", count, vocabulary)


@pytest.mark.parametrize(("count", "width"), [(1, 16), (6, 100), (5, 1024)])
def test_rows_in_fp8(count: int, width: int) -> None:
    kernels.check_rows_in_fp8("cpu", count, width)


@pytest.mark.parametrize(("count", "width"), [(1, 1), (64, 64), (100, 130)])
def test_transpose(count: int, width: int) -> None:
    kernels.check_transpose("cpu", count, width)
