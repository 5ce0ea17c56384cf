"""The time of a run from the time of a layer: exact arithmetic, on the form of the base that the plan is made for."""

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
from models import tiny

from lamina.adapter import LoRA, adapted
from lamina.model.quantised import Base, quantised_of
from lamina.training.calibrate import Pace, calibrate, one_layer
from lamina.training.plan import ranks_of
from lamina.training.setup import Setup

CPU = torch.device("cpu")


def setup_of(**changes: int) -> Setup:
    architecture = tiny(**changes).architecture
    return Setup(architecture, ranks_of(architecture, LoRA(rank=4, rank_pattern={"v_proj": 2})), itemsize=4)


def test_the_time_of_a_step_is_its_tokens_through_the_layers_and_its_targets_through_the_loss() -> None:
    pace = Pace(layer=3.0, rest=5.0)
    assert pace.seconds(100, 40, 6) == 100 * 3 * 6 + 40 * 5
    assert pace.seconds(100, 0, 6) == 100 * 3 * 6
    assert pace.seconds(100, 40, 6, recomputed=2) == 100 * 3 * 6 + 100 * 2 + 40 * 5, "a third of a layer once more"


def test_below_the_lowest_adapter_there_is_only_a_forward_pass() -> None:
    pace = Pace(layer=3.0, rest=5.0)
    assert pace.seconds(100, 40, 6, below=3) == 100 * (3 * 3 + 1 * 3) + 40 * 5
    both = pace.seconds(100, 40, 6, recomputed=4, below=3)
    assert both == 100 * (3 * 3 + 1 * 3 + 1) + 40 * 5, "of four recomputed layers three have no backward pass"
    assert pace.seconds(100, 40, 6, recomputed=2, below=3) == pace.seconds(100, 40, 6, below=3)


@pytest.mark.parametrize("base", [None, *get_args(Base)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_layer_that_is_timed_has_the_form_of_the_setup(base: Base | None, dtype: torch.dtype) -> None:
    setup = replace(setup_of(), base=base, itemsize=dtype.itemsize)
    model = one_layer(setup, dtype, CPU)
    kinds = {type(module.form).__name__ for module in quantised_of(model)}
    assert kinds == {{None: "", "int8": "Int8", "fp8": "Fp8"}.get(base, "FourBit")} - {""}
    assert len(quantised_of(model)) == (7 if base else 0)
    ranks = {path: rank for path, rank in setup.ranks.items() if ".layers.0." in path}
    assert {path: len(module.a) for path, module in adapted(model).items()} == ranks
    assert set(ranks.values()) == {2, 4}
    assert model.vocabulary.dtype == dtype and len(model.model.layers) == 1


def test_a_rank_that_narrow_matrices_have_not_is_timed_where_it_is() -> None:
    """The most common rank may be more than keys and values are wide."""
    architecture = tiny("llama-grouped").architecture
    narrow = architecture.kv_heads * architecture.head_width
    assert narrow < architecture.width
    ranks = ranks_of(architecture, LoRA(rank=narrow + 1, rank_pattern={"k_proj": 2, "v_proj": 2}))
    model = one_layer(Setup(architecture, ranks, itemsize=4), torch.float32, CPU)
    assert {len(module.a) for module in adapted(model).values()} == {2, narrow + 1}


def test_a_token_costs_its_share_of_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that is not the machine's: three rounds of the layer take 4, 2 and 3 seconds, those of the loss 1 each."""
    ticks = iter([0, 4, 10, 12, 20, 23, 30, 31, 40, 41, 50, 51])

    def clock() -> Iterator[float]:
        return map(float, ticks)

    times = clock()
    monkeypatch.setattr("lamina.training.calibrate.time.perf_counter", lambda: next(times))
    assert calibrate(setup_of(), torch.float32, CPU, 16) == Pace(layer=2 / 16, rest=1 / 16)


def test_no_more_tokens_are_timed_than_the_model_has_places_for(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(12))
    monkeypatch.setattr("lamina.training.calibrate.time.perf_counter", lambda: float(next(times)))
    setup = setup_of(max_position_embeddings=32)
    assert calibrate(setup, torch.float32, CPU, 4096) == Pace(1 / 32, 1 / 32)
