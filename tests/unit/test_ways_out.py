"""Ways out of too little memory: the cheapest for the result first, several together where one is not enough."""

from dataclasses import replace
from typing import Any

import pytest

from lamina.adapter import LoRA
from lamina.data.examples import DataSettings
from lamina.job import Job
from lamina.model.weights import ModelSettings
from lamina.run import CHANGEABLE
from lamina.training.loop import Training
from lamina.ways_out import Way, of_job, of_run, ways_out

JOB = Job(ModelSettings(model="m"), DataSettings(data="d"), LoRA(rank=64))


def needed(way: Way) -> int:
    """Bytes that fall by a part for each change."""
    changed = way.of(JOB)
    size = 100 if changed.model.base is None else 60
    size -= 5 * (changed.train.optimizer == "adamw8bit") + 10 * (changed.adapter.rank == 8)
    return size - (0 if way.longest is None else 10)


def test_the_first_three_that_fit_by_themselves() -> None:
    found = ways_out(of_job(JOB, 512, "cpu", plain=True), needed, 95)
    assert found == (("--optimizer adamw8bit", 95), ("--base nf4", 60), ("--max-length 256", 90))


def test_several_together_where_none_is_enough() -> None:
    ways = list(of_job(JOB, 512, "cpu", plain=True))
    assert ways_out(ways, needed, 46) == (("--optimizer adamw8bit --base nf4 --max-length 256", 45),)
    assert ways_out(ways, needed, 10) == ()


def flags(device: str = "cpu", plain: bool = True, train: Training | None = None, **model: Any) -> list[str]:
    """The ways of a job with such settings, whose examples are short."""
    job = Job(ModelSettings(model="m", **model), DataSettings(data="d"), LoRA(rank=8), train or Training())
    return [way.flags for way in of_job(job, 1, device, plain)]


def test_on_a_gpu_what_is_free_for_the_result_comes_first() -> None:
    offload, pages = "--offload-checkpoints", "--optimizer paged-adamw"
    assert flags("cuda") == [offload, pages, f"{pages}8bit", "--base nf4"]
    assert flags("cuda", train=Training(optimizer="adamw8bit")) == [offload, f"{pages}8bit", "--base nf4"]
    used = Training(optimizer="paged-adamw8bit", offload_checkpoints=True, checkpoint_layers=0)
    assert flags("cuda", train=used) == ["--micro-batch-tokens none --checkpoint-layers none", "--base nf4"]
    assert flags("cpu", train=used)[1:] == ["--base nf4"]
    together = sum(of_job(JOB, 512, "cuda", plain=True), Way())
    assert together.flags == f"{offload} {pages}8bit --base nf4 --max-length 128 --rank 8"
    assert together.of(JOB).train == Training(optimizer="paged-adamw8bit", offload_checkpoints=True)


@pytest.mark.parametrize(
    ("base", "plain", "offered"),
    [
        *((base, True, True) for base in (None, "bf16", "int8", "fp8")),
        *((base, True, False) for base in ("nf4", "fp4")),
        *((base, False, False) for base in (None, "nf4", "fp4", "int8")),
    ],
)
def test_four_bits_are_offered_where_they_can_be_had(base: str | None, plain: bool, offered: bool) -> None:
    assert flags(plain=plain, base=base) == ["--optimizer adamw8bit", *["--base nf4"] * offered]


def test_a_base_in_fp32_changes_with_its_computation() -> None:
    assert flags(dtype="fp32", base="fp32")[1] == "--dtype bf16 --base bf16"
    assert flags(dtype="fp32", base="int8")[1] == "--dtype bf16"


def test_a_run_that_goes_on_is_offered_what_resuming_takes() -> None:
    run = replace(JOB, train=Training(micro_batch_tokens=4096, checkpoint_layers=3))
    assert [way.flags for way in of_run(run, "cpu")] == ["--checkpoint-layers none"]
    assert [way.flags for way in of_run(run, "cpu", layers=3)] == []
    ways = list(of_run(run, "cuda", layers=9))
    assert [way.flags for way in ways] == ["--checkpoint-layers 9", "--offload-checkpoints"]
    assert {name for way in ways for name in way.sections["train"]} <= set(CHANGEABLE)
