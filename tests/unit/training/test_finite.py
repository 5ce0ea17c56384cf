"""A run that must not go on stops, names step, layer and rows, and leaves the adapter as it was."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import examples, tiny

from lamina.adapter import LoRA, adapted, attach
from lamina.errors import DataError, TrainingError
from lamina.model.decoder import Decoder
from lamina.training.loop import Training, start, train

TRAINING = Training(batch_size=8, micro_batch_tokens=40, learning_rate=1e-3)
END = "; the adapter is as it was before this step; start a new run, in another --out, with a lower learning rate, or look at these rows"


def stopped(model: Decoder, data: Any, steps: int = 0) -> str:
    """The message with which training stops after so many good steps; the adapter must not have moved since."""
    run = train(model, data, TRAINING, start(model, TRAINING), 0)
    for _ in range(steps):
        next(run)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with pytest.raises(TrainingError) as error:
        next(run)
    assert all(
        torch.equal(p, old) for p, old in zip((p for p in model.parameters() if p.requires_grad), before, strict=True)
    )
    return str(error.value)


def prepared(**lora: Any) -> Decoder:
    model = tiny()
    attach(model, LoRA(rank=4, **lora))
    return model


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("model.layers.1.mlp.up_proj.base.weight", "model.layers.1.mlp.up_proj"),
        ("model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "the head"),
    ],
)
def test_a_nan_in_the_base_is_found_where_it_is(broken: str, named: str) -> None:
    model = prepared()
    model.get_parameter(broken).data.view(-1)[3] = float("nan")
    assert stopped(model, examples(8)) == (
        f"step 1: the loss is not finite; first in {named}, rows {_rows(model, examples(8))}; the adapter is as it was "
        f"before this step; the base itself is damaged, with non-finite numbers in {broken}: get it anew"
    )


def test_several_damaged_weights_are_counted() -> None:
    model = prepared()
    for name in ("lm_head.weight", "model.norm.weight"):
        model.get_parameter(name).data.view(-1)[3] = float("nan")
    assert " and 1 more: get it anew" in stopped(model, examples(8))


def _rows(model: Decoder, data: Any) -> str:
    from lamina.data.pack import pack
    from lamina.training.order import rows_of_step

    batches = pack([data[row] for row in rows_of_step(0, 8, 8, 0)], TRAINING.portion)
    return ", ".join(map(str, sorted(row for batch in batches for row in batch.rows)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_rows_that_meet_the_bad_token_are_named(dropout: float) -> None:
    model, data = prepared(dropout=dropout), examples(8)
    for example in data:
        example.tokens[example.tokens == 95] = 0
    data[2].tokens[0] = data[6].tokens[1] = 95
    model.model.embed_tokens.weight.data[95] = float("inf")
    found = re.fullmatch(
        r"step 1: the loss is not finite; first in model\.(.*), rows (\d+), (\d+);.*", stopped(model, data)
    )
    assert found
    assert found[1] == "embed_tokens"
    assert {found[2], found[3]} == {"103", "107"}


def test_many_rows_are_shortened() -> None:
    model = prepared()
    model.model.norm.weight.data[:] = float("nan")
    training = Training(batch_size=20, learning_rate=1e-3)
    with pytest.raises(TrainingError, match=r"rows (\d+, ){7}\d+ …; the adapter"):
        next(train(model, examples(20), training, start(model, training), 0))


def test_a_later_step_is_named_by_its_number() -> None:
    model = prepared()
    run = train(model, examples(8) * 3, TRAINING, start(model, TRAINING), 0)
    next(run)
    adapted(model)["model.layers.0.mlp.gate_proj"].b.data[0, 0] = float("nan")
    with pytest.raises(
        TrainingError, match=r"^step 2: the loss is not finite; first in model\.layers\.0\.mlp\.gate_proj, rows"
    ):
        next(run)


def test_a_gradient_alone_can_be_bad() -> None:
    """The backward pass goes from the last layer to the first: layer 1 is sound, and down_proj the first below it."""
    model = prepared()

    def poison(_: object, __: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    model.model.layers[0].register_forward_hook(poison)
    text = stopped(model, examples(8))
    assert text.startswith("step 1: the gradient is not finite; first in model.layers.0.mlp.down_proj, rows 10")


def test_matrices_without_a_gradient_are_listed() -> None:
    model = prepared()
    model.model.layers[1].get_parameter("post_attention_layernorm.weight").data.zero_()
    assert stopped(model, examples(8)) == (
        "after the first step 3 of 14 adapted matrices have no gradient and would learn nothing: "
        "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj, model.layers.1.mlp.down_proj; leave them out of "
        "adapter.targets, or see whether the base feeds them zeros"
    )


def test_matrices_that_are_never_reached_are_listed() -> None:
    """What checkpointing without a gradient to its input did to many: PAINS 8."""
    model = prepared(layers="0")
    model.model.layers[0].forward = lambda x, *_: x  # type: ignore[method-assign]
    model.model.embed_tokens.weight.requires_grad_()
    assert stopped(model, examples(8)).startswith("after the first step 7 of 7 adapted matrices have no gradient")


def test_sound_training_passes() -> None:
    model = prepared()
    assert len(list(train(model, examples(16), TRAINING, start(model, TRAINING), 0))) == 2


def test_an_update_that_breaks_the_adapter_stops_the_run() -> None:
    model = prepared()
    training = replace(TRAINING, learning_rate=1e39, warmup=0.0)
    with pytest.raises(TrainingError, match="step 1: its update made the adapter non-finite; nothing of it is saved"):
        next(train(model, examples(8), training, start(model, training), seed=0))


def test_nothing_to_train_on() -> None:
    model = prepared()
    with pytest.raises(DataError, match="found no examples to train on, expected at least one"):
        next(train(model, [], TRAINING, start(model, TRAINING), seed=0))
