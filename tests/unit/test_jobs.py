"""The built-in jobs are complete, valid, and say what they differ in."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lamina import jobfile, jobs
from lamina.errors import CheckpointError
from lamina.job import SECTIONS, Job, new_folder, settings_fingerprint
from lamina.jobfile import Head
from lamina.settings import build, read_toml, settings

WHOLE = {"": Head, **SECTIONS}
FAITHFUL = ["kdnuggets-faithful", "miniguanaco-faithful", "origin-faithful"]


def job_of(name: str) -> Job:
    return Job.of(build(WHOLE, jobfile.read(jobfile.find(name), WHOLE)))


def test_there_are_the_reference_jobs_and_the_demo() -> None:
    both = [f"{name}{form}" for name in ("kdnuggets", "miniguanaco", "origin") for form in ("", "-faithful")]
    assert jobs.names() == ["demo", "guanaco-7b", *both]


@pytest.mark.parametrize("name", jobs.names())
def test_a_built_in_job_is_valid_and_bears_its_name(name: str) -> None:
    assert job_of(name).head.name == name
    assert len(jobs.summary(name)) <= 110


@pytest.mark.parametrize("name", jobs.names())
def test_a_built_in_job_names_every_setting_and_says_nothing_twice(name: str) -> None:
    text = jobs.path(f"{name}.toml").read_text(encoding="utf-8")
    section, found = "", []
    for line in text.splitlines():
        if table := re.fullmatch(r"\[(\w+)\]", line):
            section = table[1]
        elif key := re.match(r'(?:(\w+) = |# (\w+) = "none"$)', line):
            found.append((section, key[1] or key[2]))
    assert found == [("", "version"), *((s.section, s.name) for s in settings(WHOLE))]


@pytest.mark.parametrize("name", jobs.names())
def test_what_a_built_in_job_comments_out_is_the_default(name: str) -> None:
    text = jobs.path(f"{name}.toml").read_text(encoding="utf-8")
    said = tomllib.loads(re.sub(r'^# (\w+ = "none")$', r"\1", text, flags=re.MULTILINE))
    said.pop("version")
    assert Job.of(build(WHOLE, read_toml(said, WHOLE, name))) == job_of(name)


def test_the_reference_jobs_keep_their_base_in_four_bits() -> None:
    four = {name: job_of(name).model for name in jobs.names() if job_of(name).model.base == "nf4"}
    assert list(four) == [name for name in jobs.names() if name != "demo"]
    assert {name for name, model in four.items() if not model.double_quant} == set(FAITHFUL)


@pytest.mark.parametrize(
    ("name", "rate", "steps"),
    [("miniguanaco-faithful", 2e-4, None), ("kdnuggets-faithful", 1e-5, 250), ("origin-faithful", 1e-5, None)],
)
def test_a_faithful_job_is_as_published(name: str, rate: float, steps: int | None) -> None:
    job = job_of(name)
    assert (job.adapter.rank, job.adapter.alpha, job.adapter.dropout) == (64, 16.0, 0.1)
    assert job.adapter.targets == ("q_proj", "v_proj")
    assert (job.train.batch_size, job.train.epochs, job.train.steps) == (4, 1.0, steps)
    assert (job.train.learning_rate, job.train.schedule, job.train.warmup) == (rate, "cosine", 0.03)
    assert (job.train.weight_decay, job.train.clip) == (0.001, 0.3)
    assert (job.data.train_on, job.data.max_length, job.data.long, job.data.eval_fraction) == (
        "everything",
        1024,
        "truncate",
        0.0,
    )
    assert {"masked-end", "by-length", "other-merge-base"} <= set(job.faults.commit)


def test_only_the_faithful_jobs_commit_faults() -> None:
    assert {name for name in jobs.names() if job_of(name).faults.commit} == set(FAITHFUL)
    assert "no-template" in job_of("origin-faithful").faults.commit
    assert "double-start" not in job_of("kdnuggets-faithful").faults.commit  # the Alpaca template writes no <s>


def test_a_job_survives_the_way_through_its_file() -> None:
    job = job_of("demo")
    text = jobfile.dump(job.sections())
    again = build(WHOLE, read_toml({k: v for k, v in tomllib.loads(text).items() if k != "version"}, WHOLE, "job.toml"))
    assert Job.of(again) == job


@pytest.mark.parametrize(
    ("section", "changes", "same"),
    [
        ("evaluate", {"eval_samples": 3, "eval_max_new_tokens": 7, "neutral": None}, True),
        ("watch", {"samples": 0, "sample_tokens": 9, "ledger_every": 0}, True),
        ("generate", {"temperature": 0.5}, True),
        ("model", {"model": "elsewhere", "revision": "v2"}, True),  # what lies there has fingerprints of its own
        ("data", {"data": "elsewhere.jsonl", "eval_data": "held-out.jsonl", "data_revision": "v2"}, True),
        ("model", {"dtype": "bf16"}, False),
        ("watch", {"eval_every": 7}, False),  # decides which adapter is the best, and when patience ends
        ("train", {"batch_size": 5}, False),
        ("data", {"max_length": 99}, False),
    ],
)
def test_a_run_is_another_one_by_what_it_trains_and_not_by_what_is_measured_of_it(
    section: str, changes: dict[str, Any], same: bool
) -> None:
    job = job_of("demo")
    other = replace(job, **{section: replace(getattr(job, section), **changes)})
    assert (settings_fingerprint(other, ()) == settings_fingerprint(job, ())) is same


def test_the_neutral_text_is_plain_prose() -> None:
    text = jobs.path("lamina:neutral.txt").read_text(encoding="utf-8")
    assert 2000 <= len(text.split()) <= 4000
    assert text.isascii() and len(text.split("\n\n")) >= 20
    assert all(len(paragraph.split()) >= 5 for paragraph in text.split("\n\n"))


def test_a_place_that_is_taken_is_told_as_what_it_is(tmp_path: Path) -> None:
    file, full, run = tmp_path / "notes.txt", tmp_path / "full", tmp_path / "run"
    for place in (full, run):
        place.mkdir()
    for path in (file, full / "notes.txt", run / "job.toml"):
        path.touch()
    go_on = f"to go on with the run in it: lamina train --resume {run}; for a new one "
    for place, told in (
        (file, "is a file, expected a folder, new or empty; name another --out"),
        (full, "is not empty; name another --out"),
        (run, f"is not empty; {go_on}name another --out"),
    ):
        with pytest.raises(CheckpointError) as caught:
            new_folder(Head(out=str(place)))
        assert str(caught.value) == f"{place}: {told}"
