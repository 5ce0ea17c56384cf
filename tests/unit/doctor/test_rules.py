"""Single rules on cases made by hand: what they find, and where they are silent."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from models import config
from tokens import byte_level, pieces

from lamina import settings
from lamina.adapter import LoRA
from lamina.data.examples import DataSettings
from lamina.data.faults import Fault, Faults
from lamina.data.lengths import Lengths
from lamina.data.report import DataReport
from lamina.data.templates import chat_format
from lamina.doctor import rules
from lamina.doctor.case import Case, Counts
from lamina.doctor.finding import Diagnosis, Finding
from lamina.job import SECTIONS, Job, Watching
from lamina.jobfile import Head
from lamina.model.architecture import Architecture, read_architecture
from lamina.model.weights import ModelSettings
from lamina.training.loop import Training
from lamina.training.plan import ranks_of

SEVEN_B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 32,
}  # fmt: skip
REPORT = DataReport(
    "rows.jsonl", "of the tokenizer", "truncate", 2048, "answers", rows=1000, forms={"messages": 1000}, tokens=100_000,
    targets=60_000, answers=1000, ended=1000, train_rows=950, held_out_rows=50, held_out_whole=50,
)  # fmt: skip
COUNTS = Counts(tokens=95_000, learnt=57_000)


def architecture(**changes: Any) -> Architecture:
    return read_architecture(config(**SEVEN_B | changes), "config.json")


def case(report: DataReport = REPORT, counts: Counts = COUNTS, **parts: Any) -> Case:
    """A case without a fault; ``parts`` are sections of its job."""
    sections = {"model": ModelSettings(model="m", device="cpu"), "data": DataSettings(data="rows.jsonl")}
    job = Job(**sections | parts)
    a = architecture()
    ranks = ranks_of(a, job.adapter)
    return Case(job, a, report=report, counts=counts, ranks=ranks, merged=torch.bfloat16)


def told(of: Case) -> dict[str, Finding]:
    return {finding.rule: finding for finding in rules.findings(of)}


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert told(case()) == {}


def model(**changes: Any) -> dict[str, Any]:
    return {"model": ModelSettings(model="m", **{"device": "cpu"} | changes)}


def train(**changes: Any) -> dict[str, Any]:
    return {"train": Training(**changes)}


FOUND: Mapping[str, tuple[str, dict[str, Any], str]] = MappingProxyType(
    {
        "too low a rate": ("learning-rate", train(learning_rate=5e-5), "6 times under the rule of thumb for width 4,096"),
        "too high a rate": ("learning-rate", train(learning_rate=5e-3), "18 times over the rule of thumb"),
        "a rate that alpha makes low": (
            "learning-rate", train(learning_rate=1e-4) | {"adapter": LoRA(alpha=8.0)}, "as alpha is 8, not 32, 11 times under"
        ),
        "a scale of a quarter": ("alpha", {"adapter": LoRA(rank=64, alpha=16.0)} | train(learning_rate=3e-4), "alpha/rank = 0.25"),
        "an alpha the default rate is not meant for": ("alpha", {"adapter": LoRA(rank=4, alpha=8.0)}, "alpha 8 at rank 4"),
        "rank-stabilised scaling at a high rank": ("alpha", {"adapter": LoRA(rank=64, rslora=True)}, "alpha 256 at rank 64"),
        "only attention": ("targets-miss-mlp", {"adapter": LoRA(targets=("q_proj", "k_proj"))}, "q_proj, k_proj alone"),
        "an update below bf16's rounding": (
            "update-too-small", train(learning_rate=2e-6), "change a weight by at most about 5.6e-04 of itself"
        ),
        "a warm-up over half of the run": ("schedule-and-warmup", train(warmup=0.6), "the rate rises over 60% of the steps"),
        "a warm-up over all of it": ("schedule-and-warmup", train(warmup=1.0), "has no step left"),
        "constant, and a warm-up": ("schedule-and-warmup", train(schedule="constant"), "a warm-up of 3%"),
        "few steps": ("few-steps", train(batch_size=64), "15 steps of 64 examples over 950 rows"),
        "many epochs": ("many-epochs", train(epochs=9.0), "9 passes over 950 rows"),
        "many epochs in steps": ("many-epochs", train(steps=1000), "8.42 passes over 950 rows"),
        "rows that are never seen": ("rows-never-seen", train(steps=50), "400 of 950 rows"),
        "a large batch": ("large-batch", train(batch_size=256, epochs=5.0), "256 examples a step"),
        "a paged optimiser on a CPU": ("paged-optimizer", train(optimizer="paged-adamw8bit"), "paged-adamw8bit on a CPU"),
        "offloading on a CPU": ("unused-checkpointing", train(offload_checkpoints=True), "in the host's memory already"),
        "fp4": ("base-fp4", model(base="fp4"), "kept in fp4"),
        "int8": ("approximate-base", model(base="int8"), "int8, which rounds the activations too"),
        "fp8 on a CPU": ("approximate-base", model(base="fp8"), "on a CPU it is emulated"),
        "fp32 over four bits": ("fp32-over-four-bits", model(base="nf4", dtype="fp32"), "computed with in fp32"),
        "nothing held out": ("nothing-held-out", {"data": DataSettings(data="d", eval_fraction=0.0)}, "no rows are held out"),
    }
)  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_a_setting_makes_found(name: str) -> None:
    rule, parts, words = FOUND[name]
    found = told(case(**parts))
    assert words in found[rule].found


def test_rates_within_a_factor_of_the_rule_are_left_alone() -> None:
    for rate in (1e-4, 2.9e-4, 1e-3):
        assert told(case(**train(learning_rate=rate))) == {}
    assert told(case(**train(learning_rate=2e-4), adapter=LoRA(rank=128, alpha=32.0))) == {}  # alpha 32 at any rank


def test_a_far_rate_is_an_error_and_a_near_one_a_warning() -> None:
    grades = [told(case(**train(learning_rate=rate)))["learning-rate"].grade for rate in (5e-5, 1e-5, 2e-3, 1e-2)]
    assert grades == ["warning", "error", "warning", "error"]


def test_short_runs_want_a_higher_rate() -> None:
    assert "learning-rate" in told(case(**train(learning_rate=8e-5, steps=60)))
    assert "learning-rate" not in told(case(**train(learning_rate=8e-5, steps=120)))


def test_an_update_is_judged_in_the_dtype_that_a_merge_writes() -> None:
    """In bf16 and fp16 by bf16's step, for both are served in it, as fp32 is where the run computes in bf16; otherwise fp32 by its own; not
    where the files cannot be read."""
    weak = case(**train(learning_rate=2e-6))  # an update of 5.6e-4
    bf16, fp16 = (told(replace(weak, merged=own))["update-too-small"] for own in (torch.bfloat16, torch.float16))
    assert bf16.found.endswith(
        "a merge into this base is written in bf16, which rounds at 2.0e-03 and keeps about 31% of such an update "
        "(assumed: weights of about 1/√width)"
    )
    assert fp16.found.endswith(
        "a merge into this base is written in fp16, which rounds at 2.4e-04 and keeps about 98% of such an update; loaded in bf16, "
        "which rounds at 2.0e-03, about 31% of it is left (assumed: weights of about 1/√width, which bf16 holds)"
    )
    assert fp16.mend == bf16.mend + "; or serve the merged model in fp16, not in bf16"
    for own in (torch.float64, None):
        assert "update-too-small" not in told(replace(weak, merged=own))
    fp32 = replace(weak, merged=torch.float32)
    assert told(fp32)["update-too-small"].mend == bf16.mend + "; or serve the merged model in fp32, not in bf16"
    wide = ModelSettings(model="m", device="cpu", dtype="fp32")
    assert "update-too-small" not in told(replace(fp32, job=replace(fp32.job, model=wide)))
    hardly = replace(case(**train(learning_rate=2e-11), model=wide), merged=torch.float32)
    assert "is written in fp32, which rounds at 3.0e-08 and" in told(hardly)["update-too-small"].found


def test_more_steps_are_offered_by_what_decides_their_number() -> None:
    """Where steps are set, a smaller batch gives no more of them."""
    by_steps = told(case(**train(steps=1, batch_size=2)))["few-steps"]
    by_epochs = told(case(**train(batch_size=64)))["few-steps"]
    assert by_steps.mend == "--steps 60"
    assert by_epochs.mend == "--batch-size 16 or --epochs 4"


def test_pieces_of_rows_are_called_examples() -> None:
    report = replace(REPORT, long="split", long_rows=1)
    assert told(case(report, **train(batch_size=64)))["few-steps"].found.endswith("over 950 examples")


def test_patience_ends_many_epochs() -> None:
    assert told(case(**train(epochs=9.0), watch=Watching(patience=2))) == {}


def test_many_passes_over_few_rows_are_not_mended_by_more_of_them() -> None:
    """Three passes over 40 rows are 15 steps: what is left is to stop in time."""
    few = told(case(replace(REPORT, rows=42, train_rows=40), **train(steps=28)))["many-epochs"]
    assert few.mend == "--patience 2, which stops when the held-out loss no longer falls"
    enough = told(case(replace(REPORT, rows=420, train_rows=400), **train(steps=280)))["many-epochs"]
    assert enough.mend == f"--steps 150, or {few.mend}"


def test_the_capacity_of_the_adapter() -> None:
    """4 layers of rank 1 on v_proj: 4·(4096 + 4096) numbers of 2 bits; 57,000 tokens of 1.4 nats are 115,000 bits."""
    small = LoRA(rank=1, targets=("v_proj",))
    assert "capacity" in told(case(adapter=small))
    finding = told(case(adapter=small))["capacity"]
    assert finding.mend == "--rank 2, or more --targets"
    assert (
        "32,768 numbers hold about 0.0655 million bits, the 57,000 tokens to be learnt say about 0.115 million"
        in finding.found
    )
    assert "capacity" not in told(case(adapter=replace(small, rank=2)))
    beyond = told(case(adapter=small, counts=replace(COUNTS, learnt=10**9)))["capacity"]
    assert beyond.mend == "--rank 4096, or more --targets; no adapter of this base holds it all", "no rank is higher"


def test_what_the_tokens_tell() -> None:
    counts = replace(
        COUNTS, byte=9000, byte_rows=(3,), unknown=2, unknown_rows=(7, 8), double_start_rows=(1,), no_start_rows=(2,)
    )
    found = told(replace(case(counts=counts), chat=chat_format(pieces())))
    assert found["unknown-tokens"].rows == (7, 8) and "<unk>" in found["unknown-tokens"].found
    assert found["byte-tokens"].found.startswith("9% of the tokens are single bytes")
    assert (found["double-start"].rows, found["no-start"].rows) == ((1,), (2,))


def test_a_template_by_default() -> None:
    """Harmless for a Llama that knows no chat, a warning for a family that has a form of its own."""
    for family, tokenizer, grade in (("llama", pieces(), "note"), ("qwen2", byte_level(), "warning")):
        of = replace(case(), chat=chat_format(tokenizer), architecture=architecture(model_type=family))
        assert told(of)["template-by-default"].grade == grade
    assert "template-by-default" not in told(
        replace(case(data=DataSettings(data="d", template="vicuna")), chat=chat_format(pieces()))
    )


def test_another_template_than_the_bases() -> None:
    tokenizer = byte_level(chat_format(byte_level(), "chatml").source)
    other = replace(case(), chat=chat_format(tokenizer, "alpaca"))
    assert "written by the template alpaca, the base brings another one" in told(other)["other-template"].found
    for same in (None, "chatml"):
        assert "other-template" not in told(replace(case(), chat=chat_format(tokenizer, same)))


def test_every_fault_of_the_job_is_told() -> None:
    found = told(case(faults=Faults(commit=get_args(Fault))))
    assert tuple(found) == get_args(Fault)
    assert found["masked-end"].grade == "error" and "leave 'masked-end' out of commit" in found["masked-end"].mend
    assert all(finding.why and finding.mend for finding in found.values())


def test_what_a_fault_did_is_told_by_the_fault_alone() -> None:
    counts = replace(COUNTS, double_start_rows=(1, 2))
    report = replace(REPORT, ended=0, concerned={"bos_held": (1, 2)})
    assert list(told(case(report, counts))) == ["end-token", "double-start", "start-in-text"]
    found = told(case(report, counts, faults=Faults(commit=("masked-end", "double-start"))))
    assert list(found) == ["masked-end", "double-start"]
    assert found["masked-end"].found.startswith("end token trained in 0 of 1,000 answers: the padding token")
    assert found["double-start"].found.startswith("2 of 1,000 rows hold a second start token: the text")
    assert found["double-start"].rows == (1, 2)


def test_long_rows_that_the_cut_makes_harmless_are_a_note() -> None:
    """Memory is planned for rows as they are trained on."""
    lengths = Lengths(rows=np.arange(9) + 1, tokens=np.array([50] * 8 + [5000]))
    grades = {
        limit: told(replace(case(replace(REPORT, max_length=limit)), lengths=lengths))["wildly-long-rows"].grade
        for limit in (1000, 1001, 8000)
    }
    assert grades == {1000: "note", 1001: "warning", 8000: "warning"}


def mended(rule: str, parts: dict[str, Any]) -> dict[str, Any] | None:
    """The sections after the flags that a finding's mend begins with; None where it begins with words."""
    parser = argparse.ArgumentParser()
    settings.add_flags(parser, {"": Head, **SECTIONS})
    of = case(**parts)
    first = re.match(r"(--[a-z0-9-]+( (?!--|or\b)[^\s;,]+)?[ ]?)+", told(of)[rule].mend)
    if first is None:
        return None
    flags = settings.read_flags(parser.parse_args(first[0].split()), SECTIONS).values
    return {name: replace(section, **flags.get(name, {})) for name, section in of.job.sections().items() if name}


@pytest.mark.parametrize("name", FOUND)
def test_the_mend_mends(name: str) -> None:
    """The flags are real, and the finding is gone with them."""
    rule, parts, _ = FOUND[name]
    after = mended(rule, parts)
    if after is None:
        assert rule in ("update-too-small",)
    else:
        assert rule not in told(case(**after)), after


def test_every_flag_in_a_mend_is_one() -> None:
    known = {setting.flag for setting in settings.settings({"": Head, **SECTIONS})}
    known |= {flag.replace("--", "--no-", 1) for flag in known}
    source = "".join(path.read_text(encoding="utf-8") for path in Path(rules.__file__).parent.glob("*.py"))
    named = set(re.findall(r"--[a-z][a-z0-9-]*", source))
    assert len(named) > 20 and named <= known


def test_an_empty_case_has_no_findings_about_data() -> None:
    """What could not be read is not judged."""
    assert told(Case(case().job)) == {}


def test_the_order_and_the_words_of_a_diagnosis() -> None:
    made = [
        Finding(name, grade, "found", "why", "mend")
        for name, grade in (("a", "note"), ("b", "error"), ("c", "warning"))
    ]
    made.append(Finding("d", "error", "found", "why", "mend", tuple(range(1, 13))))
    found = Diagnosis.of(made)
    assert [finding.rule for finding in found.findings] == ["b", "d", "c", "a"]
    assert found.summary() == "2 errors, 1 warning, 1 note"
    assert list(found.short()) == [
        "doctor: error b: found; mend",
        "doctor: error d: found (rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more); mend",
        "doctor: warning c: found; mend",
    ]
    assert found.as_json()["findings"][1] == {
        "rule": "d", "grade": "error", "found": "found", "why": "why", "mend": "mend", "rows": list(range(1, 13)),
    }  # fmt: skip
    assert Diagnosis.of([]).summary() == "a clean bill: nothing found"
