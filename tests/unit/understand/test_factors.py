"""Any LoRA adapter read by its names, whatever its model; and what is no adapter, told in one message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamina.adapter_files import CONFIG, WEIGHTS
from lamina.errors import AdapterError, CheckpointError, ConfigError, Error
from lamina.understand.factors import open_adapter, save_truncated

T5 = [f"encoder.block.{n}.layer.0.SelfAttention.{name}" for n in (10, 2) for name in "qv"]  # no family of Lamina's


def key(path: str, factor: str) -> str:
    return f"base_model.model.{path}.lora_{factor}.weight"


def write(folder: Path, ranks: dict[str, int], **config: Any) -> Path:
    """An adapter as PEFT writes it, its matrices 12 × 10."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tensors = {}
    for path, rank in ranks.items():
        tensors[key(path, "A")], tensors[key(path, "B")] = torch.randn(rank, 10), torch.randn(12, rank)
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q", "v"]} | config
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


def products(folder: Path) -> dict[str, Tensor]:
    """s·B·A of every matrix, dense, in float64."""
    adapter = open_adapter(folder)
    return {f.path: f.scale * f.b.double() @ f.a.double() for f in adapter.factors()}


def test_matrices_in_the_order_of_layers_with_their_own_scales(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"v": 2}, "alpha_pattern": {"2.layer.0.SelfAttention.q": 1}}
    folder = write(tmp_path, {path: 2 if path.endswith("v") else 4 for path in T5}, **patterns)
    adapter = open_adapter(folder)
    assert (adapter.rank, adapter.base) == (4, None)
    found = {factors.path: (len(factors.a), factors.scale) for factors in adapter.factors()}
    assert list(found) == sorted(T5, key=lambda path: (int(path.split(".")[2]), path))
    assert [found[path] for path in T5] == [(4, 1.5), (2, 3.0), (4, 0.25), (2, 3.0)]
    folder = write(tmp_path, dict.fromkeys(T5, 4), use_rslora=True)
    assert {factors.scale for factors in open_adapter(folder).factors()} == {3.0}  # 6/√4


def test_truncated_factors_are_what_is_saved_and_the_best_of_their_rank(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {path: 2 if path.endswith("v") else 4 for path in T5}, rank_pattern={"v": 2})
    before = products(folder)
    kept = {factors.path: factors.spectrum().factors(3) for factors in open_adapter(folder).factors()}
    written = save_truncated(open_adapter(folder), 3, tmp_path / "b")
    stored, after = load_file(written.folder / WEIGHTS), products(written.folder)
    total, held = 0.0, 0.0
    for path, (a, b) in kept.items():
        assert torch.equal(stored[key(path, "A")], a) and torch.equal(stored[key(path, "B")], b)
        assert len(a) == (2 if path.endswith("v") else 3), "a matrix of a lower rank keeps its own"
        u, values, vh = torch.linalg.svd(before[path])
        best = (u[:, :3] * values[:3]) @ vh[:3]
        assert float((after[path] - best).norm()) <= 2**-22 * float(values[0]) * 2  # both factors in fp32
        total, held = total + float(values.square().sum()), held + float(values[:3].square().sum())
    assert written.rank == 3 and written.energy == pytest.approx(held / total, rel=1e-12)


def test_a_rank_above_the_sides_of_a_matrix(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", dict.fromkeys(T5, 16), r=16)
    written = save_truncated(open_adapter(folder), 16, tmp_path / "b")
    assert {len(factors.a) for factors in open_adapter(written.folder).factors()} == {10}
    before, after = products(folder), products(written.folder)
    for path, product in before.items():
        assert torch.allclose(after[path], product, rtol=0, atol=2**-21 * float(torch.linalg.matrix_norm(product, 2)))


def test_the_config_is_the_adapters_own_but_for_ranks_and_scales(tmp_path: Path) -> None:
    own = {"base_model_name_or_path": "some/base", "lora_dropout": 0.1, "task_type": "SEQ_2_SEQ_LM"}
    folder = write(tmp_path / "a", dict.fromkeys(T5, 4), **own, init_lora_weights="eva", eva_config={"rho": 2})
    found = json.loads((save_truncated(open_adapter(folder), 2, tmp_path / "b").folder / CONFIG).read_text())
    assert {name: found[name] for name in own} == own
    assert (found["r"], found["lora_alpha"], found["init_lora_weights"]) == (2, 2, True)
    assert "eva_config" not in found


def damaged(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])


def without_b(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[key(T5[0], "B")]
    save_file(tensors | {"lm_head.weight": torch.ones(1)}, folder / WEIGHTS)


def of_another_rank(folder: Path) -> None:
    write(folder, dict.fromkeys(T5, 3))


def convolution(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[key(T5[0], "A")] = torch.ones(4, 10, 3, 3)
    save_file(tensors, folder / WEIGHTS)


def empty(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda folder: (folder / CONFIG).unlink(), f"found no {CONFIG}, so this is no adapter folder"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"found no {WEIGHTS}; copy it"),
        (lambda folder: write(folder, {T5[0]: 4}, use_dora=True), "does not compute: use_dora"),
        (damaged, "damaged or incomplete"),
        (empty, "it is empty"),
        (without_b, r"2 misfits: unexpected lm_head.weight; missing .*10.layer.0.SelfAttention.q.lora_B.weight"),
        (of_another_rank, r"4 misfits: .* has A \[3, 10\] and B \[12, 3\], expected \[4, in\] and \[out, 4\]"),
        (convolution, r"has A \[4, 10, 3, 3\] and B \[12, 4\]"),
    ],
    ids=["config", "weights", "dora", "damaged", "empty", "missing", "rank", "convolution"],
)
def test_what_is_no_adapter(spoil: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    folder = write(tmp_path, dict.fromkeys(T5, 4))
    spoil(folder)
    with pytest.raises(AdapterError, match=text):
        open_adapter(folder)


@pytest.mark.parametrize(("factor", "value"), [("A", float("nan")), ("B", float("inf"))])
def test_numbers_that_are_none(factor: str, value: float, tmp_path: Path) -> None:
    folder = write(tmp_path, dict.fromkeys(T5, 4))
    tensors = load_file(folder / WEIGHTS)
    tensors[key(T5[2], factor)][1, 1] = value
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=rf"q.lora_{factor}.weight holds non-finite numbers"):
        list(open_adapter(folder).factors())


@pytest.mark.parametrize(
    ("rank", "kind", "text"),
    [
        (0, ConfigError, "rank: found 0, expected 1 to 4, the rank of "),
        (5, ConfigError, "rank: found 5, expected 1 to 4"),
        (2, CheckpointError, "exists and is not an empty folder"),
    ],
)
def test_what_is_not_written(rank: int, kind: type[Error], text: str, tmp_path: Path) -> None:
    folder = write(tmp_path, dict.fromkeys(T5, 4))
    with pytest.raises(kind, match=text):
        save_truncated(open_adapter(folder), rank, tmp_path)
