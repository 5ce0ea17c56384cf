"""What every test may use: the real data when it is at hand, and runs and pages without what a test does not look at."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Where tests run; the process that hands them out to others needs neither torch nor checks, and they wait for it."""
    if config.getoption("numprocesses", None):
        return
    import torch
    from checked import check_annotations

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    check_annotations()


def shared_data(name: str) -> Path:
    """The folder of real data called ``name`` beside the project; the test is skipped where it is absent."""
    folder = _SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no real data: shared/data/{name} is absent")
    return folder


@pytest.fixture(scope="module")
def no_page() -> Iterator[None]:
    """Runs end without ``report.html``, which takes half of the time of a tiny run; the tests of reports write it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.run.write_page", lambda run, say: None)
        yield


@pytest.fixture(scope="module")
def untimed() -> Iterator[None]:
    """Plans take a layer's time for known, which to measure is a tenth of a tiny run: for tests that ask for no time."""
    from lamina.training.calibrate import Pace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.planning.calibrate", lambda *_: Pace(layer=1e-6, rest=1e-6))
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages hold their charts' titles and numbers, but no pictures: for tests of what a page says."""
    figure, axes = MagicMock(), MagicMock()
    figure.get_figheight.return_value = 1.0
    axes.get_ylim.return_value = (0.0, 1.0)
    axes.get_legend_handles_labels.return_value = ([], [])
    monkeypatch.setattr("lamina.report.charts.canvas", lambda *_, **__: contextlib.nullcontext((figure, axes)))
    monkeypatch.setattr("lamina.report.page.svg", lambda figure, key, description: "<svg/>")
