"""What a replay runs: read off the two files of a job, scaled to another width, each variant with a single fault."""

from dataclasses import fields
from typing import Any

import pytest

from lamina.errors import ConfigError
from lamina.job import SECTIONS, Job
from lamina.jobfile import Head
from lamina.settings import Layer
from lamina.training.optimizer import rule_of_thumb
from lamina.variants import Variant, pair, variants


def flags(**given: dict[str, Any]) -> Layer:
    values = {section: given.get(section or "head", {}) for section in {"": Head, **SECTIONS}}
    return Layer(values, lambda setting: setting.flag)


def every(letter: str, **given: dict[str, Any]) -> dict[str, Variant]:
    return {variant.name: variant for variant in variants(letter, *pair(letter, flags(**given)))}


def changed(one: Job, other: Job) -> set[str]:
    """The settings in which two jobs differ."""
    return {
        f"{name}.{f.name}"
        for name, section in one.sections().items()
        for f in fields(section)
        if getattr(section, f.name) != getattr(other.sections()[name], f.name)
    }


COMMON = {"mended", "other-seed", "faithful", "masked-end", "by-length", "loss-on-everything", "q-v-only", "low-scale"}
TOLD = {"half-precision", "unused-checkpointing", "no-held-out"}


@pytest.mark.parametrize(
    ("letter", "others"),
    [
        ("A", {"double-start", "cut-length"}),
        ("B", {"low-rate", "rate-as-written"}),
        ("C", {"double-start", "cut-length", "low-rate", "rate-as-written", "no-template", "unknown-task"}),
    ],
)
def test_the_faults_of_a_job_are_those_of_its_files(letter: str, others: set[str]) -> None:
    assert every(letter).keys() == COMMON | TOLD | {"other-merge-base"} | others


def test_a_variant_is_the_mended_job_with_a_single_fault() -> None:
    found = every("C")
    mended = found["mended"].job
    assert mended is not None
    settings = {
        "other-seed": {".seed"},
        "masked-end": {"faults.commit"},
        "double-start": {"faults.commit"},
        "by-length": {"faults.commit"},
        "no-template": {"faults.commit"},
        "loss-on-everything": {"data.train_on"},
        "q-v-only": {"adapter.targets"},
        "low-rate": {"train.learning_rate"},
        "rate-as-written": {"train.learning_rate"},
        "low-scale": {"adapter.alpha"},
        "cut-length": {"data.max_length", "data.long"},
    }
    for name, differing in settings.items():
        job = found[name].job
        assert job is not None and changed(mended, job) == differing, name
    scale = found["low-scale"].job
    assert scale is not None and scale.adapter.alpha / scale.adapter.rank == 0.25
    assert {name for name, variant in found.items() if variant.kind == "told"} == TOLD | {"unknown-task"}
    assert all(bool(variant.reason) == (variant.kind == "told") for variant in found.values())
    assert (found["no-template"].kind, found["other-merge-base"].kind) == ("asked", "merged")


def test_the_faithful_variant_has_all_faults_and_shares_base_and_rows() -> None:
    found = every("C")
    mended, faithful = found["mended"].job, found["faithful"].job
    assert mended is not None and faithful is not None
    assert (faithful.model, faithful.data.data, faithful.data.eval_data) == (
        mended.model,
        mended.data.data,
        mended.data.eval_data,
    )
    assert {"masked-end", "double-start", "by-length"} <= set(faithful.faults.commit)
    assert "no-template" not in faithful.faults.commit  # its held-out rows are asked as all others are
    assert (faithful.adapter.rank, faithful.adapter.targets, faithful.train.clip) == (64, ("q_proj", "v_proj"), 0.3)


def test_what_a_setting_means_is_kept_at_another_width() -> None:
    _, faithful = pair("C", flags())
    width, reference = rule_of_thumb(192, "llama"), rule_of_thumb(4096, "llama")
    assert faithful.train.learning_rate == pytest.approx(1e-5 / reference * width, rel=5e-3)  # three digits
    assert faithful.data.max_length == 64
    _, faithful = pair("A", flags(data={"max_length": 96}))
    assert faithful.data.max_length == 48
    _, faithful = pair("A", flags(adapter={"rank": 8}))
    assert (faithful.adapter.rank, faithful.adapter.alpha) == (8, 2.0)


def test_flags_hold_for_every_variant() -> None:
    found = every("C", train={"learning_rate": 1e-3, "steps": 7}, model={"base": None})
    assert "low-rate" not in found
    assert all(variant.job.train.learning_rate == 1e-3 for variant in found.values() if variant.job)
    assert all(variant.job.train.steps == 7 for variant in found.values() if variant.job)


def test_a_base_kept_as_numbers_has_no_other_to_merge_into() -> None:
    variant = every("A", model={"model": "lamina:demo/base", "base": None}, data={"max_length": 64})["other-merge-base"]
    assert variant.kind == "told" and "plain numbers" in variant.reason


def test_own_data_brings_its_own_held_out_rows() -> None:
    mended, _ = pair("A", flags(data={"data": "mine.jsonl"}))
    assert (mended.data.data, mended.data.eval_data, mended.data.eval_fraction) == ("mine.jsonl", None, 0.05)
    assert mended.model.model == "lamina:demo/base"


def test_a_letter_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"found job 'D', which is unknown \(known: A, B, C\)"):
        pair("D", flags())
