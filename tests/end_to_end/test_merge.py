"""`merge` on whole run folders: what it proves, what it refuses before any work, and that it holds no model in memory."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_runs import a_run, proof, rewrite
from safetensors.torch import load_file
from tiny import write_weights

from lamina import jobfile, merging, native, policies
from lamina.errors import AdapterError, CheckpointError, ConfigError
from lamina.job import read_job
from lamina.merging import COMPARED, merge
from lamina.model.decoder import Decoder
from lamina.model.weights import load_model
from lamina.opened import open_run
from lamina.ops.attention import Packed
from lamina.understand.difference import compare


def test_the_difference_is_that_of_the_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows through whole models in memory: every number is the same, bit for bit."""
    run, seen = a_run(tmp_path), []
    streamed = merging.streamed_logits

    def noted(outline: Decoder, stored: Any, adapter: Any, batches: Any, rows: Any, device: Any) -> list[torch.Tensor]:
        seen.append((batches, rows))
        return streamed(outline, stored, adapter, batches, rows, device)

    monkeypatch.setattr(merging, "streamed_logits", noted)
    record = merge(run, tmp_path / "out")
    batches, rows = seen[0]
    assert COMPARED / 2 < sum(map(len, rows)) <= COMPARED

    def logits(model: Decoder) -> torch.Tensor:
        with torch.no_grad():
            states = [model(batch.tokens, batch.position, Packed(batch.lengths)) for batch in batches]
            return torch.cat([(x[chosen] @ model.vocabulary.T).float() for x, chosen in zip(states, rows, strict=True)])

    targets = torch.cat([batch.targets[chosen] for batch, chosen in zip(batches, rows, strict=True)])
    whole = compare(logits(open_run(run).model), logits(load_model(tmp_path / "out", "bf16", "cpu")), targets)
    assert record.difference == whole
    assert 0 < whole.kl < 1e-3
    written = json.loads((tmp_path / "out" / "lamina_merge.json").read_text())
    assert written == json.loads(json.dumps(record.as_json()))
    assert written["difference"]["same"] == whole.same
    assert written["not_compared"] is None
    assert len(written["matrices"]) == 14


def test_an_update_that_rounding_took_away_is_told(tmp_path: Path) -> None:
    """An update far below the rounding step of bf16: the merged model is the base, and KL is that of the adapter."""
    run = a_run(tmp_path, std=1e-6)
    with pytest.raises(ConfigError, match="found another dtype for a merge, expected those of the run"):
        merge(run, tmp_path / "out", changes={"dtype": "fp32"})
    rewrite(run, "model", dtype="fp32")
    record = merge(run, tmp_path / "out")
    assert record.survived < 0.05
    assert proof(record).same, "so weak an adapter does next to nothing"
    assert record.lines()[-1].startswith(
        f"most of the update was rounded away: {record.survived:.1%} of it survived, expected"
    )
    written = json.loads((tmp_path / "out" / "lamina_merge.json").read_text())
    assert written["rounded_away"] and written["advice"] == record.advice()
    assert written["limits"]["survived_at_least"] == 0.5

    wide = load_file(tmp_path / "base" / "model.safetensors")
    shutil.copytree(tmp_path / "base", tmp_path / "wide")
    write_weights(tmp_path / "wide", {name: tensor.float() for name, tensor in wide.items()})
    record = merge(run, tmp_path / "held", changes={"model": str(tmp_path / "wide")})  # as the line says
    assert record.survived > 0.99 and record.advice() == []
    assert {tensor.dtype for tensor in load_file(tmp_path / "held" / "model.safetensors").values()} == {torch.float32}

    strong = a_run(tmp_path / "strong", std=0.5)

    with pytest.MonkeyPatch.context() as patch:
        add = policies.add
        patch.setattr(policies, "add", lambda name, merged, *rest: add(name, merged.clone(), *rest))
        record = merge(strong, tmp_path / "other")
    assert not proof(record).same
    assert any("does NOT answer as the adapter does" in line for line in proof(record).lines())


def test_data_that_is_gone_does_not_keep_from_merging(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    compared = merge(run, tmp_path / "with")
    assert compared.difference is not None
    (tmp_path / "train.jsonl").unlink()
    record = merge(run, tmp_path / "without")
    assert record.difference is None
    assert record.matrices == compared.matrices
    assert record.lines()[-1].startswith(f"not compared: {tmp_path / 'train.jsonl'}: ")
    written = json.loads((tmp_path / "without" / "lamina_merge.json").read_text())
    assert written["difference"] is None
    assert written["not_compared"] == record.not_compared
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]


def test_a_run_that_held_out_nothing(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    text = (run / "job.toml").read_text()
    assert "eval_fraction = 0.5" in text
    (run / "job.toml").write_text(text.replace("eval_fraction = 0.5", "eval_fraction = 0.0"))
    assert merge(run, tmp_path / "out").lines()[-1] == "not compared: the run held out no rows"


def test_a_place_that_is_taken_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")

    def work(*_: Any) -> Any:
        raise AssertionError("work before the place was checked")

    monkeypatch.setattr("lamina.merging.outline", work)
    monkeypatch.setattr("lamina.merging.held_out_of", work)
    with pytest.raises(CheckpointError, match="out: exists and is not an empty folder; name another place as --out"):
        merge(run, tmp_path / "out")
    with pytest.raises(CheckpointError, match="lies in the base's own folder, expected another place as --out"):
        merge(run, tmp_path / "base" / "merged")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    merge(run, tmp_path / "merged")
    job = read_job(run)
    job = replace(job, model=replace(job.model, model=str(tmp_path / "merged")))
    (run / "job.toml").write_text(jobfile.dump(job.sections()), encoding="utf-8")
    with pytest.raises(AdapterError, match="trained on another base .* load the base it was trained on"):
        merge(run, tmp_path / "twice")
    with pytest.raises(AdapterError, match="trained on another base"):
        open_run(run)
    assert not (tmp_path / "twice").exists()


MEASURE = """
from lamina.process import prepare
prepare()  # as the command does
import sys
from pathlib import Path
from lamina.merging import merge

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

large, small = map(Path, sys.argv[1:])
merge(small, small.parent / "out")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
record = merge(large, large.parent / "out")
print(status("VmHWM") - before, record.difference.tokens)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures the peak through Linux's /proc")
def test_the_peak_is_a_layer_not_a_model(tmp_path: Path) -> None:
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    size |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    for name, numbers in (("large", size), ("small", {})):
        (tmp_path / name).mkdir()
        a_run(tmp_path / name, **numbers)
    model = (tmp_path / "large" / "base" / "model.safetensors").stat().st_size
    assert model > 200e6
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "large" / "run"), str(tmp_path / "small" / "run")]
    peak, tokens = map(int, subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split())
    assert tokens > 100
    layer = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
    assert 2 * layer < model / 3, "else the bound below would say nothing"
    # A layer of each; and what the allocator keeps of those before, where it is the C library's.
    assert peak < (3 * layer if native._memory()[0] else model / 2)
