"""What the process asks of its libraries before they are loaded, so that its memory is what its tensors take.

Measured in docs/log.md; everything here is a default that the environment overrides.

* ``GOMP_SPINCOUNT``: threads of libgomp, torch's OpenMP, spin while they wait. Where other work shares the cores they take it
  from the very thread they wait for: a training step took four times as long. Threads that sleep at once cost a fifth of the
  speed on a machine that is free. A quarter of a millisecond has nearly the best of both.
* ``ONEDNN_PRIMITIVE_CACHE_CAPACITY``, ``LRU_CACHE_CAPACITY``: in bf16 on a CPU every shape of a matrix product is compiled and
  kept, a third to one and a half megabytes each, up to 1,024 of them in each of two caches. Micro-batches differ in
  length, so a run grew by more than a gigabyte in its first hundred steps. 256 are more than a micro-batch uses.
* glibc's allocator gives memory back to the system when it is freed, and takes it fresh for the next tensor: the system fills
  it with zeros, a fault for every page. That was a tenth of a training step. Freed memory is kept here, for the next tensor; what
  lies in holes between tensors then costs some five per cent of memory. Tensors in huge pages of their own do not fit into such holes.
"""

import ctypes
import os
import sys

PRIMITIVES = 256
"""Compiled matrix products that are kept."""
_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(PRIMITIVES),
    "LRU_CACHE_CAPACITY": "1",
}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT = 2**30
"""Bytes up to which freed memory is kept, and from which on a tensor has pages of its own, which go back when it is freed."""


def prepare() -> None:
    """Sets what torch and its libraries read when they are loaded; to be called before that."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if sys.platform != "linux" or {"MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return  # not glibc
    mallopt(_MMAP_THRESHOLD, KEPT)
    mallopt(_TRIM_THRESHOLD, KEPT)
