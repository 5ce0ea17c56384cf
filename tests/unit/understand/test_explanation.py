"""Sums, maps and sentences of an explanation, from updates whose answers are known."""

import json
import math

import pytest

from lamina.understand.alignment import Relation
from lamina.understand.explanation import Explanation
from lamina.understand.updates import Ranks, Update, places, powers


def update(name: str, *values: float, relation: Relation | None = None) -> Update:
    layer, module = places([name])[name]
    norm = math.hypot(*values)
    return Update(name, layer, module, (64, 32), len(values), len(values), 2.0, norm, 1.5, 1.2, values, relation)


def beside(size: float, relative: float, intruders: int = 0, exact: bool = True) -> Relation:
    return Relation(size, relative, 3.0, 8, 0.5, 0.25, 10, intruders, exact)


TWO = (update("model.layers.0.mlp.up_proj", 3.0, 1.0), update("model.layers.1.mlp.up_proj", 4.0, 2.0))


def test_powers_below_a_rank() -> None:
    assert [powers(rank) for rank in (1, 2, 3, 8, 9)] == [[], [1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


def test_layers_and_modules_of_any_family() -> None:
    paths = ["encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.1.EncDecAttention.q"]
    assert places(paths) == {
        paths[0]: ("encoder.block.0", "layer.SelfAttention.q"),
        paths[1]: ("encoder.block.0", "layer.EncDecAttention.q"),
    }
    assert places(["model.layers.3.mlp.experts.7.up_proj", "lm_head"]) == {
        "model.layers.3.mlp.experts.7.up_proj": ("model.layers.3", "up_proj"),
        "lm_head": ("", "lm_head"),
    }


def test_shares_and_energy_are_of_squared_norms() -> None:
    found = Explanation("a", None, TWO)
    assert found.shares("layer") == pytest.approx({"model.layers.0": 1 / 3, "model.layers.1": 2 / 3})
    assert found.shares("module") == pytest.approx({"up_proj": 1})
    assert [found.energy(rank) for rank in (1, 2)] == pytest.approx([25 / 30, 1])


def test_experts_share_a_cell_of_the_map() -> None:
    experts = tuple(
        update(f"model.layers.0.experts.{n}.w1", value, relation=beside(size, value / size))
        for n, (value, size) in enumerate([(3.0, 30.0), (4.0, 40.0), (0.0, 120.0)])
    )
    (cell,) = Explanation("a", "b", experts).as_json()["map"]
    assert cell == pytest.approx(
        {"layer": "model.layers.0", "module": "w1", "norm": 5, "relative": 5 / 130, "effective_rank": 1.5}
    )


@pytest.mark.parametrize(
    ("base", "adapter", "losses", "enough"),
    [
        (3.0, 1.0, [(1, 2.0), (2, 1.02), (4, 1.0)], 2),  # 1 % of 2 nats
        (3.0, 1.0, [(1, 2.0), (2, 1.0201)], None),
        (3.0, 1.0, [(1, 0.9), (2, 1.5)], 1),
        (1.0, 1.0, [(1, 1.0)], None),
        (1.0, 2.0, [(1, 1.0)], None),
    ],
)
def test_the_rank_that_would_have_done(
    base: float, adapter: float, losses: list[tuple[int, float]], enough: int | None
) -> None:
    assert Ranks(base, adapter, tuple(losses)).enough == enough


def test_the_sentences() -> None:
    ranks = Ranks(3.0, 1.0, ((1, 1.01),))
    assert Explanation("run/adapter", None, TWO, ranks).lines() == [
        "run/adapter: rank 2, scale 2, in 2 matrices",
        "effective rank 1.5 on average (1.5 to 1.5): the update is spread as over so many equal directions",
        "where the update sits (shares of ‖ΔW‖²): up_proj 100%; layer 1 67%, layer 0 33%",
        "rank 2 keeps 100.0% of ‖ΔW‖², rank 1 83.3%",
        "held-out loss 3.0000 of the base, 1.0000 of the adapter: rank 1 would have done, truncated to it the loss is 1.0100, "
        "within 1% of the improvement",
    ]
    none = Explanation("a", None, TWO, Ranks(3.0, 1.0, ((1, 2.0),))).lines()[-1]
    assert none.endswith("none of the lower ranks tried would have done; it uses its rank 2")
    worse = Explanation("a", None, TWO, Ranks(1.0, 2.0, ((1, 2.0),))).lines()[-1]
    assert worse.endswith("it does not improve on the base, so no rank can be said to do")
    assert Explanation("a", None, TWO, None, "the data is gone").lines()[-1].endswith("ranks: the data is gone")


def test_the_sentences_about_a_base() -> None:
    updates = (
        update("model.layers.0.q", 3.0, relation=beside(30, 0.1, intruders=2)),
        update("model.layers.1.q", 4.0, relation=beside(20, 0.2)),
    )
    lines = Explanation("a", "b", updates).lines()
    assert (
        "‖ΔW‖/‖W‖: median 15.00%, largest 20.00% in model.layers.1.q; along its own directions the update is 3 times"
        in lines[3]
    )
    assert lines[4].startswith(
        "W's leading directions hold 50.0% of what the update writes (12.5% by chance) and 25.0% of what it reads (25.0% by chance)"
    )
    assert lines[5].startswith("intruder dimensions: 2 of 20, in 1 matrices (")
    assert "--exact" not in "".join(lines)
    estimated = (updates[0], update("model.layers.1.q", 4.0, relation=beside(20, 0.2, 3, exact=False)))
    lines = Explanation("a", "b", estimated).lines()
    assert lines[4].endswith(", estimated")
    assert lines[5].startswith("intruder dimensions: at most 5 of 20, in 2 matrices (")
    assert "of 1 large matrices" in lines[6] and "--exact" in lines[6]
    rows = Explanation("a", "b", estimated).tables()[1][2]
    assert [(row[0], row[-1]) for row in rows] == [("model.layers.1.q", "≤ 3"), ("model.layers.0.q", "2")]


def test_the_tables_leave_out_the_middle_and_say_what_is_not_there() -> None:
    many = tuple(update(f"model.layers.{n}.q", float(n + 1)) for n in range(12))
    many = (*many, update("lm_head", 0.5))
    (heading, columns, rows), (_, _, extremes) = Explanation("a", None, many).tables()
    assert heading == "‖ΔW‖ and effective rank, layer × module"
    assert columns == ["layer", "q", "lm_head"]
    assert rows[0] == ["0", "1 · 1.5", ""] and rows[-1] == ["-", "", "0.5 · 1.5"]
    assert [row[1] for row in extremes] == ["12", "11", "10", "9", "8", "4", "3", "2", "1", "0.5"]


def test_an_adapter_that_changes_nothing() -> None:
    found = Explanation("a", "b", (update("model.layers.0.q", 0.0, 0.0, relation=beside(3.0, 0.0)),))
    assert found.lines()[1:] == [
        "this adapter changes nothing: B·A is zero in every matrix, as before the first step of training"
    ]
    assert found.tables() == []
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told["changes_nothing"] and told["shares"]["layer"] == {"model.layers.0": 0.0}
