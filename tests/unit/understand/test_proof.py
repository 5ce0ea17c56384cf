"""The record of a merge: in sentences, as a table, for machines."""

from pathlib import Path

from lamina.understand.proof import Matrix, MergeRecord

ONE = Matrix("model.layers.0.mlp.up_proj", 0.5, 0.01, 0.75)
TWO = Matrix("model.layers.0.mlp.down_proj", 0.25, 0.02, 0.25)
THREE = Matrix("model.layers.1.mlp.up_proj", 0.125, 0.03, 1.0)


def test_the_record_in_sentences(tmp_path: Path) -> None:
    record = MergeRecord(tmp_path, "run/adapter", "dequantised", (ONE, TWO), None, "the data is gone")
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


def test_a_row_for_each_layer(tmp_path: Path) -> None:
    head, rows = MergeRecord(tmp_path, "run/adapter", "original", (ONE, TWO, THREE), None).table()
    assert head == ("layer", "matrices", "‖ΔW‖/‖W‖", "error/‖W‖", "survived", "least survived")
    assert rows == [
        ("0", "2", "3.75e-01", "1.50e-02", "50.0%", "25.0% down_proj"),
        ("1", "1", "1.25e-01", "3.00e-02", "100.0%", "100.0% up_proj"),
    ]
