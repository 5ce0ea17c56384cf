"""The benchmark of quantised bases can be run: every mode on a tiny shape, without writing a row."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "qlora_cpu.csv"

TOKENIZER = ROOT.parent / "shared" / "data" / "llama2-tokenizer"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("mode", "measured"),
    [
        pytest.param(
            "seven-b",
            {"plain read, nf4", "load, nf4", "load, int8", "load, peak, fp8", "train, 0 layers", "train, 2 layers"},
            marks=pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of its processes from /proc"),
        ),
        pytest.param(
            "merge",
            {"run of 3 steps, nf4", "merge, original, nf4", "merge, dequantised, nf4", "merge, requantised, nf4"},
            marks=pytest.mark.skipif(not TOKENIZER.is_dir(), reason="llama2-tokenizer is not in ../shared/data"),
        ),
        ("share", {"step, dense", "step, nf4", "making numbers, nf4", "making numbers, fp4", "making numbers, int8"}),
        ("kernels", {"store 64×128, nf4", "dense 64×128, nf4", "store 64×128, fp4", "dense 64×128, fp4"}),
    ],
)
def test_every_mode_runs(mode: str, measured: set[str], tmp_path: Path) -> None:
    before = RESULTS.read_bytes() if RESULTS.exists() else b""
    command = [sys.executable, ROOT / "benchmarks" / "qlora.py", mode, "--tiny", "--all", "--build", tmp_path]
    source = {"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, env=os.environ | source, capture_output=True, encoding="utf-8", timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [name for name in measured if name not in done.stdout] == []
    assert "nothing is written" in done.stdout
    assert (RESULTS.read_bytes() if RESULTS.exists() else b"") == before
