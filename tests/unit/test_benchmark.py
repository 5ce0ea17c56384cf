"""The benchmark's own arithmetic: which arms run, ratios that never leave their run, columns that join a file."""

import csv
import importlib
import json
import os
import re
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
    known["workload"] = "m, rows, 4 rows a step, whole"
    return known | {"counted": [step], "round": round_} | more


def rows(reports: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    catalogue, results = module("catalogue"), module("results")
    arms = {arm.name: arm for arm in reversed(catalogue.ARMS) if arm.workload == "whole"}
    made = results.rows_of(
        {arms[name]: own for name, own in reports.items()}, {}, {"date": "d", "commit": "c", "run": "r", "machine": "x"}
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


def test_the_rows_of_a_step_come_longest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stay in their step: whoever pads two of four rows at a time computes 3 + 3 + 2 + 2 tokens and not 3 * 4."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "arms"))
    lengths = [1, 3, 2, 3, 4, 1]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps({'input_ids': [7] * n, 'labels': [7] * n})}\n" for n in lengths))
    about = {"model": "", "adapter": "", "threads": 1, "precision": "bf16", "learning_rate": 0.0, "clip": 1.0}
    job = module("common").Job(rows=str(file), first=0, batch=4, warmup=1, steps=1, result="", **about)
    assert [[len(row["input_ids"]) for row in step] for step in job.batches()] == [[3, 3, 2, 1], [4, 3, 1, 1]]


@pytest.mark.skipif(sys.platform != "linux", reason="a process's own peak is read from /proc")
def test_a_childs_peak_is_not_its_parents() -> None:
    """A parent of 300 MB starts a child of some ten; ``ru_maxrss`` would say 300."""
    held = bytearray(300 * 10**6)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3); raise SystemExit(3)"])
    status, used, peak = module("machine").watched(child)
    assert (status, len(held)) == (3, 300 * 10**6)
    assert 10**6 < peak < 100 * 10**6
    assert used.ru_utime > 0


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
    assert names == ["bare-gemms", "lamina", "peft", "peft-single", "trl-single", "litgpt-single"]
    every = {arm.name for arm in catalogue.chosen(None, "whole", quick=False)}
    assert {
        f"{tool}-{how}"
        for tool in ("trl", "litgpt", "torchtune", "llamafactory")
        for how in ("padded", "single", "default")
    } <= every
    for workload in ("answers", "templated", "dense"):
        tools = {arm.contest[0] for arm in catalogue.chosen(None, workload, quick=False)}
        assert tools == {"bare", "lamina", "peft", "trl", "litgpt", "torchtune", "llamafactory"}
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
    assert texts.about("whole", folder) == "random tokens in the place of guanaco-llama2-1k[:256] cut at 512"
    first, second, _ = zip(range(3), texts.counts(folder / "dense.jsonl", 2, 4), strict=False)
    assert first[1] == second[1] == (4 * 512, 4 * 511)


def test_rows_of_the_real_texts_are_kept_where_the_texts_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = module("rows")
    monkeypatch.setattr(texts, "DATA", tmp_path / "none")
    (tmp_path / "made.json").write_text(json.dumps({"real": True, "version": texts.VERSION}))
    texts.write(tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))
    assert texts.about("whole", tmp_path) == "guanaco-llama2-1k[:256] cut at 512"
    (tmp_path / "made.json").write_text(json.dumps({"real": True, "version": texts.VERSION - 1}))
    texts.write(tmp_path)
    assert (tmp_path / "whole.jsonl").exists() and texts.about("dense", tmp_path).startswith("random tokens")


def test_an_adapter_is_drawn_from_shapes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are not even there; the file is the one that the loaded model gives."""
    from safetensors.torch import load_file

    from lamina import LoRA, attach, load_model

    workload = module("workload")
    monkeypatch.setattr(module("rows"), "DATA", tmp_path / "none")
    files = workload.prepare(tmp_path, workload.TINY)
    model = load_model(files.model, "bf16", "cpu")
    drawn = attach(model, LoRA(rank=workload.TINY.rank, alpha=16.0), workload.SEED)
    weights = files.adapter / "adapter_model.safetensors"
    before = weights.read_bytes()
    for path, matrix in load_file(weights).items():
        if "lora_A" in path:
            assert matrix.equal(drawn[path.removeprefix("base_model.model.").partition(".lora_")[0]].a)
    for file in files.model.glob("*.safetensors"):
        data = file.read_bytes()
        file.write_bytes(data[: -len(data) // 2] + bytes(len(data) - len(data[: -len(data) // 2])))  # other numbers
    workload._write_adapter(files, workload.TINY)
    assert weights.read_bytes() == before


def test_the_arms_of_a_gpu() -> None:
    catalogue = module("catalogue")
    arms = catalogue.chosen(None, "whole", False, catalogue.ON_GPU)
    names = [arm.name for arm in arms]
    assert names[:5] == ["bare-gemms", "lamina", "peft", "peft-sixteen", "torchtune-packed"]
    references = {arm.base for arm in arms if arm.tool == "peft"}
    assert references == {"bf16", "nf4"}
    padded = [arm for arm in arms if arm.environment and "packed" not in arm.settings]
    assert all(arm.settings["micro"] == (16 if arm.name == "peft-sixteen" else 8) for arm in padded)
    slow = next(arm for arm in arms if arm.slow)
    assert (catalogue.GPU.of(slow, 0), catalogue.GPU.of(slow, 1)) == ((2, 5), (0, 0))


def test_a_larger_step_and_packages_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, environments, catalogue = module("bench"), module("environments"), module("catalogue")
    monkeypatch.setattr(bench, "BUILD", tmp_path / "build")
    (tmp_path / "peft").mkdir()
    (tmp_path / "common").mkdir()
    monkeypatch.setenv("PYTHONPATH", "src")
    expected = [str(tmp_path / "peft"), str(tmp_path / "common"), "src"]
    assert environments.beside(tmp_path, "peft").split(os.pathsep) == expected
    assert environments.beside(tmp_path, "").split(os.pathsep) == expected[1:]
    made = bench.Bench(None, "r", larger=8, sites=tmp_path)
    arms = catalogue.chosen("peft,litgpt-padded", "whole", False, catalogue.ON_GPU)
    assert made.able(arms) == arms  # nothing is installed
    assert set(made.pythons.values()) == {Path(sys.executable)} and made.batch("whole") == 32


def test_no_measurement_starts_when_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, catalogue = module("bench"), module("catalogue")
    monkeypatch.setattr(bench, "BUILD", tmp_path)
    made = bench.Bench(None, "r", until=1.0)
    made.rounds(catalogue.chosen("lamina", "whole", False), catalogue.SMOKE)
    assert made.reports == {} and "left out: the time is up" in capsys.readouterr().out


def test_after_the_first_round_each_tool_goes_on_in_its_fastest_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, catalogue = module("bench"), module("catalogue")
    monkeypatch.setattr(bench, "BUILD", tmp_path)
    monkeypatch.setattr(bench.results, "speed", lambda speed: speed)
    made = bench.Bench(None, "r")
    speeds = {"bare-gemms": 700, "lamina": 600, "lamina-int8": 900, "peft": 300, "peft-single": 400, "trl-padded": 191}
    speeds |= {"trl-single": 200, "trl-default": 150, "peft-single-nf4": 100}
    arms = catalogue.chosen(",".join(speeds), "whole", False)
    made.reports = {arm: [speeds[arm.name]] for arm in arms}
    (answers,) = catalogue.chosen("peft", "answers", False)
    made.reports[answers] = [100]
    on = made._fastest()
    beaten = {"peft", "trl-default"}
    assert {arm.name for arm in on if arm.workload == "whole"} == speeds.keys() - beaten
    assert answers in on  # alone of its tool on its workload


def test_gates_without_their_reference_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, catalogue, workload = module("bench"), module("catalogue"), module("workload")
    monkeypatch.setattr(bench, "BUILD", tmp_path)
    made = bench.Bench(workload.Files(tmp_path / "m" / "model", tmp_path / "adapter-r8", tmp_path), "r")

    def process(arm: Any, *_: Any, **__: Any) -> dict[str, Any]:
        if arm.name == "peft":
            raise bench.Failed("peft: ended")
        return {"silent": [], "steps": []}

    monkeypatch.setattr(made, "process", process)
    arms = catalogue.chosen("lamina,peft", "whole", False)
    found = {arm.name: faults for arm, faults in made.gate(arms, at_once=2).items()}
    assert found == {"peft": ["alive: its process fails"], "lamina": ["fp32: no gate of peft to compare with"]}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, []),
        ({"silent": ["q.A"]}, ["alive: 1 matrices without a gradient, first q.A"]),
        ({"tokens": 99}, ["counts: found (real, supervised) tokens [(99, 50)], the reference's are [(100, 50)]"]),
        ({"loss": 2.0 * (1 + 2e-4)}, ["fp32: the loss of step 1 differs by 2.0e-04 relative, more than 1e-04"]),
        ({"loss": float("nan")}, ["fp32: the loss of step 1 differs by nan relative, more than 1e-04"]),
        ({"gradient": 1 + 2e-5}, ["fp32: the gradient of v.B differs by 2.0e-05, more than 1e-05"]),
        ({"gradient": float("nan")}, ["fp32: the gradient of v.B differs by inf, more than 1e-05"]),
        ({"name": "o.B"}, ["fp32: the gradient of v.B differs by inf, more than 1e-05"]),
    ],
)
def test_what_the_gates_see(changed: dict[str, Any], told: list[str], tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import ones

    def arm(
        kept: Path, tokens: int = 100, loss: float = 2.0, gradient: float = 1.0, name: str = "v.B", **more: Any
    ) -> Any:
        save_file({"q.A": ones(2, 3), name: gradient * ones(3, 2)}, kept)
        step = {"tokens": tokens, "supervised": 50, "loss": loss}
        return {"silent": [], "steps": [step], "gradients": kept} | more

    found = module("gates").faults("lamina", arm(tmp_path / "a", **changed), arm(tmp_path / "b"), exact=True)
    assert [re.sub("[ov].B differs by inf", "v.B differs by inf", fault) for fault in found] == told


def test_a_step_of_other_rows_is_told() -> None:
    bench = module("bench")
    steps = {"steps": [{"tokens": 10, "supervised": 4}, {"tokens": 11, "supervised": 4}]}
    assert bench.miscounted(steps, iter([(10, 4), (11, 4)])) == ""
    assert bench.miscounted(steps, iter([(10, 4), (11, 5)])).startswith("counts: step 2 had 11 tokens, 4 of them")


def test_a_row_names_the_gpu_and_a_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = module("machine")
    said = subprocess.CompletedProcess([], 0, stdout="NVIDIA H100 80GB HBM3, 81559, 580.1\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: said)
    assert machine.machine("cuda").startswith("NVIDIA H100 80GB HBM3, 80 GiB, driver 580.1, CUDA ")
    assert machine.machine("cuda").endswith("; " + machine.machine())
    monkeypatch.setenv("LAMINA_COMMIT", "1234abc")
    assert machine.commit() == "1234abc"


def test_kernels_count_under_the_operation_that_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace as Event

    import torch

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "arms"))
    profile = module("gpu_profile")
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def op(name: str, parent: Any = None, shapes: Any = (), **kernels: float) -> Event:
        own = [Event(name=kernel, duration=1e6 * seconds) for kernel, seconds in kernels.items()]
        what = {"name": name, "device_type": cpu, "is_user_annotation": name == "mark", "cpu_parent": parent}
        return Event(**what, input_shapes=shapes, kernels=own)

    def kernel(name: str, seconds: float) -> Event:
        spent = Event(elapsed_us=lambda: 1e6 * seconds)
        return Event(name=name, device_type=cuda, is_user_annotation=name == "mark", time_range=spent)

    norm, loss = op("_RMSNormBackward"), op("_CrossEntropySumBackward")
    events = [
        op("aten::mm", None, ([9, 8], [8, 64]), narrow=1.0),
        op("aten::mm", None, ([9, 8], [8, 8]), wide=2.0),
        op("aten::mm", loss, ([9, 8], [8, 32]), head=3.0),
        op("aten::mul", norm, norm=4.0),
        op("mark", None, mark=100.0),
        *(kernel(name, seconds) for name, seconds in [("narrow", 1.0), ("wide", 2.0), ("head", 3.0), ("norm", 4.0)]),
        *(kernel(name, seconds) for name, seconds in [("mark", 100.0), ("lost", 5.0), ("lost", 5.0)]),
    ]
    groups, kernels, busy = profile.spent(events, rank=64)
    expected = {"GEMM, LoRA": 1.0, "GEMM, frozen": 2.0, "GEMM, head": 3.0, "norm": 4.0, "started by no operation": 10.0}
    assert {name: seconds for name, seconds in groups.items() if seconds} == expected
    assert busy == 20.0 and kernels["lost"] == [10.0, 2]


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


def test_the_profile_knows_the_adapted_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's names of our own operations are in its list; one that is renamed would fall into "elementwise and other"."""
    from lamina.ops import attention, lora, loss, norm, rotary, swiglu

    scopes = module("step_profile").SCOPES
    ours = [name for name in scopes if name.startswith("_") and name[1].isupper()]
    found = {name for place in (attention, lora, loss, norm, rotary, swiglu) for name in vars(place)}
    assert ours and set(ours) <= found


def test_a_run_is_gone_on_with_from_its_own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    run = module("run")
    monkeypatch.setattr(run.results, "stamp", lambda: ("d", "bbb", "t-bbb"))
    monkeypatch.setattr(sys, "argv", ["run.py", "--tiny", "--resume", "t-aaa"])
    with pytest.raises(SystemExit, match="--resume t-aaa: found the sources of bbb, expected those that .*, aaa"):
        run.main()


@pytest.mark.slow
def test_a_run_without_peers(tmp_path: Path) -> None:
    """The runner, the clock, the profiled step and the bound, on a tiny model in Lamina's own environment."""
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--tiny", "--no-gates", "--only", "bare-gemms,lamina"]
    source = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=source, capture_output=True, encoding="utf-8", check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing is written" in done.stdout and "whole" in done.stdout
