"""How the kernels come to be: made once for a processor and kept, and done without where they cannot be made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamina import native

COUNT = (
    "from lamina import native; import torch; print(native.library() is not None, native.about('cpu', torch.bfloat16))"
)
STEP = """
import torch
from lamina.ops.norm import rms_norm
x = torch.linspace(-3, 3, 64).reshape(2, 32).bfloat16().requires_grad_()
out = rms_norm(x, torch.ones(32).bfloat16(), 1e-5)
out.sum().backward()
print(out.float().square().mean().item())
"""

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernels")


def ran(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@needs_kernels
def test_made_once_and_kept(tmp_path: Path) -> None:
    assert ran(COUNT, XDG_CACHE_HOME=str(tmp_path)) == "True  by compiled kernels"
    (kept,) = (tmp_path / "lamina").iterdir()
    before = kept.stat().st_mtime_ns
    assert ran(COUNT, XDG_CACHE_HOME=str(tmp_path)) == "True  by compiled kernels"
    assert [path.stat().st_mtime_ns for path in (tmp_path / "lamina").iterdir()] == [before]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"LAMINA_NATIVE": "0"}, "LAMINA_NATIVE=0"),
        ({"CC": "no-such-compiler"}, "No such file or directory"),
        ({"CC": "false"}, "false failed: it says nothing"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "Not a directory"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux only")
def test_without_kernels_torch_computes_and_the_reason_is_told(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)} | environment
    told = ran(COUNT, **environment)
    assert told.startswith("False  by torch's own kernels (") and reason in told
    assert float(ran(STEP, **environment)) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", torch.bfloat16), ("cpu", torch.float32), ("cpu", torch.float16)]
)
def test_other_devices_and_precisions_are_torchs(device: str, dtype: torch.dtype) -> None:
    assert not native.available(device, dtype)
    assert native.about(device, dtype) == ""


@needs_kernels
@pytest.mark.parametrize("flags", [["-mno-avx512f"], ["-mno-avx512bf16"], ["-O1", "-fsanitize=address,undefined"]])
def test_the_sources_compile_without_a_warning(flags: list[str], tmp_path: Path) -> None:
    """For processors without AVX-512, and for those who look for mistakes in memory."""
    sources = sorted(map(str, Path(native.__file__).parent.glob("*.c")))
    command = [
        "cc",
        *native.FLAGS,
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        *flags,
        *sources,
        "-o",
        str(tmp_path / "k.so"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
