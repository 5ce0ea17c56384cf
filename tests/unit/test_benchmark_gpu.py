"""What the GPU's benchmarks do that needs no GPU: models drawn where they stay, and an allocator's record played again."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.model.quantised import Base
from lamina.ops.frozen import Quantised

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def module(name: str) -> Any:
    return importlib.import_module(name)


def entry(action: str, address: int, size: int, *lines: str) -> dict[str, Any]:
    """An entry as torch writes it, the innermost line first."""
    frames = [dict(zip(("filename", "line", "name"), (line, 7, "f"), strict=True)) for line in lines]
    return {"action": action, "addr": address, "size": size, "frames": frames}


def test_a_record_played_again_says_who_held_the_peak() -> None:
    """Blocks that are given back before it or come after it are not in it; a place is used again by another block."""
    lora, norm = "/any/src/lamina/ops/lora.py", "/any/src/lamina/ops/norm.py"
    record = [
        entry("free_completed", 99, 5),  # from before the record
        entry("alloc", 1, 10, "/torch/nn.py", lora),
        entry("alloc", 2, 10, lora),
        entry("alloc", 3, 7, norm, lora),
        entry("free_requested", 3, 7),
        entry("free_completed", 3, 7),
        entry("alloc", 3, 50, "/torch/engine.py"),  # autograd, in C++
        entry("free_completed", 1, 10),
        entry("alloc", 4, 9, norm),
    ]
    found = module("peak").peak_of(record)
    assert found.total == 70
    assert found.place == "after ops/norm.py:7 f < ops/lora.py:7 f"
    assert [(group.size, group.count, group.place) for group in found.blocks] == [
        (50, 1, found.place),
        (10, 2, "ops/lora.py:7 f"),
    ]
    assert any("2 x" in line for line in found.lines())
    assert module("peak").peak_of([]).total == 0


@pytest.mark.parametrize("base", [None, "nf4", "int8", "fp8"])
def test_a_model_is_drawn_in_its_form(base: Base | None) -> None:
    drawn, workload, quantised = module("drawn"), module("workload"), module("lamina.model.quantised")
    model = drawn.drawn(workload.TINY, torch.bfloat16, torch.device("cpu"), base)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight))
    spread = [quantised.form_of(linear).dense().float().std().item() for linear in quantised.linears_of(model).values()]
    assert spread == pytest.approx([0.02] * 14, rel=0.1)
    forms = [linear.form for linear in quantised.quantised_of(model)]
    assert len(forms) == (0 if base is None else 14) and all(isinstance(form, Quantised) for form in forms)


@pytest.mark.slow
def test_the_grid_of_the_gpu() -> None:
    """At least 24 configurations, all different, and each can be read."""
    grid, memory, parts = module("memory_grid"), module("memory"), module("memory_parts")
    jobs = [grid.USUAL_GPU | changes for changes in grid.GPU]
    assert len({memory.name_of(job) for job in jobs}) == len(jobs) >= 24
    for job in jobs:
        work = parts.Work.of(memory.placed(job, "cuda", ROOT))
        architecture = module("drawn").architecture_of(grid.MODELS[job["model"]])
        data = work.rows(work.lengths, architecture.vocabulary)
        training = work.training
        known = parts.np.array(work.lengths)
        found = parts.heaviest(data, known, parts.rows_by_step(known, training, 0), training.portion)
        planned = work.planned(architecture, work.lora, found, torch.device("cuda"))
        assert planned.total > 2**28
        assert any("planned" in line for line in parts.told(planned, lambda: []))


def test_a_log_has_what_is_off(tmp_path: Path) -> None:
    memory, grid = module("memory"), module("memory_grid")
    sizes = {"planned": 2**20, "measured": 2**21, "requested": 2**20, "left": 0}
    memory.write_log(tmp_path / "log", grid.USUAL_GPU, sizes | {"log": ["  who"]})
    memory.write_log(tmp_path / "log", grid.USUAL_GPU, sizes | {"log": ["  another"]})
    written = (tmp_path / "log").read_text(encoding="utf-8")
    assert "2.000  model 1.1b" in written and written.index("who") < written.index("another")


@pytest.mark.slow
def test_both_benchmarks_try_themselves() -> None:
    for program, said in ((["memory.py"], "1 configurations"), (["qlora.py", "gpu"], "70b, train")):
        name, *mode = program
        command = [sys.executable, ROOT / "benchmarks" / name, *mode, "--tiny"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout and "FAILED" not in done.stdout
