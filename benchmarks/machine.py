"""Where and with what a row was measured."""

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def machine() -> str:
    """Processor, cores, memory and the instructions that matter, in one line."""
    cpu, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        found = {key.strip(): value.strip() for key, value in fields.items()}
        cpu = f"{found.get('model name', cpu)} (family {found.get('cpu family', '?')} model {found.get('model', '?')})"
        known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
        flags = " ".join(flag for flag in known if flag in found.get("flags", "").split())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {cores()} cores, {gib:.0f} GiB{', ' + flags if flags else ''}"


def gpu() -> str:
    """Name and memory of the GPU, and the CUDA that torch was built for."""
    import torch

    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def commit() -> str:
    """The commit, marked where Lamina's sources or the benchmark differ from it."""

    if (given := os.environ.get("LAMINA_COMMIT")) or not (ROOT / ".git").exists():  # a copy without its history
        return given or ""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
