"""Writes what the doctor finds in the reference jobs anew: ``python tests/golden/write_checks.py``; needs the real data."""

import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from patients import REFERENCE, golden  # noqa: E402  (found by the line above)

if __name__ == "__main__":
    for name in REFERENCE:
        with tempfile.TemporaryDirectory() as place:
            (FOLDER / f"check-{name}.json").write_text(golden(name, Path(place)), encoding="utf-8")
