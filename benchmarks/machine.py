"""Where and with what a row was measured, and the environment of the peers."""

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = Path(__file__).with_name("requirements-peers.txt")


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


def commit() -> str:
    """The commit, marked where Lamina's sources or the benchmark differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def peers(build: Path) -> Path:
    """The Python of the peers' environment, which is made when it is missing or made of other requirements."""
    folder = build / "bench-env"
    python, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    expected = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != expected:
        print(f"setting up the peers' environment in {folder.relative_to(ROOT)}: once, some minutes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-r", REQUIREMENTS]
        subprocess.run(pip, check=True)
        stamp.write_text(expected)
    return python
