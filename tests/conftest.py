"""What every test may use: the real data when it is at hand, and one thread so that helpers of the machine stay out of it."""

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """The folder of real data called ``name`` beside the project; the test is skipped where it is absent."""
    folder = _SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no real data: shared/data/{name} is absent")
    return folder
