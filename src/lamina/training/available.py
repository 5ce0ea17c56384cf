"""How much memory a run may take, and how much it took: read from the device, the system and its limits."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

from lamina.native import give_back

_PAGE = resource.getpagesize()
_UNLIMITED = 2**62  # what version 1 of cgroups says where there is no limit is larger


def available(device: torch.device) -> int:
    """Bytes that are free for a run: of the device on CUDA, with what torch's allocator holds there and nobody uses; else the least
    that system, cgroup and limits leave."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return max(0, min([_system(), *_cgroups(), *_limits()]))


def _system() -> int:
    """Bytes that Linux counts as available, caches included; elsewhere half of the machine's memory."""
    if sys.platform == "linux":
        return _fields(Path("/proc/meminfo"))["MemAvailable"]
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the cgroups of this process leave, in versions 1 and 2: the limit less what is used and is no cache."""
    left = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        folder, limit, usage = (
            (root, "memory.max", "memory.current")
            if not controllers
            else (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        if controllers and "memory" not in controllers.split(","):
            continue
        inside = folder / path.lstrip("/")
        for place in (inside, *inside.parents):  # the limit of any group above counts too
            found = _number(place / limit)
            if found is not None and found < _UNLIMITED:
                used = _number(place / usage) or 0
                cache = (
                    _fields(place / "memory.stat").get("inactive_file", 0) if (place / "memory.stat").exists() else 0
                )
                left.append(found - max(0, used - cache))
            if place == folder:
                break
    return left


def _limits() -> list[int]:
    """What the limits of this process leave of its address space and its private memory (ulimit -v, -d)."""
    if sys.platform != "linux":
        return []
    total, _, _, _, _, data, _ = (int(pages) * _PAGE for pages in Path("/proc/self/statm").read_text().split())
    pairs = ((resource.RLIMIT_AS, total), (resource.RLIMIT_DATA, data))
    soft = [(resource.getrlimit(which)[0], used) for which, used in pairs]
    return [limit - used for limit, used in soft if limit != resource.RLIM_INFINITY]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of lines of a name and a number, in bytes where it says kB."""
    found = {}
    for line in path.read_text().splitlines():
        match line.replace(":", " ").split():
            case [name, number, *unit] if number.isdigit():
                found[name] = int(number) * (1024 if unit == ["kB"] else 1)
    return found


class Meter:
    """The peak memory of a run from here on, above what was taken before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()  # before that there is no count to reset
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            give_back()  # or what was freed would count as taken before
            if sys.platform == "linux":
                with contextlib.suppress(OSError):  # where /proc is read-only the peak is that of the whole process
                    Path("/proc/self/clear_refs").write_text("5")  # the system's own peak starts again from here
            self.before = resident("VmRSS")

    def peak(self) -> int:
        """Bytes: of the device's allocations on CUDA, of the process's resident set elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return resident("VmHWM") - self.before


def resident(field: str) -> int:
    """Resident bytes of this process: ``VmRSS`` now, ``VmHWM`` at most. ``ru_maxrss`` is never less than what its parent had."""
    if sys.platform == "linux":
        return _fields(Path("/proc/self/status"))[field]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, and only ever the peak
