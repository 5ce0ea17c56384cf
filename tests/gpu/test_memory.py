"""The plan beside what torch's allocator has lent, on a small model, and who held it."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("changes", [{}, {"base": "nf4"}, {"checkpointed": 12}, {"checkpointed": 12, "offload": True}])
def test_a_run_takes_what_the_plan_says(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    grid, memory, parts = (importlib.import_module(name) for name in ("memory_grid", "memory", "memory_parts"))
    monkeypatch.setattr(parts, "OFF", 0.0)
    report = parts.on_gpu(memory.placed(grid.USUAL_GPU | {"model": "134m"} | changes, "cuda", BENCHMARKS))
    told = "\n".join(report["log"])
    assert report["measured"] / report["planned"] == pytest.approx(1, abs=0.05), told
    assert "no record" not in told and "src/lamina" not in told and "ops/" in told
