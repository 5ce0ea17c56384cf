"""Resume is the same run: killed at any moment and gone on with, the result equals the uninterrupted one's, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import write_tiny
from tokens import pieces

from lamina import cli
from lamina.report.ledger import read_ledger
from lamina.report.record import read_metrics, read_samples

STEPS = 10
TIMING = ("seconds", "memory_bytes")
ARGUMENTS = [
    *("--dtype", "fp32", "--device", "cpu", "--rank", "2", "--dropout", "0.1", "--batch-size", "3", "--seed", "7"),
    *(
        "--steps",
        str(STEPS),
        "--eval-every",
        "3",
        "--save-every",
        "2",
        "--eval-samples",
        "2",
        "--eval-max-new-tokens",
        "4",
    ),
]


def train(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lamina", "train", *arguments]


def run_until(command: list[str], seen: str) -> subprocess.Popen[str]:
    """Starts a command and returns it, still running, as soon as a line of its output begins with ``seen``."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(seen):
            return process
    raise AssertionError(f"{seen!r} was never said: {process.communicate()}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tokenizer = pieces()
    write_tiny(folder / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": f"the cat {n}", "completion": "sat on a mat " * (n % 4 + 1)} for n in range(24)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def named(place: Path) -> list[str]:
    return ["--model", str(place / "base"), "--data", str(place / "train.jsonl"), *ARGUMENTS]


@pytest.fixture(scope="module")
def whole(place: Path, named: list[str]) -> Path:
    """The uninterrupted run, in a process of its own as the others are."""
    subprocess.run(train(*named, "--out", str(place / "whole")), check=True, capture_output=True, env=single_thread())
    return place / "whole"


def single_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def assert_same(run: Path, whole: Path) -> None:
    for name in ("adapter/adapter_model.safetensors", "best/adapter_model.safetensors", "state/state.safetensors"):
        found, expected = load_file(run / name), load_file(whole / name)
        assert found.keys() == expected.keys()
        for key in expected:
            assert found[key].equal(expected[key]), f"{name}: {key}"
    assert [without_timing(r) for r in read_metrics(run)] == [without_timing(r) for r in read_metrics(whole)]
    cards = [json.loads((folder / "card.json").read_text()) for folder in (run, whole)]
    assert cards[0]["adapter"] == cards[1]["adapter"]
    assert cards[0]["ledger_notes"] == cards[1]["ledger_notes"]
    ledgers = [read_ledger(folder) for folder in (run, whole)]
    assert ledgers[0] is not None and ledgers[1] is not None
    assert np.array_equal(ledgers[0].steps, ledgers[1].steps)
    assert np.array_equal(ledgers[0].values, ledgers[1].values)
    assert read_samples(run) == read_samples(whole) != []


def without_timing(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMING}


@pytest.mark.slow
@pytest.mark.parametrize("line", ["step 0/", "step 1/", "step 3/", "step 6/", "step 9/"])
def test_a_killed_run_resumes_to_the_same_result(line: str, place: Path, named: list[str], whole: Path) -> None:
    run = place / f"killed-{line[5]}"
    process = run_until(train(*named, "--out", str(run)), line)
    process.kill()
    process.communicate()
    assert not (run / "card.json").exists()
    (run / "state").mkdir(exist_ok=True)
    (run / "state" / "state.safetensors.partial").write_bytes(b"half a state")  # what a kill while saving leaves
    subprocess.run(
        train("--resume", str(run), "--read-ahead", "5"), check=True, capture_output=True, env=single_thread()
    )
    assert_same(run, whole)


@pytest.mark.slow
def test_a_killed_run_over_four_bits_with_moments_in_eight_resumes_to_the_same_result(
    place: Path, named: list[str]
) -> None:
    flags = [*named, "--base", "nf4", "--optimizer", "adamw8bit", "--micro-batch-tokens", "40"]
    whole, run = place / "whole-nf4", place / "killed-nf4"
    subprocess.run(train(*flags, "--out", str(whole)), check=True, capture_output=True, env=single_thread())
    process = run_until(train(*flags, "--out", str(run)), "step 5/")
    process.kill()
    process.communicate()
    again = train("--resume", str(run), "--checkpoint-layers", "1")  # another memory, the same bits
    subprocess.run(again, check=True, capture_output=True, env=single_thread())
    assert_same(run, whole)


@pytest.mark.slow
def test_a_killed_run_that_commits_faults_resumes_to_the_same_result(place: Path, named: list[str]) -> None:
    flags = [
        *named,
        "--steps",
        "13",
        "--commit",
        "by-length,masked-end,double-start,no-template",
    ]  # into a second epoch
    whole, run = place / "whole-faults", place / "killed-faults"
    done = subprocess.run(
        train(*flags, "--out", str(whole)), check=True, capture_output=True, text=True, env=single_thread()
    )
    assert "faults committed on purpose: by-length (batches ordered by length), masked-end" in done.stdout
    process = run_until(train(*flags, "--out", str(run)), "step 5/")
    process.kill()
    process.communicate()
    subprocess.run(train("--resume", str(run)), check=True, capture_output=True, env=single_thread())
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(
    number: signal.Signals, place: Path, named: list[str], whole: Path
) -> None:
    run = place / f"interrupted-{number.name}"
    process = run_until(train(*named, "--out", str(run)), "step 1/")
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[-1].endswith(f"everything is saved; go on with: lamina train --resume {run}")
    subprocess.run(train("--resume", str(run)), check=True, capture_output=True, env=single_thread())
    assert_same(run, whole)


@pytest.mark.slow
def test_two_processes_in_one_folder_are_refused(
    place: Path, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "shared"
    process = run_until(train(*named, "--steps", "1000000", "--out", str(run)), "step 0/")  # longer than the test
    try:
        assert cli.main(["train", "--resume", str(run)]) == 2
    finally:
        process.kill()
        process.communicate()
    assert "another process is training in this folder" in capsys.readouterr().err
    assert cli.main(["train", *named, "--out", str(run)]) == 2
    assert f"is not empty; to go on with the run in it: lamina train --resume {run}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_or_none(
    place: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--resume", str(whole), "--learning-rate", "1e-3"]) == 2
    assert (
        "found --learning-rate with --resume, expected only --model, --revision, --data, --data-revision, --eval-data, "
        "--read-ahead, --checkpoint-layers, --offload-checkpoints, " in capsys.readouterr().err
    )

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    job = (run / "job.toml").read_text()
    more = place / "more.jsonl"
    more.write_text((place / "train.jsonl").read_text() + '\n{"prompt": "new", "completion": "row"}\n')
    (run / "job.toml").write_text(job.replace("train.jsonl", "more.jsonl"))
    assert cli.main(["train", "--resume", str(run)]) == 2
    assert "are not those this run was trained with" in capsys.readouterr().err

    (run / "job.toml").write_text(job)
    state = run / "state" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    assert cli.main(["train", "--resume", str(run)]) == 2
    assert "state.safetensors: damaged" in capsys.readouterr().err

    (run / "job.toml").write_text(job.replace("version = 1", "version = 99"))
    assert cli.main(["train", "--resume", str(run)]) == 2
    assert "written by a newer version" in capsys.readouterr().err

    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert "found no job.toml, expected the folder of a run" in capsys.readouterr().err
