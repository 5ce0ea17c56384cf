"""The record of a merge: in sentences, as a table, for machines."""

from pathlib import Path

import pytest

from lamina.understand.difference import Difference
from lamina.understand.proof import SURVIVED, Matrix, MergeRecord, Policy

ONE = Matrix("model.layers.0.mlp.up_proj", 0.5, 0.01, 0.75)
TWO = Matrix("model.layers.0.mlp.down_proj", 0.25, 0.02, 0.25)
THREE = Matrix("model.layers.1.mlp.up_proj", 0.125, 0.03, 1.0)


def test_the_record_in_sentences(tmp_path: Path) -> None:
    record = MergeRecord(tmp_path, "run/adapter", "dequantised", "nf4", (ONE, TWO), None, "the data is gone")
    assert record.lines() == [
        f"merged run/adapter into 2 matrices, dequantised (added to the weights that training saw, made dense again): {tmp_path}",
        "largest update: 50 % of the norm of model.layers.0.mlp.up_proj",
        "share of the update that survived rounding: 50.0% on average, 25.0% in model.layers.0.mlp.down_proj",
        "farthest from base + adapter: 2 % of the norm of model.layers.0.mlp.down_proj",
        "not compared: the data is gone",
    ]
    written = record.as_json()
    assert written["not_compared"] == "the data is gone" and written["policy"] == "dequantised"
    assert written["matrices"][1] == {"name": TWO.name, "relative": 0.25, "error": 0.02, "survived": 0.25}


@pytest.mark.parametrize(
    ("policy", "base", "advice"),
    [
        ("requantised", "nf4", "the sum was rounded to four bits anew: merge with --policy dequantised"),
        ("original", "nf4", "training saw the base in nf4, and this is another one: merge with --policy dequantised"),
        ("dequantised", "int8", "training over int8 rounds what is multiplied too"),
        ("original", "bf16", "look at the matrices of which little survived"),
    ],
)
def test_advice_fits_what_makes_a_merged_model_answer_otherwise(policy: Policy, base: str, advice: str) -> None:
    far, near = (Difference(100, 1.0, kl, 1.0, 1.0, 2.0, 2.0) for kl in (0.1, 1e-5))
    assert MergeRecord(Path("m"), "run/adapter", policy, base, (ONE,), far).lines()[-1].startswith(advice)
    assert advice not in "".join(MergeRecord(Path("m"), "run/adapter", policy, base, (ONE,), near).lines())


@pytest.mark.parametrize(
    ("policy", "base", "mend"),
    [
        ("requantised", "nf4", "merge with --policy dequantised, or use the adapter beside its base"),
        (
            "original",
            "bf16",
            "use the adapter beside its base, or train with a higher learning rate, a larger alpha or more steps; or ",
        ),
        ("dequantised", "nf4", "use the adapter beside its base, or train"),
    ],
)
@pytest.mark.parametrize("kl", [1e-5, 0.1, None])
def test_an_update_that_was_rounded_away_is_told_once(policy: Policy, base: str, mend: str, kl: float | None) -> None:
    """Whether the models answer alike, otherwise, or were not compared."""
    difference = None if kl is None else Difference(100, 1.0, kl, 1.0, 1.0, 2.0, 2.0)
    record = MergeRecord(Path("m"), "run/adapter", policy, base, (TWO,), difference, "no data")
    said = f"most of the update was rounded away: 25.0% of it survived, expected at least 50%; {mend}"
    assert record.lines()[-1].startswith(said)
    assert len(record.advice()) == 1 and record.as_json()["advice"] == record.advice()
    assert record.rounded_away and record.as_json()["rounded_away"]


def test_half_of_an_update_is_enough(tmp_path: Path) -> None:
    """The mean decides, and the matrices that are worse are in the line above."""
    half = MergeRecord(tmp_path, "run/adapter", "original", "bf16", (ONE, TWO), None)
    assert half.survived == SURVIVED and not half.rounded_away and half.advice() == []
    assert MergeRecord(tmp_path, "run/adapter", "original", "bf16", (ONE, TWO, TWO), None).rounded_away


def test_a_second_reason_is_told_too() -> None:
    far = Difference(100, 1.0, 0.1, 1.0, 1.0, 2.0, 2.0)
    said = MergeRecord(Path("m"), "run/adapter", "original", "nf4", (TWO,), far).advice()
    assert len(said) == 2 and said[1].startswith("training saw the base in nf4")


def test_the_record_holds_the_limits_of_its_verdicts(tmp_path: Path) -> None:
    written = MergeRecord(tmp_path, "run/adapter", "original", "bf16", (ONE,), None).as_json()
    assert written["limits"] == {
        "survived_at_least": 0.5, "kl_below": 1e-3, "clear_agreement_at_least": 0.99, "clear_above_nats": 0.1,
    }  # fmt: skip


def test_a_row_for_each_layer(tmp_path: Path) -> None:
    head, rows = MergeRecord(tmp_path, "run/adapter", "original", "bf16", (ONE, TWO, THREE), None).table()
    assert head == ("layer", "matrices", "‖ΔW‖/‖W‖", "error/‖W‖", "survived", "least survived")
    assert rows == [
        ("0", "2", "3.75e-01", "1.50e-02", "50.0%", "25.0% down_proj"),
        ("1", "1", "1.25e-01", "3.00e-02", "100.0%", "100.0% up_proj"),
    ]
