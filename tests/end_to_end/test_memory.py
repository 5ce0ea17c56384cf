"""Memory that is planned, refused, and runs out: on purpose, under limits of the system."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import shared_data
from tiny import write_tiny

from lamina import cli, native

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


INTERRUPTED = """
import os, signal
from lamina.report.console import Progress
step = Progress.step
def shown(self, done):
    step(self, done)
    if done.step == 2:
        os.kill(os.getpid(), signal.SIGINT)
Progress.step = shown
"""
"""Interrupts the run after its second step, which it saves."""

LIMITED_REHEARSAL = """
import re
import resource
from lamina import native, under_way
rehearse = under_way.rehearse
def limited(*given):
    assert native.keep_memory(), "tensors lie in the allocator's range"
    limit = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize() + 16_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    rehearse(*given)
under_way.rehearse = limited
"""
"""Limits the process when its base is loaded and before the heaviest micro-batch: to less than a slice of the logits more."""


def lamina(*arguments: str, limit: int | None = None, before: str = "") -> subprocess.Popen[str]:
    """The command line in a process of its own, which runs the code ``before`` first."""
    code = f"import sys\nfrom lamina import cli\n{before}\nsys.exit(cli.main(sys.argv[1:]))"
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
    # Where the next large tensor is asked for, a step or the evaluation that follows it.
    assert re.match(r"lamina: out of memory \((training|evaluations)\); what was saved is untouched", told)
    assert told.count("\n") == 1

    run = tmp_path / "run"
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert cli.main(["train", *flags[:-4], "--steps", "12", "--out", str(tmp_path / "whole")]) == 0
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run, tmp_path / "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.skipif(
    native._memory()[0] is None or resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY,
    reason="no C++ compiler, or memory is limited, so torch's allocator",
)
def test_a_resumed_run_that_has_too_little_memory_says_so_before_its_next_step(tmp_path: Path) -> None:
    """With the allocator, and a limit that comes when it is in use: what it cannot grow by, torch cannot get either.

    The run stops in its rehearsal, so its checkpoint is the one from before; with the memory it goes on from there.
    """
    flags = [*job(tmp_path), "--steps", "4", "--save-every", "1", "--memory-gib", "100"]
    process = lamina("train", *flags, before=INTERRUPTED)
    process.communicate(timeout=120)
    assert process.returncode == 130
    run = tmp_path / "run"
    state = run / "state" / "state.safetensors"
    saved = state.read_bytes()

    process = lamina("train", "--resume", str(run), before=LIMITED_REHEARSAL)
    said, told = process.communicate(timeout=120)
    assert process.returncode == 2, told
    assert told.startswith("lamina: out of memory (training); what was saved is untouched") and told.count("\n") == 1
    assert "after step 2 of 4" in said and "it fits" not in said and "step 3/" not in said
    assert state.read_bytes() == saved

    process = lamina("train", "--resume", str(run))
    said, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert "it fits" in said and "step 4/4" in said


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


@pytest.mark.slow
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
