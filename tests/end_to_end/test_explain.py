"""`lamina explain` on a tiny run and on adapters without one: text, JSON, lower ranks, and what is told in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tensors, write_tiny
from tokens import pieces

from lamina import AdapterError, cli, explain, jobfile
from lamina.adapter import LoRA, adapted, attach
from lamina.adapter_files import CONFIG, WEIGHTS, load_adapter, save_adapter
from lamina.data.examples import DataSettings
from lamina.evaluation import evaluate
from lamina.explaining import shrink
from lamina.job import Job, read_job
from lamina.model.weights import ModelSettings, load_model
from lamina.opened import held_out_of, open_run

ROWS = [("the cat", "sat on a mat"), ("Hello", "world!"), ("two and two?", "Four."), ("was it", "good; saw that")]


def write_run(place: Path, std: float = 0.02, eval_fraction: float = 0.5, alpha: float = 32.0) -> Path:
    """A run folder as training leaves it, with numbers of deviation ``std`` in B."""
    tokenizer = pieces()
    base = write_tiny(place / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    rows = [
        {"messages": [{"role": "user", "content": f"{question} {n}"}, {"role": "assistant", "content": answer}]}
        for n in range(10)
        for question, answer in ROWS
    ]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lora = LoRA(rank=5, alpha=alpha, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 8.0})
    job = Job(
        ModelSettings(model=str(base), device="cpu", dtype="fp32"),
        DataSettings(data=str(place / "train.jsonl"), eval_fraction=eval_fraction),
        lora,
    )
    run = place / "run"
    run.mkdir()
    (run / "job.toml").write_text(jobfile.dump(job.sections()), encoding="utf-8")
    model = load_model(base, "fp32", "cpu")
    torch.manual_seed(0)
    for module in attach(model, lora).values():
        torch.nn.init.normal_(module.b, std=std)
    save_adapter(model, run / "adapter", lora, str(base))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("explain"))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["explain", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["explain", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("lamina: ") and err.count("\n") == 1
    return err


def test_a_run_in_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, str(run))
    assert "\x1b" not in text
    assert f"{run / 'adapter'}: rank 2 to 5, scale 1.6 to 16, in 14 matrices, beside {run.parent / 'base'}" in text
    for part in ("effective rank", "where the update sits", "by chance", "intruder dimensions: ", "held-out loss"):
        assert part in text
    assert "‖ΔW‖/‖W‖ and effective rank, layer × module" in text
    assert "the adapter truncated to lower ranks" in text
    assert "estimated" not in text, "matrices of this size are decomposed exactly"


def test_a_run_for_machines_is_what_the_function_returns(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(told(capsys, str(run), "--json"))
    assert found == json.loads(json.dumps(explain(run).as_json(), allow_nan=False))
    assert [row["rank"] for row in found["ranks"]["truncated"]] == [1, 2, 4]
    assert len(found["matrices"]) == len(found["map"]) == 14
    assert {matrix["rank"] for matrix in found["matrices"]} == {2, 5}


def test_the_numbers_beside_the_base_are_those_of_dense_matrices(run: Path) -> None:
    model = load_model(run.parent / "base", "fp32", "cpu")
    load_adapter(model, run / "adapter")
    modules = adapted(model)
    for update in explain(run, losses=False).updates:
        module = modules[update.name]
        delta = module.scale * module.b.detach().double() @ module.a.detach().double()
        assert update.singular_values == pytest.approx(torch.linalg.svdvals(delta)[: update.rank].tolist(), rel=1e-10)
        assert update.relation is not None
        assert update.relation.relative == pytest.approx(float(delta.norm() / module.base.weight.norm()), rel=1e-5)
    assert {update.layer for update in explain(run / "adapter").updates} == {"model.layers.0", "model.layers.1"}


def test_the_losses_are_those_of_adapters_saved_at_these_ranks(run: Path, tmp_path: Path) -> None:
    ranks = explain(run).ranks
    assert ranks is not None
    opened = open_run(run)
    held_out, budget = held_out_of(opened).held_out, read_job(run).train.portion
    assert ranks.adapter == evaluate(opened.model, held_out, budget).loss
    assert ranks.base == evaluate(load_model(opened.base, "fp32", "cpu"), held_out, budget).loss
    for rank, loss in ranks.truncated:
        model = load_model(opened.base, "fp32", "cpu")
        load_adapter(model, shrink(run, rank, tmp_path / str(rank)).folder)
        assert evaluate(model, held_out, budget).loss == loss


def test_lower_ranks_are_written_by_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, str(run), "--save-rank", "2", "--out", str(tmp_path / "low"))
    assert text.startswith("wrote the adapter at rank 2, which keeps ") and text.endswith(f"{tmp_path / 'low'}\n")
    found = explain(tmp_path / "low", base=run.parent / "base")
    assert found.rank == 2 and found.ranks is None and found.updates[0].relation is not None
    record = json.loads(told(capsys, str(run), "--save-rank", "5", "--out", str(tmp_path / "same"), "--json"))
    assert record == {"folder": str(tmp_path / "same"), "rank": 5, "energy": pytest.approx(1)}
    kept = json.loads(told(capsys, str(run), "--save-rank", "1", "--out", str(tmp_path / "one"), "--json"))["energy"]
    assert kept == pytest.approx(explain(run / "adapter").energy(1))


def test_an_adapter_alone_needs_no_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    text = told(capsys, str(tmp_path / "adapter"))
    assert "in 14 matrices\n" in text and "held-out" not in text and "intruder" not in text
    assert explain(run, best=False, losses=False).updates[3].norm == explain(tmp_path / "adapter").updates[3].norm


def test_the_best_adapter_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert "found no best/" in refused(capsys, str(tmp_path / "run"), "--best")
    shrink(run, 1, tmp_path / "run" / "best")
    assert explain(tmp_path / "run", best=True, losses=False).rank == 1


def test_a_base_that_is_named_wins(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = shutil.copytree(run.parent / "base", tmp_path / "moved")
    found = explain(run, base=moved)
    assert found.base == str(moved) and found.ranks == explain(run).ranks
    save_file(tensors(std=1 / 4, vocab_size=len(pieces())), moved / "model.safetensors")
    assert "trained on another base" in refused(capsys, str(run), "--base", str(moved))


def test_an_adapter_that_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, std=0.0)
    assert "this adapter changes nothing" in told(capsys, str(run))
    found = json.loads(told(capsys, str(run / "adapter"), "--json"))
    assert found["changes_nothing"] and found["ranks"] is None


def test_a_run_without_rows_to_judge_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, eval_fraction=0.0)
    assert "no held-out loss at lower ranks: the run held out no rows" in told(capsys, str(run))
    assert "no held-out loss" not in told(capsys, str(run), "--no-losses")
    (tmp_path / "train.jsonl").unlink()
    assert "no held-out loss at lower ranks: " in told(capsys, str(run))


def replace_weights(folder: Path, **changes: Any) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file(stored | changes, folder / "model.safetensors")


def test_a_base_that_does_not_fit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_tiny(tmp_path / "other", num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
    line = refused(capsys, str(run / "adapter"), "--base", str(other))
    assert (
        f"this base does not fit the adapter {run / 'adapter'}: missing 7: model.layers.1.mlp.down_proj.weight, "
        in line
    )
    assert line.count("has shape") == 7
    assert "model.layers.0.self_attn.q_proj.weight has shape [16, 16], the adapter's is [32, 32]" in line
    name = "model.layers.0.mlp.up_proj.weight"
    moved = shutil.copytree(run.parent / "base", tmp_path / "moved")
    weight = load_file(moved / "model.safetensors")[name]
    replace_weights(moved, **{name: weight.to(torch.int8)})
    assert f"{name} is stored as I8" in refused(capsys, str(run / "adapter"), "--base", str(moved))
    weight[0, 0] = float("nan")  # in a row that the fingerprint knows: so of an adapter that does not name its base
    replace_weights(moved, **{name: weight})
    foreign = shutil.copytree(run / "adapter", tmp_path / "foreign")
    save_file(load_file(foreign / WEIGHTS), foreign / WEIGHTS)
    with pytest.raises(AdapterError, match=f"{name} holds non-finite numbers; check --base"):
        explain(foreign, base=moved)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "nowhere: no such folder, expected that of a run or of an adapter"),
        (["base"], "found no adapter_config.json, so this is no adapter folder"),
        (["run/adapter", "--best"], "is not the folder of a run, so it has no best adapter"),
        (["run/adapter", "--base", "nowhere"], "nowhere: no such folder"),
        (["run", "--save-rank", "2"], "--save-rank and --out belong together"),
        (["run", "--out", "x"], "--save-rank and --out belong together"),
        (["run", "--save-rank", "6", "--out", "x"], "rank: found 6, expected 1 to 5"),
        (["run", "--save-rank", "0", "--out", "x"], "rank: found 0, expected 1 to 5"),
        (["run", "--save-rank", "two", "--out", "x"], "found 'two', expected an integer ≥ 1"),
        (["run", "--save-rank", "2", "--out", "base"], "base: exists and is not an empty folder"),
        (["run", "--dtype", "fp8"], "--dtype: found 'fp8'"),
    ],
    ids=" ".join,
)
def test_what_is_told_in_one_line(
    arguments: list[str], text: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    assert text in refused(capsys, *arguments)
    assert not Path("x").exists()


def test_hostile_names_do_not_steer_a_terminal(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    hostile = "layers.0.\x1b[2Jq"
    named = {f"base_model.model.{hostile}.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
    save_file(named, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}))
    assert "\x1b" not in told(capsys, str(folder)) and "\x1b" not in told(capsys, str(folder), "--json")
