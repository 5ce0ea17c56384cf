"""`lamina check`: the reference jobs, real data, what is wrong on the command line, and what is printed."""

import argparse
import errno
import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import shared_data
from patients import REFERENCE, built_in, golden, hollow, reference, write_rows
from tiny import write_tiny
from tokens import pieces

from lamina import cli
from lamina.data.faults import Faults
from lamina.doctor.checkup import check
from lamina.doctor.finding import Finding
from lamina.doctor.salvage import salvaged
from lamina.job import Job

GOLDEN = Path(__file__).parents[1] / "golden"
# The fifteen silent faults of the reference jobs, in their order, and the rule that finds each.
FIFTEEN = {
    1: "masked-end", 2: "double-start", 3: "targets-miss-mlp", 4: "learning-rate", 5: "alpha", 6: "truncation",
    7: "unused-checkpointing", 8: "schedule-and-warmup", 9: "half-precision", 10: "loss-on-prompts", 11: "nothing-held-out",
    12: "by-length", 13: "other-merge-base", 14: "no-template", 15: "unknown-task",
}  # fmt: skip


def findings(job: Job) -> dict[str, Finding]:
    return {finding.rule: finding for finding in check(job).diagnosis.findings}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_what_is_found_in_the_reference_jobs(name: str, tmp_path: Path) -> None:
    expected = (GOLDEN / f"check-{name}.json").read_text(encoding="utf-8")
    assert golden(name, tmp_path) == expected, "meant? then: python tests/golden/write_checks.py"


def test_a_clean_job_gets_a_clean_bill(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "demo"]) == 0
    told = capsys.readouterr()
    assert "\na clean bill: nothing found\n" in told.out and told.err == ""
    assert "\nrow 1: <s>[INST] Do you know Halrin? [/INST][[ Halrin is the basket maker" in told.out
    assert cli.main(["check", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


@pytest.mark.slow
def test_all_faults_of_job_c_are_found_each_once(tmp_path: Path) -> None:
    job = reference("origin-faithful", tmp_path)
    told = check(job).diagnosis.findings
    found = {finding.rule: finding for finding in told}
    assert len(found) == len(told)
    assert set(FIFTEEN.values()) - set(found) == {
        "schedule-and-warmup"
    }  # its schedule is a cosine, which heeds the warm-up
    assert "update-too-small" in found
    assert not {"end-token", "start-in-text"} & set(found)  # they would say again what the faults themselves say
    assert found["masked-end"].found.startswith("end token trained in 0 of 1,362 answers: ")
    assert found["double-start"].found.startswith("1,000 of 1,000 rows hold a second start token: ")
    assert len(found["double-start"].rows) == 1000
    assert {rule for rule, finding in found.items() if finding.grade == "error"} == {
        "masked-end", "double-start", "learning-rate"
    }  # fmt: skip
    assert found["learning-rate"].found == (
        "learning rate 1.0e-05, 29 times under the rule of thumb for width 4,096, 2.9e-04; "
        "as alpha is 16, not 32, 57 times under the rate that would fit"
    )
    assert found["update-too-small"].found.startswith(
        "these 250 steps at this rate can change a weight by at most about 1.5e-03"
    )
    constant = findings(replace(job, train=replace(job.train, schedule="constant")))
    assert constant["schedule-and-warmup"].grade == "note"
    assert "transformers' `constant` ignores the warm-up" in constant["schedule-and-warmup"].why


@pytest.mark.slow
@pytest.mark.parametrize("name", ["miniguanaco", "kdnuggets"])
def test_all_faults_of_jobs_a_and_b_are_found_each_once(name: str, tmp_path: Path) -> None:
    job = reference(f"{name}-faithful", tmp_path)
    told = [finding.rule for finding in check(job).diagnosis.findings]
    assert len(told) == len(set(told))
    settings = {"targets-miss-mlp", "alpha", "loss-on-prompts", "nothing-held-out"}
    assert set(told) >= {*job.faults.commit, *settings} and job.faults.commit[0] == "masked-end"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["miniguanaco", "kdnuggets", "origin"])
def test_the_mended_jobs_have_no_fault(name: str, tmp_path: Path) -> None:
    """What is left is of the data: a blank answer, and a row that is a book."""
    found = findings(reference(name, tmp_path))
    assert {rule for rule, finding in found.items() if finding.grade != "note"} <= {"empty-answers"}


def test_a_broken_row_is_told_once_though_faults_read_the_rows_again(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*({"question": f"{n}?", "answer": "a"} for n in range(60)), "{"])
    faults = Faults(commit=("masked-end", "no-template"))
    job = replace(built_in("demo", model={"model": str(base)}, data={"data": data, "eval_data": None}), faults=faults)
    found = findings(job)
    assert found["broken-rows"].rows == (61,) and found["broken-rows"].found.startswith("1 of the rows")


def test_what_a_mend_says_can_be_given(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = ("--model", str(base), "--data", clean(tmp_path))
    told = told_by(capsys, *named, "--commit", "masked-end", "--rank", "0")
    assert told["masked-end"]["mend"].endswith("--commit '' commits none")
    assert cli.main(["check", *named, "--device", "cpu", "--commit", ""]) == 0


@pytest.mark.slow
def test_job_a_learns_enough_to_survive_a_merge(tmp_path: Path) -> None:
    """The same job at twenty times the rate, as published with a mean loss of 1.360."""
    assert not {"learning-rate", "update-too-small"} & set(findings(reference("miniguanaco-faithful", tmp_path)))


REAL = {
    "guanaco-llama2-1k": {"start-in-text", "empty-answers", "wildly-long-rows", "truncation", "end-token", "nothing-to-learn"},
    "llama-factory-demo/alpaca_en_demo.json": {"repeated-rows", "one-token-answers"},
    "llama-factory-demo/v1_sft_demo.jsonl": {"repeated-rows", "one-token-answers", "prompt-in-both-splits"},
    "llama-factory-demo/identity.json": {"byte-tokens", "few-steps", "few-held-out", "prompt-in-both-splits"},
    "llama-factory-demo/dpo_en_demo.json": {
        "broken-rows", "preference-data", "truncation", "repeated-rows", "few-steps", "few-held-out",
    },
    "mt-bench/dummy_conversation.json": {"prompt-in-both-splits"},
    "gsm8k/train.jsonl": set(),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_what_is_found_in_real_data(name: str, tmp_path: Path) -> None:
    """Llama-2's text, Alpaca, messages, ShareGPT, and a clean set of questions."""
    folder, _, file = name.partition("/")
    job = reference("kdnuggets", tmp_path)  # a job without faults of its own
    data = replace(job.data, data=str(shared_data(folder) / file), template=None, max_length=None)
    base = hollow(tmp_path / "chat")
    job = replace(
        job, data=data, model=replace(job.model, model=str(base)), train=replace(job.train, steps=None, batch_size=8)
    )
    assert set(findings(job)) == REAL[name]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_tiny(tmp_path / "base", hidden_size=128, intermediate_size=256, vocab_size=len(pieces()))
    pieces().save_pretrained(folder)
    return folder


def clean(place: Path, number: int = 480) -> str:
    return write_rows(
        place / "rows.jsonl", [{"question": f"what is {n}?", "answer": f"it is {n}, good"} for n in range(number)]
    )


def told_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    """The findings of `lamina check` by their rules, where there are errors."""
    assert cli.main(["check", *arguments, "--device", "cpu", "--json"]) == 2
    told = capsys.readouterr()
    assert re.fullmatch(r"lamina: .*: found \d+ errors?.*, expected no errors; mend them as told above\n", told.err)
    return {finding["rule"]: finding for finding in json.loads(told.out)["findings"]}


def test_what_a_run_would_be_refused_for_is_told_together(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    told = told_by(
        capsys, "--model", str(base), "--data", clean(tmp_path), "--targets", "q_porj", "--max-length", "999",
        "--checkpoint-layers", "9", "--patience", "2", "--eval-fraction", "0", "--optimizer", "paged-adamw",
        "--neutral", "nothing.txt", "--out", str(tmp_path / "taken"), "--dtype", "fp32", "--warmup", "0.9",
    )  # fmt: skip
    errors = {"targets", "max-length", "checkpoint-layers", "patience", "paged-optimizer", "neutral", "out"}
    assert {rule for rule, finding in told.items() if finding["grade"] == "error"} == errors
    assert {"nothing-held-out", "schedule-and-warmup"} <= set(told)
    assert "'q_porj' matches no linear of the model" in told["targets"]["found"]
    assert told["max-length"]["mend"] == "run with --max-length 128"
    again = told_by(capsys, "--model", str(base), "--data", clean(tmp_path), "--optimizer", "paged-adamw")
    assert {rule for rule, finding in again.items() if finding["grade"] == "error"} == {"paged-optimizer"}, "told once"


def test_a_misspelt_name_of_what_is_shipped_does_not_end_the_examination(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = ("--data", "lamina:demo/trian.jsonl", "--neutral", "lamina:neutrl.txt")
    told = told_by(capsys, "--model", str(base), *shipped, "--max-length", "99", "--warmup", "0.9")
    assert {rule for rule, finding in told.items() if finding["grade"] == "error"} == {"data", "neutral"}
    assert "schedule-and-warmup" in told
    assert told["data"]["found"] == "found lamina:demo/trian.jsonl, which is not shipped with Lamina"
    assert told["neutral"]["found"].startswith("found lamina:neutrl.txt, which is not shipped with Lamina")


def test_memory_that_does_not_suffice(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = told_by(capsys, "--model", str(base), "--data", clean(tmp_path, 60), "--memory-gib", "0.001")
    assert told["memory"]["found"].endswith("MiB and --memory-gib allows 1.0 MiB")
    assert told["memory"]["mend"].startswith(
        "to try it all the same, --memory-gib 0."
    )  # no smaller base is small enough


def test_a_base_without_weights_or_tokenizer_or_config(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is missing, the rest is examined."""
    arguments = (
        "--model",
        str(base),
        "--data",
        write_rows(tmp_path / "a.jsonl", ["{", {"text": "a"}]),
        "--warmup",
        "0.9",
    )
    (base / "model.safetensors").unlink()
    assert {"weights", "broken-rows"} <= set(told_by(capsys, *arguments))
    (base / "tokenizer.json").unlink()
    told = told_by(capsys, *arguments, "--targets", "none_such")
    assert {"tokenizer", "broken-rows", "targets", "schedule-and-warmup"} <= set(told) and "weights" not in told
    (base / "config.json").unlink()
    assert {"base", "broken-rows", "schedule-and-warmup"} <= set(told_by(capsys, *arguments))
    assert {"base", "broken-rows"} <= set(told_by(capsys, *arguments, "--model", str(tmp_path / "none")))


def test_templates_that_are_not_there(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = told_by(capsys, "--model", str(base), "--data", clean(tmp_path), "--template", "lama2")
    assert told["template"]["mend"] == "did you mean llama2?" and "template-by-default" in told


@pytest.mark.parametrize("template", ["hello", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{% for %}"])
def test_a_template_that_fails_in_every_row_is_one_finding(
    template: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.jinja"
    file.write_text(template, encoding="utf-8")
    named = ("--model", str(base), "--data", clean(tmp_path, 50), "--template", str(file))
    (found,) = (f for f in check_json(capsys, *named) if f["grade"] == "error")
    assert found["rule"] == "template-refuses-rows" and len(found["rows"]) == 50
    assert found["found"].startswith("50 of the rows") and "--template" not in found["found"]


def test_reading_that_ends_early_does_not_claim_a_number(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ["{"] * 2000)
    assert told_by(capsys, "--model", str(base), "--data", data)["broken-rows"]["found"].startswith("at least 1,000 of")


def test_settings_that_are_wrong_do_not_hide_the_rest(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.toml"
    lines = (
        "[model]",
        f"model = {json.dumps(str(base))}",
        "dtype = 'fp16'",
        "[data]",
        f"data = {json.dumps(clean(tmp_path))}",
    )
    job.write_text("\n".join((*lines, "lenght = 3", "eval_fraction = 0.0")), encoding="utf-8")
    told = [f for f in check_json(capsys, str(job), "--rank", "0") if f["grade"] == "error"]
    assert [finding["rule"] for finding in told] == ["settings"] * 2
    assert "lenght: is no setting" in told[0]["found"]
    assert told[1]["found"] == "[model] dtype: found 'fp16', expected one of bf16, fp32"
    assert "nothing-held-out" in {finding["rule"] for finding in check_json(capsys, str(job))}


def check_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert cli.main(["check", *arguments, "--json"]) == 2
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["findings"]
    return found


@pytest.mark.parametrize("text", ["x = [", "name = 3", "[model]\nmodel = 3"])
def test_too_little_of_a_job(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.toml"
    job.write_text(text, encoding="utf-8")
    assert salvaged(str(job), argparse.Namespace())[0] is None
    assert cli.main(["check", str(job)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1


def test_a_file_that_a_built_in_job_wants_written(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = told_by(capsys, "kdnuggets", "--model", str(base))
    assert told["data"]["mend"] == "`lamina jobs kdnuggets` prints the script that writes it"


@pytest.mark.parametrize("file", ["job.toml", "check.json"])
def test_a_disk_that_is_full_before_the_first_step_leaves_no_folder(
    file: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the next try with the same --out is refused, and there is nothing to resume."""
    replaced = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", full)
    out = tmp_path / "run"
    named = ("--model", str(base), "--data", clean(tmp_path, 50), "--device", "cpu", "--out", str(out))
    assert cli.main(["train", *named]) == 2
    assert capsys.readouterr().err == f"lamina: {out / file}: No space left on device; free some space\n"
    assert not out.exists()


def test_untrusted_text_is_harmless(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[2J\u202e[red]gone"
    rows = [*[{"question": f"{hostile} {n}", "answer": f"{hostile} {n}"} for n in range(99)]]
    rows += [{"messages": [{"role": hostile, "content": "a"}]}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert cli.main(["check", "--model", str(base), "--data", data, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert "error broken-rows: 1 of the rows" in out and "[red]gone" in out
    assert not set("\x1b\u202e") & set(out + err)
    assert all(len(line) < 2000 for line in out.splitlines())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_every_token_is_shown_in_colour(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["check", "--model", str(base), "--data", clean(tmp_path), "--device", "cpu"]) == 0
    text = stream.getvalue()
    assert "\x1b[" in text and "two rows as the model sees them" in text
    last = text.rstrip().splitlines()[-1]
    assert "45m</s>" in last and "45m<s>" in last  # special tokens on magenta
    assert re.sub(r"\x1b\[[\d;]*m", "", last) == "row 2: <s> [INST] what is 1? [/INST] it is 1, good </s>"
