"""The peers' environments under ``build/``: each tool with the versions of its file in ``requirements/``, made when it is first needed.

One for each, for no two of them agree on their dependencies: LLaMA-Factory holds transformers, PEFT and TRL back, torchtune needs an
old torchao. All have the torch that Lamina is measured with, but unsloth, which holds it back too.

On a machine without a network none can be made: ``beside`` takes the packages from folders that were laid out by hand.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from machine import ROOT

REQUIREMENTS = Path(__file__).with_name("requirements")


def python(name: str, build: Path) -> Path | None:
    """The Python of an environment, or nothing, told in one line, where it cannot be installed."""
    requirements = REQUIREMENTS / f"{name}.txt"
    folder = build / ("bench-env" if name == "peft" else f"bench-env-{name}")
    interpreter, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    expected = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == expected:
        return interpreter
    print(f"setting up {folder.relative_to(ROOT)}: once, some minutes", flush=True)
    made = _quietly([sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(interpreter), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-r", str(requirements)]
    made = made or _quietly(pip)
    for package in ("torchaudio", "torchvision"):  # a build for CUDA breaks transformers where its libraries are not
        if not made and _quietly([str(interpreter), "-c", f"import {package}"]):
            _quietly([str(interpreter), "-m", "pip", "uninstall", "--yes", "--quiet", package])
    if made:
        print(f"{name} is left out, its environment cannot be installed: {made}", flush=True)
        return None
    stamp.write_text(expected)
    return interpreter


def beside(sites: Path, name: str) -> str:
    """PYTHONPATH of an arm whose packages lie in ``sites``: those of its environment, those for all, then what was there before."""
    folders = [sites / part for part in (name, "common") if part and (sites / part).is_dir()]
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*(str(folder.resolve()) for folder in folders), *([before] if before else [])])


def _quietly(command: list[str]) -> str:
    """Runs a command; the last line of its complaint, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"status {done.returncode}"
