"""How many bytes of tensors are alive, and which: exact, and independent of how the allocator gets them from the system.

``allocated_peak`` reads torch's own record of every allocation, the temporaries inside of kernels among them. ``Live``
watches the operations from outside and cannot see those, but knows of which operation and shape each tensor is: it is what
to look into when a prediction does not fit. Tensors made before count in neither.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes on the CPU that were allocated at one time while ``run`` ran, beyond those at its beginning."""
    gc.disable()  # a collection at an odd moment would free what was there before
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        gc.enable()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # negative where memory is given back
        peak = max(peak, now)
    return peak


class Live(TorchDispatchMode):
    """Follows the storages of the tensors that operations return, each once, until it is freed.

    Attributes:
        bytes, peak: alive now, and at most.
        at_peak: what was alive at the peak: (operation, shape, dtype, bytes) and how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.at_peak: Counter[tuple[str, tuple[int, ...], torch.dtype, int]] = Counter()
        self._alive: dict[int, tuple[str, tuple[int, ...], torch.dtype, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in given | self._alive.keys():
                self._follow(tensor, str(function))
        if self.bytes > self.peak:
            self.peak = self.bytes
            self.at_peak = Counter(self._alive.values())
        return out

    def _follow(self, tensor: Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        self._alive[storage._cdata] = operation, tuple(tensor.shape), tensor.dtype, storage.nbytes()
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.bytes -= self._alive.pop(key)[-1]

    def largest(self, count: int = 20) -> str:
        """What was alive at the peak, the largest sums first, one a line."""
        rows = sorted(self.at_peak.items(), key=lambda item: -item[0][3] * item[1])[:count]
        return "\n".join(f"{n:4} × {size:>12,} {op} {list(shape)} {dtype}" for (op, shape, dtype, size), n in rows)


def storage_of(tensor: Tensor) -> int:
    """Which storage a tensor lies in."""
    return tensor.untyped_storage()._cdata
