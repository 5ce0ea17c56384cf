"""Kernels in Triton for a training step in bfloat16 on CUDA: what ``native`` is for a CPU.

torch composes a norm, a gate or a rotation of simpler operations, and each of them reads and writes a tensor of the whole batch in
the device's memory; here each is one pass. Products and attention stay with the libraries, which nothing of ours would beat. Triton
comes with torch's builds for CUDA; where it is not, and in every other precision, torch computes.

Triton's interpreter runs the same kernels on a CPU, slowly (``TRITON_INTERPRET=1``): so they are tested where there is no GPU.
"""

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels compute with these tensors."""
    return all(available(x.device.type, x.dtype) for x in tensors)


def available(device: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels for a kind of device and a precision: for bf16 on CUDA, where there is Triton."""
    return device == "cuda" and dtype == torch.bfloat16 and not missing()


def about(device: str, dtype: torch.dtype) -> str:
    """For the lines that say what a run computes with: what is missing, where these kernels could compute."""
    wanted = device == "cuda" and dtype == torch.bfloat16
    return f" by torch's own kernels (no {missing()}; slower)" if wanted and missing() else ""


@cache
def missing() -> str:
    """What Triton lacks here: itself, or a C compiler and Python's headers, with which it makes what starts a kernel."""
    if importlib.util.find_spec("triton") is None:
        return "Triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "C compiler"
    return "" if (Path(sysconfig.get_paths()["include"]) / "Python.h").exists() else "headers of Python"
