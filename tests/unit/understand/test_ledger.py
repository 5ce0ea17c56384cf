"""The ledger's numbers beside dense ones in float64, and the training beside one without it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import examples, tiny
from tiny import write_tiny
from torch import Tensor

from lamina.adapter import LoRA, adapted, attach
from lamina.model.decoder import Decoder
from lamina.model.quantised import form_of
from lamina.model.weights import load_model
from lamina.training.loop import State, Training, start, train
from lamina.understand.ledger import Observer, Place, Row, places, summaries, weight_norms

EPS = 2.0**-24
LORA = LoRA(rank=4, alpha=8.0, rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3.0})


def begun(**settings: Any) -> tuple[Decoder, Training, State]:
    model = tiny()
    attach(model, LORA)
    training = Training(**{"batch_size": 4, "steps": 5, "learning_rate": 1e-2, **settings})
    return model, training, start(model, training)


def factors(model: Decoder) -> list[tuple[Tensor, Tensor]]:
    return [(m.a.detach().double().clone(), m.b.detach().double().clone()) for m in adapted(model).values()]


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_the_ledger_is_what_dense_computation_gives(kind: str) -> None:
    """A norm is a root of sums of at most n = 64 squares and R = 4 partial sums, each rounded to ε: (n + R)·ε of it, and as
    much again for the sums of which it is a part. ⟨BᵀB, A·Aᵀ⟩ is off by so much of ‖A‖²·‖B‖², which may be more than the product."""
    model, training, state = begun(optimizer=kind)
    gradients: list[list[float]] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        flat = [p.grad.double().square().sum().item() for group in optimizer.param_groups for p in group["params"]]
        gradients.append([(a + b) ** 0.5 for a, b in zip(flat[::2], flat[1::2], strict=True)])

    state.optimizer.register_step_pre_hook(look)  # after clipping, which is not in the way here
    observer, before = Observer(model, state), factors(model)
    rounding = 2 * (64 + 4) * EPS
    for step in train(model, examples(16), training.__class__(**{**vars(training), "clip": None}), state, 0):
        row, after = observer.row(), factors(model)
        assert row is not None and row.step == step.step
        for n, module in enumerate(adapted(model).values()):
            (a, b), (a_before, b_before) = after[n], before[n]
            product, both = b @ a, (a.norm() * b.norm() / (b @ a).norm()) ** 2
            update, weight = module.scale * product.norm(), form_of(module.base).dense().double().norm()
            moved = torch.hypot((a - a_before).norm(), (b - b_before).norm()) / torch.hypot(a.norm(), b.norm())
            expected = {"a_norm": a.norm(), "b_norm": b.norm(), "update_norm": update, "relative": update / weight}
            expected |= {"ratio": moved, "grad_norm": gradients[-1][n]}
            for column, value in expected.items():
                allowed = rounding * (both if column in ("update_norm", "relative") else 1)
                assert row[column][n] == pytest.approx(float(value), rel=float(allowed)), (column, n)
        assert np.linalg.norm(row["grad_norm"].astype(np.float64)) == pytest.approx(step.grad_norm, rel=rounding)
        before = after
    assert state.step == 5


def test_the_gradient_is_that_before_clipping() -> None:
    def first(clip: float | None) -> Row:
        model, training, state = begun(clip=clip)
        observer = Observer(model, state)
        next(train(model, examples(16), training, state, 0))
        row = observer.row()
        assert row is not None
        return row

    free, clipped = first(None), first(1e-3)
    assert np.array_equal(free["grad_norm"], clipped["grad_norm"])
    assert (free["grad_norm"] > 1e-3).any()


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_training_is_the_same_to_the_bit_with_and_without(kind: str) -> None:
    def losses(every: int) -> tuple[list[float], list[Tensor]]:
        model, training, state = begun(optimizer=kind)
        observer = Observer(model, state, every) if every else None
        found = []
        for step in train(model, examples(16), training, state, 0):
            found.append(step.loss)
            if observer:
                observer.row()
        return found, [tensor for pair in factors(model) for tensor in pair]

    (plain, without), (watched, beside) = losses(0), losses(1)
    assert plain == watched
    assert all(torch.equal(a, b) for a, b in zip(without, beside, strict=True))


def test_only_the_steps_that_are_asked_for_are_measured_and_none_after_the_end() -> None:
    model, training, state = begun()
    observer, found = Observer(model, state, every=2), []
    for step in train(model, examples(16), training, state, 0):
        if (row := observer.row()) is not None:
            found.append((step.step, row.step))
        assert observer.row() is None  # a row is given once
        if step.step == 4:
            observer.close()
    assert found == [(2, 2), (4, 4)]


def test_a_matrix_that_was_never_moved_has_a_norm_of_zero() -> None:
    model, training, state = begun(learning_rate=1e-3)
    still = adapted(model)["model.layers.0.self_attn.q_proj"]
    still.register_forward_pre_hook(lambda _, given: (torch.zeros_like(given[0]),))
    state.step = 1  # the first step would refuse it
    observer = Observer(model, state)
    next(train(model, examples(16), training, state, 0))
    row = observer.row()
    assert row is not None
    assert [row[column][0] for column in ("b_norm", "update_norm", "relative", "grad_norm", "ratio")] == [0] * 5
    assert (row["b_norm"][2:] > 0).all()  # the keys are multiplied by the queries: they learn nothing either


@pytest.mark.parametrize("base", [None, "nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_norm_of_a_weight_is_that_of_the_value_it_computes_with(base: Any, dtype: Any, tmp_path: Path) -> None:
    """Rows of 64 or 128 numbers, and 128 rows, are summed in fp32 each: (128 + 128)·ε at most."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    model = load_model(write_tiny(tmp_path / "base", **size), dtype, "cpu", base=base)
    expected = [form_of(module.base).dense().double().norm().item() for module in attach(model, LoRA(rank=2)).values()]
    found = weight_norms(model)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=256 * EPS)


def test_matrices_are_named_and_summed_up_by_kind_and_layer() -> None:
    model, _, _ = begun()
    where = places(model)
    assert where[:2] == (Place(0, "self_attn.q_proj"), Place(0, "self_attn.k_proj")) and len(where) == 14
    values = np.zeros((6, 14), dtype=np.float32)
    values[3] = [place.layer + 1 for place in where]  # relative
    values[4] = 2  # grad_norm
    values[5] = [100 if place == Place(1, "mlp.up_proj") else 1 for place in where]  # ratio
    found = summaries(Row(1, values), where)
    assert len(found) == 3 * 7 + 2
    assert found["ledger_relative/self_attn.q_proj"] == pytest.approx((5 / 2) ** 0.5)
    assert found["ledger_grad_norm/mlp.down_proj"] == pytest.approx(8**0.5)
    assert found["ledger_ratio/mlp.up_proj"] == pytest.approx(50.5)
    assert (found["ledger_relative_by_layer/00"], found["ledger_relative_by_layer/01"]) == (1, 2)
