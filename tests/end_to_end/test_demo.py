"""The promise of the first fine-tune: the demo teaches to answer, forgets next to nothing, and fits into a small machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished demo, in a process of its own, so that its peak memory is its own."""
    out = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "lamina", "train", "demo", "--eval-samples", "160", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_demo_keeps_its_promises(run: Path) -> None:
    card = json.loads((run / "card.json").read_text(encoding="utf-8"))
    base, adapter = card["base"], card["adapter"]
    assert len(adapter["answers"]["rows"]) == 160  # all that is held out
    assert adapter["answers"]["exact_match"] >= 0.95
    assert base["answers"]["exact_match"] < 0.05
    assert adapter["answers"]["stop_rate"] >= 0.95
    assert adapter["neutral"]["perplexity"] < 1.25 * base["neutral"]["perplexity"]
    assert 0 < card["memory_bytes"] <= 2 * 2**30
    assert card["ledger_notes"] == []  # a sound run is not talked about


def test_the_demos_curve_is_in_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 151))
    assert losses[-1].value < losses[0].value / 2
