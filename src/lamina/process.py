"""What the process asks of its libraries before they are loaded, so that its memory is what its tensors take.

Measured in docs/log.md; everything here is a default that the environment overrides.

* ``GOMP_SPINCOUNT``: threads of libgomp, torch's OpenMP, spin while they wait. Where other work shares the cores they take it
  from the very thread they wait for: a training step took four times as long. Threads that sleep at once cost a fifth of the
  speed on a machine that is free. A quarter of a millisecond has nearly the best of both.
* ``ONEDNN_PRIMITIVE_CACHE_CAPACITY``, ``LRU_CACHE_CAPACITY``: in bf16 on a CPU every shape of a matrix product is compiled and
  kept, about half a megabyte each, up to 1,024 of them in each of two caches. Micro-batches differ in length, so a run
  grew by more than a gigabyte in its first hundred steps. A micro-batch needs 55 different ones, for its layers to share, and
  the next, of another length, needs others: more than one micro-batch's are of no use.
* ``THP_MEM_ALLOC_ENABLE``: tensors of two megabytes and more lie in huge pages. Memory fresh from the system costs a fault a
  page, and 512 times fewer pages cost less.
* glibc's allocator raises the size from which memory goes back to the system at once to what was freed last, up to 32 MB;
  what is smaller stays, in pieces that do not fit what comes next: 20 to 80 % more than the tensors. The size is fixed here.

The last two are for what lies in the heap: where there is a compiler, large tensors lie elsewhere (``native.keep_memory``).
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable

PRIMITIVES = 28
"""Compiled matrix products that are kept."""
_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(PRIMITIVES),
    "LRU_CACHE_CAPACITY": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGE = 2**21
"""Bytes from which on a tensor has pages of its own, of this size: an allocation that goes back when it is freed."""

PREPARED = threading.Event()
"""Whether this process is Lamina's to set up: then tensors lie in memory of its own too (``native.keep_memory``)."""


def prepare() -> None:
    """Sets what torch and its libraries read when they are loaded; to be called before that."""
    PREPARED.set()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mallopt = of_glibc("mallopt")
    if mallopt is None or {"MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    mallopt(_MMAP_THRESHOLD, LARGE)
    mallopt(_TRIM_THRESHOLD, 16 * LARGE)


@functools.cache
def of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, where that is glibc."""
    if sys.platform != "linux":
        return None
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except AttributeError:
        return None  # another C library
    return found
