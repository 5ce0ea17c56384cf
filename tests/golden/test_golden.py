"""What scripts and people rely on does not change unnoticed: help, the complete job file, public signatures, the reference.

Each is made in a process of its own, without the type checks of the tests, which would show in the signatures.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


@pytest.mark.parametrize("name", ["help.txt", "init.toml", "signatures.txt"])
def test_what_users_see_has_not_changed(name: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import write; sys.stdout.write(write.GOLDEN[{name!r}]())"
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (FOLDER / name).read_text(encoding="utf-8"), "meant? then: python tests/golden/write.py"


def test_the_reference_is_that_of_the_code() -> None:
    script = ROOT / "scripts" / "write_reference.py"
    done = subprocess.run(
        [sys.executable, "-X", "utf8", script, "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
