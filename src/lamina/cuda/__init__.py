"""Kernels in Triton for a training step in bfloat16 on CUDA: what ``native`` is for a CPU.

torch composes a norm, a gate or a rotation of simpler operations, and each of them reads and writes a tensor of the whole batch in
the device's memory; here each is one pass. Products and attention stay with the libraries, which nothing of ours would beat. Triton
comes with torch's builds for CUDA; where it is not, and in every other precision, torch computes.

Triton's interpreter runs the same kernels on a CPU, slowly (``TRITON_INTERPRET=1``): so they are tested where there is no GPU.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels compute with these tensors."""
    return all(available(x.device.type, x.dtype) for x in tensors)


def available(device: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels for a kind of device and a precision: for bf16 on CUDA, where there is Triton."""
    return device == "cuda" and dtype == torch.bfloat16 and _triton()


@cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None
