"""The benchmark's own arithmetic: which arms run, ratios that never leave their run, columns that join a file."""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def module(name: str) -> Any:
    return importlib.import_module(name)


def report(round_: int, speed: float, **more: Any) -> dict[str, Any]:
    """What a process of an arm reports of one counted step of 100 tokens."""
    step = {"seconds": 100 / speed, "tokens": 100, "supervised": 50, "loss": 2.0, "others": 0.0}
    known = {"peak": 2**30, "silent": [], "gemm_share": None, "threads": 2, "versions": {"torch": "2"}, "warmup": 1}
    return known | {"counted": [step], "round": round_} | more


def rows(reports: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    catalogue, results = module("catalogue"), module("results")
    arms = {arm.name: arm for arm in reversed(catalogue.ARMS) if arm.workload == "whole"}
    made = results.rows_of(
        {arms[name]: own for name, own in reports.items()}, {}, "m", {"date": "d", "commit": "c", "run": "r"}
    )
    return {row["arm"]: row for row in made}


def test_ratios_are_paired_by_round() -> None:
    """The machine is twice as fast in the second round: the ratio of medians would be of two different rounds."""
    found = rows(
        {
            "bare-gemms": [report(0, 100.0), report(1, 200.0)],
            "lamina": [report(0, 80.0), report(1, 160.0)],
            "peft": [report(1, 80.0)],
        }
    )
    assert found["peft"]["lamina_is_times_faster"] == 2.0
    assert found["lamina"]["of_bound"] == 0.8
    assert found["peft"]["of_bound"] == 0.4
    assert found["lamina"]["lamina_is_times_faster"] == 1.0


def test_an_arm_that_shares_no_round_has_no_ratio() -> None:
    found = rows({"lamina": [report(0, 80.0)], "peft": [report(1, 40.0)]})
    assert found["peft"]["lamina_is_times_faster"] == "" and found["peft"]["of_bound"] == ""


def test_a_busy_machine_and_a_dead_matrix_keep_rows_out() -> None:
    loud = report(0, 80.0)
    loud["counted"][0]["others"] = module("machine").cores() * loud["counted"][0]["seconds"] / 2
    found = rows({"lamina": [report(0, 80.0, silent=["q_proj.A"])], "peft": [loud]})
    assert found["lamina"]["faults"] == "alive: 1 matrices without a gradient in bf16"
    assert found["peft"]["faults"] == "quiet: others took 50% of the processors, more than 10%"


def test_new_columns_join_a_file_of_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = module("results")
    monkeypatch.setattr(module("machine"), "ROOT", tmp_path)
    file = tmp_path / "cpu.csv"
    file.write_text("date,arm\n2026-01-02,peft\n", encoding="utf-8")
    new = [{"date": "2026-01-03", "arm": "lamina", "run": "x", "faults": ""}, {"arm": "trl", "faults": "alive"}]
    results.append(file, new, ["date", "arm", "run", "more"])
    results.append(file, new[:1], ["date", "arm", "run", "more"])
    with file.open(encoding="utf-8") as lines:
        found = [list(row.values()) for row in csv.DictReader(lines)]
    assert found == [["2026-01-02", "peft", "2026-01-02", ""], *[["2026-01-03", "lamina", "x", ""]] * 2]


def test_the_arms_of_a_run() -> None:
    catalogue = module("catalogue")
    names = [arm.name for arm in catalogue.chosen(None, "whole", quick=True)]
    assert names == ["bare-gemms", "lamina", "peft", "trl-best", "litgpt-best"]
    every = {arm.name for arm in catalogue.chosen(None, "whole", quick=False)}
    assert {
        f"{tool}-{how}" for tool in ("trl", "litgpt", "torchtune", "llamafactory") for how in ("best", "default")
    } <= every
    with pytest.raises(SystemExit, match="no arm is called 'peff', expected some of: bare-gemms, lamina"):
        catalogue.chosen("peff", "whole", quick=False)
    with pytest.raises(SystemExit, match="no workload is called 'hole'"):
        catalogue.chosen(None, "hole", quick=False)


@pytest.mark.slow
def test_an_environment_that_cannot_be_installed_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environments = module("environments")
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    (tmp_path / "none.txt").write_text(f"{tmp_path}/none.whl\n", encoding="utf-8")
    assert environments.python("none", tmp_path) is None
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and told[1].startswith("none is left out, its environment cannot be installed: ")


def test_rows_without_the_data_are_random_ones_of_like_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = module("rows")
    monkeypatch.setattr(texts, "DATA", tmp_path / "none")
    folder = texts.write(tmp_path / "rows")
    known = {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in folder.glob("*.jsonl")
    }
    longest = {name: max(len(row["input_ids"]) for row in rows) for name, rows in known.items()}
    expected = {"whole": 512, "answers": 512, "templated": 160, "dense": 512, "long": 2048}
    assert {name: longest[name] for name in expected} == expected
    assert (len(known["gate"]), len(known["held_out"])) == (4, 8)
    assert all(any(label != -100 for label in row["labels"][1:]) for rows in known.values() for row in rows)
    assert texts.about("whole") == "random tokens in the place of guanaco-llama2-1k[:256] cut at 512"
    first, second, _ = zip(range(3), texts.counts(folder / "dense.jsonl", 2, "dense"), strict=False)
    assert first[1] == second[1] == (4 * 512, 4 * 511)


def test_the_bound_counts_the_products_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: width 8, MLP 16, two layers, the adapter of rank 2 on the upper one; 3 tokens, 2 of them targets."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "arms"))
    import torch

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_key_value_heads": 1, "vocab_size": 32}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "layers_to_transform": [1]}))
    bare = module("bare_gemms").BareGemms(str(tmp_path), str(tmp_path), torch.float32)
    bare.size(3, 2)
    flops = {name: count for name, (_, count) in bare.groups().items()}
    layer = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 16
    assert flops["frozen, forward"] == 2 * 3 * 2 * layer
    assert flops["frozen, backward"] == 2 * 3 * (8 * 8 + 3 * 8 * 16)  # o_proj and the MLP of the upper layer
    a, b = 2 * (3 * 8 + 8 + 8 + 8 + 16), 2 * (8 + 4 + 4 + 8 + 16 + 16 + 8)
    assert flops["LoRA"] == 2 * 3 * (3 * a + 3 * b - 2 * 3 * 8)
    assert flops["head"] == 4 * 2 * 32 * 8
    assert set(bare.timed()[0]) == set(flops)


@pytest.mark.slow
def test_a_run_without_peers(tmp_path: Path) -> None:
    """The runner, the clock, the profiled step and the bound, on a tiny model in Lamina's own environment."""
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--tiny", "--no-gates", "--only", "bare-gemms,lamina"]
    source = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=source, capture_output=True, encoding="utf-8", check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing is written" in done.stdout and "whole" in done.stdout
