"""docs/benchmarks.md says what the rows of results say, and its pictures show them."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def check(docs: Path) -> tuple[int, str]:
    command = [sys.executable, BENCHMARKS / "tables.py", "--check", "--docs", docs]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env={"PYTHONIOENCODING": "utf-8"}, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plots")


def test_the_page_is_in_step_with_its_rows() -> None:
    assert check(ROOT / "docs") == (0, "in step\n")


def test_a_changed_number_and_an_old_picture_are_told(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (tmp_path / "benchmarks.md").write_text(page.replace("0", "1"), encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "images")
    old = next((tmp_path / "images").glob("bench-*.svg"))
    old.write_text(old.read_text(encoding="utf-8").replace("rows ", "rows 0"), encoding="utf-8")
    expected = f"benchmarks.md is out of step with benchmarks/results\n{old.name} was drawn from other rows\n"
    assert check(tmp_path) == (1, expected)


def test_a_short_run_takes_no_longer_ones_place(plots: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, results, catalogue = map(importlib.import_module, ("tables", "results", "catalogue"))
    known = {"workload": "m, rows, 4 rows a step, whole"}

    def run(name: str, steps: int, rounds: int = catalogue.FULL.rounds) -> list[dict[str, str]]:
        counts = {"steps": str(steps), "rounds": str(rounds)}
        return [known | counts | {"run": name, "arm": arm} for arm in ("lamina", "peft")]

    def shown(*runs: list[dict[str, str]]) -> str:
        rows = [row for run in runs for row in run]
        monkeypatch.setattr(results, "read", lambda path: rows if path.name == "cpu.csv" else [])
        ((name, found),) = tables.shown()
        assert name == "cpu-m-whole" and len(found) == 2
        return found[0]["run"]

    full, quick = catalogue.FULL.steps, catalogue.QUICK.steps
    assert shown(run("a", full), run("b", full), run("c", quick)) == "b"
    assert shown(run("a", quick), run("b", quick)) == "b"
    assert shown(run("a", full), run("b", full, rounds=1)) == "a"


def growth_rows() -> list[dict[str, str]]:
    return [
        {"axis": "length", "value": str(value), "arm": arm, "tok_s": str(9000 // value), "peak_gib": str(value / 100)}
        for value in (128, 512, 2048)
        for arm in ("bare-gemms", "lamina", "peft")
    ]


def test_the_same_rows_give_the_same_picture(plots: ModuleType, tmp_path: Path) -> None:
    rows = growth_rows()
    for name in ("a", "b"):
        plots.growth(rows, "length", tmp_path / name / "growth-length.svg")
    first, second = ((tmp_path / name / "growth-length.svg").read_bytes() for name in ("a", "b"))
    assert first == second
    assert plots.drawn_from(tmp_path / "a" / "growth-length.svg") == plots.digest(rows)


def test_another_number_gives_another_picture(plots: ModuleType, tmp_path: Path) -> None:
    rows = growth_rows()
    plots.growth(rows, "length", tmp_path / "growth-length.svg")
    rows[0]["tok_s"] = "71"
    assert plots.drawn_from(tmp_path / "growth-length.svg") != plots.digest(rows)
