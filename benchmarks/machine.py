"""Where and with what a row was measured."""

import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def machine(device: str = "cpu") -> str:
    """Processor, cores, memory and the instructions that matter, in one line; before them the GPU, where that is the device."""
    cpu, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        found = {key.strip(): value.strip() for key, value in fields.items()}
        cpu = f"{found.get('model name', cpu)} (family {found.get('cpu family', '?')} model {found.get('model', '?')})"
        known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
        flags = " ".join(flag for flag in known if flag in found.get("flags", "").split())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    line = f"{cpu}, {cores()} cores, {gib:.0f} GiB{', ' + flags if flags else ''}"
    return f"{gpu()}; {line}" if device == "cuda" else line


def watched(child: subprocess.Popen) -> tuple[int, resource.struct_rusage, int]:
    """Waits for a child: its exit status, what it used, and its peak of resident bytes, asked while it runs (Linux).

    ``ru_maxrss`` would be no less than this process's own peak: a child inherits that of its parent.
    """
    peak, status = 0, Path(f"/proc/{child.pid}/status")
    while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
        lines = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
        peak = max(peak, next((1024 * int(line[1]) for line in lines if line[0] == "VmHWM:"), 0))
        time.sleep(0.005)
    child.returncode = os.waitstatus_to_exitcode(ended[1])
    return child.returncode, ended[2], peak


def gpu() -> str:
    """The GPU, its memory and driver, and torch's CUDA; asked of the driver's own tool, so that this process takes none of its memory."""
    import torch

    asked = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits", "--id=0")
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        name, mib, driver = (part.strip() for part in said.splitlines()[0].split(","))
        return f"{name}, {float(mib) / 2**10:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}"
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        found = torch.cuda.get_device_properties(0)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def commit() -> str:
    """The commit, marked where Lamina's sources or the benchmark differ from it; LAMINA_COMMIT, where a copy without git is told it."""
    if (told := os.environ.get("LAMINA_COMMIT")) or not (ROOT / ".git").exists():
        return told or ""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
