"""A run whose base or data moved goes on, is measured, answers and is merged: what lies there decides, and not where."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import write_tiny
from tokens import pieces

from lamina import cli
from lamina.job import read_job

pytestmark = pytest.mark.usefixtures("no_page", "untimed")

FLAGS = ["--dtype", "fp32", "--device", "cpu", "--rank", "2", "--steps", "2", "--batch-size", "3", "--samples", "0"]
MEASURED = ["--eval-samples", "0", "--neutral", "none"]
ROWS = [{"prompt": f"the cat {n}", "completion": "sat on a mat " * (n % 4 + 1)} for n in range(12)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def write_base(folder: Path, std: float = 1 / 8) -> Path:
    tokenizer = pieces()
    write_tiny(folder, std=std, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows, held-out rows and a finished run over them."""
    place = tmp_path_factory.mktemp("moved")
    base = write_base(place / "base")
    rows, held_out = write_rows(place / "rows.jsonl", ROWS[:9]), write_rows(place / "held-out.jsonl", ROWS[9:])
    files = ["--model", str(base), "--data", str(rows), "--eval-data", str(held_out), "--out", str(place / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.run.write_page", lambda run, say: None)
        assert cli.main(["train", *files, *FLAGS, *MEASURED]) == 0
    return place


@pytest.fixture
def moved(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, by a name relative to the current folder; everything that it names has moved."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "base", tmp_path / "base2")
    for name in ("rows", "held-out"):
        shutil.copy(trained / f"{name}.jsonl", tmp_path / f"{name}2.jsonl")
    job = (tmp_path / "run/job.toml").read_text(encoding="utf-8")
    (tmp_path / "run/job.toml").write_text(job.replace(str(trained), str(tmp_path)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return Path("run")


PLACES = ["--model", "base2", "--data", "rows2.jsonl", "--eval-data", "held-out2.jsonl"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(arguments) == 2
    return capsys.readouterr().err


def test_a_moved_run_is_resumed_at_the_places_named_and_then_without(
    moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "train", "--resume", "run")
    assert told.endswith("; if the base of run lies elsewhere now, name its place as --model\n")
    told = refused(capsys, "train", "--resume", "run", "--model", "base2")
    assert told.endswith("; if the data of run lie elsewhere now, name their place as --data or --eval-data\n")
    before = load_file(moved / "adapter/adapter_model.safetensors")
    shutil.rmtree(moved / "adapter")
    assert "(it ended before its first save, or was removed)" in refused(capsys, "eval", "run", "--model", "base2")
    assert cli.main(["train", "--resume", "run", *PLACES]) == 0
    job = read_job(moved)
    assert (job.model.model, job.data.data, job.data.eval_data) == ("base2", "rows2.jsonl", "held-out2.jsonl")
    after = load_file(moved / "adapter/adapter_model.safetensors")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert json.loads((moved / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "base2"
    assert cli.main(["train", "--resume", "run"]) == 0


@pytest.mark.parametrize(
    ("flag", "told"), [("--model", "base model"), ("--data", "training rows"), ("--eval-data", "held-out rows")]
)
def test_what_lies_at_the_new_place_must_be_what_was_there(
    flag: str, told: str, moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(Path("other"), std=1 / 4)
    write_rows(Path("other.jsonl"), [{"prompt": "the cat", "completion": "was a mat"}] * 3)
    places = [*PLACES, flag, "other" if flag == "--model" else "other.jsonl"]
    kept = (moved / "job.toml").read_text()
    assert f"run: the {told} are not those this run was trained with" in refused(
        capsys, "train", "--resume", "run", *places
    )
    assert (moved / "job.toml").read_text() == kept, "a wrong place is not kept"
    assert cli.main(["train", "--resume", "run", *PLACES]) == 0


def test_places_edited_in_the_job_serve_as_well(moved: Path) -> None:
    job = (moved / "job.toml").read_text(encoding="utf-8")
    for old, new in (('/base"', '/base2"'), ("/rows.jsonl", "/rows2.jsonl"), ("/held-out.jsonl", "/held-out2.jsonl")):
        assert old in job
        job = job.replace(old, new)
    (moved / "job.toml").write_text(job, encoding="utf-8")
    assert cli.main(["eval", "run", *MEASURED]) == 0
    assert cli.main(["train", "--resume", "run"]) == 0


def test_a_moved_run_answers_is_measured_and_merged(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("the cat 1\n", encoding="utf-8")
    generate = ["generate", "run", "--prompts", "prompts.txt", "--max-new-tokens", "2"]
    for command in (generate, ["eval", "run"], ["chat", "run"], ["merge", "run", "--out", "merged"]):
        assert refused(capsys, *command).endswith("name its place as --model\n")
    assert refused(capsys, "explain", "run").endswith("name its place as --base\n")
    assert cli.main([*generate, "--model", "base2"]) == 0
    assert cli.main(["merge", "run", "--out", "merged", "--model", "base2"]) == 0
    advice = "if the data of run lie elsewhere now, name their place as data or eval_data in run/job.toml"
    assert advice in capsys.readouterr().out
    assert advice in refused(capsys, "eval", "run", "--model", "base2")
    write_base(Path("other"), std=1 / 4)
    assert "was trained on another base" in refused(capsys, *generate, "--model", "other")
    assert "was trained on another base" in refused(capsys, "merge", "run", "--out", "merged2", "--model", "other")


def test_a_bare_adapter_answers_over_the_base_that_is_named(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("the cat 1\n", encoding="utf-8")
    flags = ["--prompts", "prompts.txt", "--max-new-tokens", "2"]
    assert "holds an adapter, not a model; name its base as --model" in refused(
        capsys, "generate", "run/adapter", *flags
    )
    assert cli.main(["generate", "run/adapter", *flags, "--model", "base2"]) == 0
    bare = capsys.readouterr().out
    assert cli.main(["generate", "run", *flags, "--model", "base2"]) == 0
    assert capsys.readouterr().out == bare
    told = "base2: is neither a run nor an adapter, so it has no base to name as --model; leave --model out"
    assert told in refused(capsys, "generate", "base2", *flags, "--model", "base2")
