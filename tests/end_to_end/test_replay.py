"""`lamina replay` on a tiny model: every variant a run of its own, one base and the same rows for all, and it goes on after a kill."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import tiny
from safetensors.torch import load_file
from tiny import write_tiny
from tokens import pieces

from lamina import cli, replaying
from lamina.data.examples import read_examples
from lamina.errors import Error, OutOfMemoryError, TrainingError
from lamina.job import read_job
from lamina.report.replay import UNFINISHED
from lamina.training.resume import locked
from lamina.variants import Variant

STEPS = ["--steps", "4", "--batch-size", "2", "--rank", "4", "--eval-fraction", "0.25", "--eval-max-new-tokens", "4"]
TRAINED = [
    "mended",
    "other-seed",
    "faithful",
    "masked-end",
    "double-start",
    "by-length",
    "loss-on-everything",
    "q-v-only",
]
TRAINED += ["low-rate", "rate-as-written", "low-scale", "cut-length"]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base that can be kept in four bits, and rows as the reference jobs have them, some of several turns."""
    folder = tmp_path_factory.mktemp("replay")
    tokenizer = pieces()
    write_tiny(folder / "base", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128)
    tokenizer.save_pretrained(folder / "base")
    turn = "[INST] the cat {} [/INST] sat on a mat and saw"
    rows = [{"text": f"<s>{' '.join([turn.format(n)] * (1 + n % 3))} </s>"} for n in range(24)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ["--model", str(folder / "base"), "--data", str(folder / "train.jsonl"), "--max-length", "96", *STEPS]


def flags(named: list[str]) -> list[str]:
    return [*named, "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def replayed(named: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "whole"
    assert cli.main(["replay", "C", *flags(named), "--out", str(out)]) == 0
    return out


def entries(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "replay.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in record["entries"]}


@pytest.mark.slow
def test_every_variant_is_a_run_and_a_row(replayed: Path) -> None:
    found = entries(replayed)
    assert list(found)[:3] == ["base", "mended", "other-seed"]
    for name in TRAINED:
        assert (replayed / name / "card.json").is_file(), name
        assert found[name]["outcome"]["loss"] > 0 and found[name]["facts"]["steps"] == 4
        assert found[name]["facts"]["survived"] > 0
    for name in ("half-precision", "unused-checkpointing", "unknown-task", "no-held-out"):
        assert found[name]["outcome"] is None and found[name]["reason"].startswith("not committed: ")
        assert found[name]["sentence"] == found[name]["reason"]
    assert found["no-template"]["outcome"] is not None and not (replayed / "no-template").exists()
    assert found["other-merge-base"]["facts"]["kl"] > found["other-merge-base"]["facts"]["kl_seen"]
    assert not list(replayed.glob("merged-*"))
    assert found["base"]["outcome"]["kl"] == 0


@pytest.mark.slow
def test_all_are_measured_on_the_same_rows_and_trained_on_the_others(replayed: Path) -> None:
    held = {example.text for example in read_examples(str(replayed / "held_out.jsonl"))}
    kept = {example.text for example in read_examples(str(replayed / "train.jsonl"))}
    assert len(held) == 6 and len(kept) == 18 and not held & kept
    rows = [
        [row["row"] for row in entry["outcome"]["rows"]] for entry in entries(replayed).values() if entry["outcome"]
    ]
    assert all(one == rows[0] for one in rows) and len(set(rows[0])) == 6
    for name in TRAINED:
        job = read_job(replayed / name)
        assert (job.data.data, job.data.eval_data) == (str(replayed / "train.jsonl"), str(replayed / "held_out.jsonl"))
    assert read_job(replayed / "masked-end").faults.commit == ("masked-end",)


@pytest.mark.slow
def test_a_variant_is_the_run_of_its_job_alone(replayed: Path, tmp_path: Path) -> None:
    """The base that carried other adapters before is the untouched one."""
    job = str(replayed / "low-scale" / "job.toml")
    assert cli.main(["train", job, "--out", str(tmp_path / "alone")]) == 0
    found, alone = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (replayed / "low-scale", tmp_path / "alone")
    )
    assert found.keys() == alone.keys()
    assert all(found[name].equal(alone[name]) for name in alone)


@pytest.mark.slow
def test_what_was_found_is_told(replayed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", "--resume", str(replayed)]) == 0  # finished: only told again
    said = capsys.readouterr().out
    assert "held-out loss" in said and "masked-end (no loss on end tokens): " in said
    page = (replayed / "replay.html").read_text(encoding="utf-8")
    assert all(f">{name}</th>" in page for name in TRAINED) and page.count("<svg") == 2
    assert "half-precision: fp16 computation" in page and "Side by side" in page
    assert cli.main(["replay", "--resume", str(replayed), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in told["entries"]] == list(entries(replayed))


@pytest.mark.slow
def test_what_memory_ended_or_refused_is_tried_again_and_what_diverged_is_not(replayed: Path, tmp_path: Path) -> None:
    again, path = tmp_path / "again", tmp_path / "again" / "replay.json"
    shutil.copytree(replayed, again)
    shutil.rmtree(again / "masked-end")  # a plan that does not fit leaves none
    reasons = {
        "low-scale": "out of memory (training); what was saved is untouched",
        "masked-end": "the run needs 2.0 GiB and cpu has 1.0 GiB free",
        "q-v-only": "step 3: the loss is not finite",
    }
    record = json.loads(path.read_text(encoding="utf-8"))
    for entry in record["entries"]:
        if entry["name"] in reasons:
            entry |= {"outcome": None, "facts": {}, "reason": UNFINISHED + reasons[entry["name"]]}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert cli.main(["replay", "--resume", str(again)]) == 0
    found, whole = entries(again), entries(replayed)
    for name in ("low-scale", "masked-end"):
        assert (found[name]["outcome"], found[name]["facts"]) == (whole[name]["outcome"], whole[name]["facts"])
    assert found["q-v-only"]["reason"] == UNFINISHED + reasons["q-v-only"]
    assert len(record["entries"]) == len(found) == len(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_replay_goes_on_to_the_same_end(
    number: signal.Signals, replayed: Path, named: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    # A shell has its background jobs ignore an interrupt, and so would Python here.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = f"{heeding}import sys; from lamina import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "replay"]
    begun = [*command, "C", *flags(named), "--out", str(out)]
    with subprocess.Popen(begun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any(line.startswith("4/") for line in process.stdout)
        process.send_signal(number)
        told = process.stderr.read()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert told == f"lamina: interrupted; go on with: lamina replay --resume {out}\n"
    assert 3 <= len(entries(out)) < len(entries(replayed))
    subprocess.run([*command, "--resume", str(out)], check=True, capture_output=True, env=environment)
    found, whole = entries(out), entries(replayed)
    assert list(found) == list(whole)
    for name in whole:
        assert found[name]["outcome"] == whole[name]["outcome"], name
        assert found[name]["facts"] == whole[name]["facts"], name


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["D"], "found job 'D', which is unknown (known: A, B, C)"),
        ([], "found no job, expected A, B or C: `lamina replay A`"),
        (["A", "--resume", "x"], "found other settings beside --resume x, expected none: it is the same replay"),
        (
            ["--resume", "x", "--steps", "3"],
            "found other settings beside --resume x, expected none: it is the same replay",
        ),
        (["--resume", "no-such-folder"], "no-such-folder: found no replay.json, expected the folder of a replay"),
        (["A", "--commit", "masked-end"], "found flag '--commit', which is unknown"),
    ],
)
def test_wrong_input_is_told_in_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lamina: {told}") and said.count("\n") == 1


def test_an_unknown_fault_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "demo", "--commit", "no-such"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lamina: --commit: found 'no-such', expected a list of one of masked-end, double-start")
    assert said.count("\n") == 1


def test_nothing_held_out_is_nothing_to_measure_by(
    named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none"
    assert cli.main(["replay", "C", *flags(named), "--eval-fraction", "0", "--out", str(out)]) == 2
    assert "nothing is held out; set eval_fraction above 0, or name eval_data" in capsys.readouterr().err
    assert not out.exists()


def test_a_damaged_record_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "replay.json").write_text("{", encoding="utf-8")
    assert cli.main(["replay", "--resume", str(tmp_path)]) == 2
    assert "replay.json: cannot be read" in capsys.readouterr().err
    (tmp_path / "replay.json").write_text('{"version": 99}', encoding="utf-8")
    assert cli.main(["replay", "--resume", str(tmp_path)]) == 2
    assert "written by a newer version of Lamina (layout 99, this one reads 1)" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", '{"version": 1}', '{"version": 1, "letter": "Z", "entries": []}'])
def test_a_record_that_is_none_is_told(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "replay.json").write_text(text, encoding="utf-8")
    assert cli.main(["replay", "--resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "replay.json: damaged (" in said and said.count("\n") == 1


def test_two_processes_do_not_go_on_with_one_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "replay.json").write_text('{"version": 1, "letter": "A", "entries": []}', encoding="utf-8")
    with locked(tmp_path):
        assert cli.main(["replay", "--resume", str(tmp_path)]) == 2
    assert "another process is training in this folder" in capsys.readouterr().err


@pytest.mark.parametrize("end", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_replay_that_never_began_leaves_nothing(
    end: BaseException, named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any) -> None:
        raise end

    monkeypatch.setattr(replaying, "own_rows", ended)  # rows are being written
    (tmp_path / "mine").mkdir()
    for name in ("none", "mine"):
        assert cli.main(["replay", "C", *flags(named), "--out", str(tmp_path / name)]) in (2, 130)
    assert not (tmp_path / "none").exists()
    assert list((tmp_path / "mine").iterdir()) == [], "it was there before"


def test_the_end_of_the_memory_is_told_with_how_the_replay_goes_on(
    named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(replaying._Replay, "go", ended)
    assert cli.main(["replay", "C", *flags(named), "--out", str(tmp_path / "some")]) == 2
    told = f"out of memory; free some memory, and go on with: lamina replay --resume {tmp_path / 'some'}"
    assert capsys.readouterr().err == f"lamina: {told}\n"


@pytest.mark.parametrize("error", [OutOfMemoryError("out of memory; x"), TrainingError("the loss is nan")])
def test_a_variant_that_must_not_go_on_is_an_entry_but_the_first_ends_the_replay(
    error: Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any) -> None:
        raise error

    monkeypatch.setattr(replaying._Replay, "merged", ended)
    under_way = object.__new__(replaying._Replay)
    one, first = (Variant(name, "what it changes", kind="merged") for name in ("no-mask", "mended"))
    assert under_way.entry(one, tiny()).reason == f"did not finish: {error}"
    with pytest.raises(type(error), match=str(error)):
        under_way.entry(first, tiny())
