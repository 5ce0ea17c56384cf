"""The kernels for CUDA, run by Triton's interpreter on a CPU, and compiled."""

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_they_compile_for_ampere_ada_and_hopper() -> None:
    """What the interpreter takes, the compiler may not. Rows of a model's widths are read and written 16 bytes at a time."""
    script = Path(kernels.__file__).with_name("compiled_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, script, "80", "89", "90"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 7 + 9 + 9
    # Beside them: a row's target, its logit and its loss, or its scale.
    alone = {"_cross_entropy": 3, "_rows": 1}
    assert all(int(whole) >= 3 and int(rest) == alone.get(name, 0) for _, name, whole, rest in lines), done.stdout
