"""What scripts and people rely on does not change unnoticed: help, the complete job file, public signatures, the reference.

They are made in a process of their own, without the type checks of the tests, which would show in the signatures.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    code = (
        f"import json, sys; sys.path.insert(0, {str(FOLDER)!r}); import write; "
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r}); import write_reference; "
        "made = write.GOLDEN | {'reference.md': write_reference.reference}; "
        "json.dump({name: made() for name, made in made.items()}, sys.stdout)"
    )
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ["help.txt", "init.toml", "signatures.txt"])
def test_what_users_see_has_not_changed(name: str, made: dict[str, str]) -> None:
    assert made[name] == (FOLDER / name).read_text(encoding="utf-8"), "meant? then: python tests/golden/write.py"


def test_the_reference_is_that_of_the_code(made: dict[str, str]) -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert made["reference.md"] == page, "meant? then: python scripts/write_reference.py"
