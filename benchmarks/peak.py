"""Who held the memory of a GPU at its peak: read from the record that torch's allocator can keep of all it does.

The record has an entry for each block that is lent or given back, with the lines of Python that asked for it. Played again, it
says what was alive when the sum was largest. Sizes are those that were asked for, before the allocator rounds them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Entry = Mapping[str, Any]
DEPTH = 4
"""Lines of Lamina or of the benchmark that name a place, the innermost first."""

LISTED = 25
"""Groups of blocks that are listed: the largest."""

OURS = ("/src/lamina/", "/benchmarks/")


@dataclass(frozen=True)
class Blocks:
    """Blocks of one size that one place asked for."""

    size: int
    count: int
    place: str

    @property
    def total(self) -> int:
        """Bytes of them all."""
        return self.size * self.count


@dataclass(frozen=True)
class Peak:
    """The moment at which most was alive: its bytes, the place that asked for the last of them, and the blocks, largest first."""

    total: int
    place: str
    blocks: tuple[Blocks, ...]

    def lines(self) -> Iterator[str]:
        """The moment for people."""
        yield f"  recorded peak {self.total / 2**20:.1f} MiB, reached at {self.place}"
        for group in self.blocks[:LISTED]:
            yield f"  {group.total / 2**20:9.1f} MiB = {group.count:4} x {group.size / 2**20:9.3f}  {group.place}"
        rest = self.blocks[LISTED:]
        yield f"  {sum(group.total for group in rest) / 2**20:9.1f} MiB in {len(rest)} smaller groups"


@contextmanager
def recording() -> Iterator[Callable[[], Sequence[Entry]]]:
    """Lets torch's allocator keep its record for a block of code; what is given reads it, on the current GPU."""
    import torch

    torch.cuda.memory._record_memory_history(context="alloc", stacks="python")  # off, it forgets
    try:
        yield lambda: torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def peak_of(record: Sequence[Entry]) -> Peak:
    """Plays a record again up to its peak; blocks that were there before it began are not in it."""
    total = highest = last = 0
    sizes: dict[int, int] = {}
    for number, (address, size) in enumerate(_changes(record)):
        total += size - sizes.pop(address, 0)
        if size:
            sizes[address] = size
        if total > highest:
            highest, last = total, number
    alive: dict[int, tuple[int, str]] = {}
    place = "nothing"
    for number, entry in enumerate(record[: last + 1]):
        place = place_of(entry.get("frames", ()), place) if entry["action"] == "alloc" else place
        address, size = next(_changes([entry]))
        alive.pop(address, None)
        if size:
            alive[address] = size, place
        if number == last:
            break
    counts: dict[tuple[int, str], int] = {}
    for block in alive.values():
        counts[block] = counts.get(block, 0) + 1
    groups = [Blocks(size, count, where) for (size, where), count in counts.items()]
    return Peak(highest, place, tuple(sorted(groups, key=lambda group: -group.total)))


def _changes(record: Iterable[Entry]) -> Iterator[tuple[int, int]]:
    """Of each entry the address and the bytes that lie there from now on; address -1 where nothing changes."""
    for entry in record:
        match entry["action"]:
            case "alloc":
                yield entry["addr"], entry["size"]
            case "free_completed":
                yield entry["addr"], 0
            case _:
                yield -1, 0


def place_of(frames: Sequence[Mapping[str, Any]], before: str = "nothing") -> str:
    """The innermost lines of ours, ``file:line function < …``; without any, the place before: autograd runs C++ there."""
    ours = [frame for frame in frames if any(part in frame["filename"] for part in OURS)][:DEPTH]
    if not ours:
        return before if before.startswith("after ") else f"after {before}"

    def short(frame: Mapping[str, Any]) -> str:
        file = max((frame["filename"].rpartition(part)[2] for part in OURS if part in frame["filename"]), key=len)
        return f"{file}:{frame['line']} {frame['name']}"

    return " < ".join(map(short, ours))
