"""What the command line asks of libraries before they are loaded: defaults, which the environment overrides."""

import os
import subprocess
import sys

import pytest

from lamina import process

CODE = """
import resource, sys
from lamina.process import prepare
if sys.argv[1] == "prepared":
    prepare()
import torch

torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)  # 40 MB, freed again
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def clean() -> dict[str, str]:
    """The environment without what is set here."""
    names = {*process._ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
    return {name: value for name, value in os.environ.items() if name not in names}


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in process._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    process.prepare()
    assert {name: os.environ[name] for name in process._ENVIRONMENT} == process._ENVIRONMENT | {"GOMP_SPINCOUNT": "7"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_is_freed_serves_the_next_tensor() -> None:
    faults = {
        name: int(
            subprocess.run(
                [sys.executable, "-c", CODE, name], env=clean(), capture_output=True, text=True, check=True
            ).stdout
        )
        for name in ("prepared", "as it comes")
    }
    pages = 40_000_000 // 4096
    assert faults["prepared"] < 1.5 * pages, "those of the first tensor"
    assert faults["as it comes"] > 9 * pages, "the reason for it; if this fails, glibc has changed"
