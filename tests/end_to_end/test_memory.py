"""Memory that is planned, refused, and runs out: on purpose, under limits of the system."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import shared_data
from tiny import write_tiny

from lamina import cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory by Linux's RLIMIT_DATA")

# Few layers and a large vocabulary: a slice of the loss's logits is an allocation of its own, which no free heap holds.
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 4}
SIZE |= {"vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": True}


def job(place: Path) -> list[str]:
    """The flags of a job on a small checkpoint with Llama-2's tokenizer."""
    tokenizer = shared_data("llama2-tokenizer")
    base = write_tiny(place / "base", **SIZE)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / file, base / file)
    rows = [{"text": f"{n} " + "the quick brown fox jumps over the lazy dog " * 60} for n in range(40)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ["--model", str(base), "--data", str(place / "rows.jsonl"), "--dtype", "fp32", "--device", "cpu"]
    return [*flags, "--out", str(place / "run"), "--batch-size", "2", "--eval-samples", "0", "--max-length", "600"]


def data_bytes(process: int | str) -> int:
    """What a process has of what RLIMIT_DATA limits."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[5]) * resource.getpagesize()


def lamina(*arguments: str, limit: int | None = None) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    code = "import sys\nfrom lamina import cli\nsys.exit(cli.main(sys.argv[1:]))"
    if limit is not None:  # libraries are loaded first: they are not the run's memory
        used = "int(open('/proc/self/statm').read().split()[5]) * resource.getpagesize()"
        libraries = "resource, datasets, pyarrow.parquet, torch, transformers, lamina.run"
        code = f"import {libraries}\nresource.setrlimit(resource.RLIMIT_DATA, ({used} + {limit},) * 2)\n{code}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    process = lamina("train", *job(tmp_path), "--steps", "4", limit=160_000_000)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert told.startswith("lamina: the run needs ") and told.count("\n") == 1
    assert "what would fit: " in told and "--memory-gib" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_memory_that_runs_out_ends_a_run_with_one_line_and_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit comes when some steps are saved; then the run goes on without it, to where it would have come.

    Without the allocator, which keeps what the heaviest micro-batch needed, so that a limit that comes later finds nothing to refuse.
    """
    monkeypatch.setenv("LAMINA_NATIVE", "0")
    flags = [*job(tmp_path), "--steps", "12", "--save-every", "1"]
    process = lamina("train", *flags, "--memory-gib", "100")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    limit = data_bytes(process.pid) + 16_000_000
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2, told
    assert told.startswith("lamina: out of memory; what was saved is untouched") and told.count("\n") == 1

    run = tmp_path / "run"
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert cli.main(["train", *flags[:-4], "--steps", "12", "--out", str(tmp_path / "whole")]) == 0
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run, tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_the_plan_of_a_job_that_does_not_fit_names_ways_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = job(tmp_path)
    assert cli.main(["plan", *flags, "--rank", "32", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["total_bytes"] == sum(plan["items"].values())
    assert plan["heaviest_micro_batch"]["longest"] == 599
    assert plan["seconds"] > 0 and plan["tokens"] > 20_000
    least = f"{plan['total_bytes'] * 0.75 / 2**30:.4f}"
    fixed = ["--checkpoint-layers", "0", "--micro-batch-tokens", "4096"]
    assert cli.main(["plan", *flags, "--rank", "32", *fixed, "--memory-gib", least, "--json"]) == 2
    said = capsys.readouterr()
    plan = json.loads(said.out)
    assert not plan["fits"] and 1 <= len(plan["ways_out"]) <= 3
    for way in plan["ways_out"]:
        assert way["total_bytes"] <= float(least) * 2**30
        assert cli.main(["plan", *flags, "--rank", "32", *fixed, *way["flags"].split(), "--memory-gib", least]) == 0, (
            way
        )
    assert "what would fit: " + plan["ways_out"][0]["flags"] in said.err


def test_left_alone_the_plan_computes_twice_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As few layers as fit, and only then smaller micro-batches. That a run keeps to it: ``test_plan_kept.py``."""
    flags = job(tmp_path)

    def planned(*more: str) -> dict:
        assert cli.main(["plan", *flags, "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    free, all_twice = planned(), planned("--checkpoint-layers", "2")
    assert (free["micro_batch_tokens"], free["checkpoint_layers"]) == (4096, 0)
    between = (free["total_bytes"] + all_twice["total_bytes"]) / 2 / 2**30
    tight = planned("--memory-gib", f"{between:.5f}")
    assert tight["micro_batch_tokens"] == 4096 and tight["checkpoint_layers"] in (1, 2)
    tighter = planned("--memory-gib", f"{(all_twice['total_bytes'] - 500_000) / 2**30:.6f}")
    assert tighter["micro_batch_tokens"] < 4096 and tighter["checkpoint_layers"] == 2
