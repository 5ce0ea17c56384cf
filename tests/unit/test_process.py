"""What the command line asks of libraries before they are loaded: defaults, which the environment overrides."""

import os
import subprocess
import sys

import pytest

from lamina import process

CODE = """
import sys
from lamina.process import prepare
if sys.argv[1] == "prepared":
    prepare()
import torch

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024

torch.set_num_threads(1)
torch.ones(7_000_000)  # 28 MB, freed again: from here on glibc keeps what is smaller, unless it was told otherwise
before = resident()
tensors = [torch.ones(2_000_000) for _ in range(40)]  # 8 MB each
kept = tensors[1::2]
del tensors
print(resident() - before - sum(tensor.nbytes for tensor in kept))
"""

HEAP = """
import torch
from lamina.native import give_back
from lamina.process import prepare

prepare()

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024

tensors = [torch.ones(250_000) for _ in range(80)]  # 1 MB each: in the heap, below the size from which on memory goes back by itself
kept = tensors[1::2]
del tensors
before = resident()
give_back()
print(before - resident(), all(tensor.eq(1).all() for tensor in kept))
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
@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from Linux's /proc")
def test_memory_that_is_freed_goes_back() -> None:
    left = {
        name: int(
            subprocess.run(
                [sys.executable, "-c", CODE, name], env=clean(), capture_output=True, text=True, check=True
            ).stdout
        )
        for name in ("prepared", "as it comes")
    }
    assert left["prepared"] < 20e6, "next to nothing"
    assert left["as it comes"] > 100e6, "the reason for it: 160 MB of holes; if this fails, glibc has changed"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from Linux's /proc")
def test_holes_in_the_heap_go_back_when_asked() -> None:
    done = subprocess.run([sys.executable, "-c", HEAP], env=clean(), capture_output=True, text=True, check=True)
    freed, whole = done.stdout.split()
    assert int(freed) > 36e6, "40 holes of 1 MB, less the pages at their borders"
    assert whole == "True"
