"""Whatever makes a step fast changes nothing of it: each choice on and off, in every combination, against the plain step.

The plain step computes the examples one by one, with the inputs that come after an example's last target, every layer for all of its
tokens, keeps everything and compiles nothing.

In fp32 the choices change the order of sums and the shapes of GEMMs, a few roundings of 6e-8 each: the loss, a sum of some dozens
of terms of one sign, stays within 1e-6; a gradient's terms cancel in part, so that it is given 1e-5 (the 2-norm of each matrix).
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from models import SIZE, error, tiny
from torch import Tensor

from lamina.adapter import LoRA, adapted, attach
from lamina.data.pack import NONE, Batch, pack
from lamina.data.render import Rendered
from lamina.model.decoder import Decoder
from lamina.training.loop import Training, backward

LAYERS = 3
PORTIONS = {"one by one": 1, "split": 40, "packed": 4096}
# A choice of the training joins the grid with its first value, the plain one, as the reference.
CHOICES: dict[str, tuple[Any, ...]] = {"checkpoint_layers": (0, 1, LAYERS)}
if "compile" in {field.name for field in dataclasses.fields(Training)}:
    CHOICES["compile"] = (False, True)
GRID = [
    (portion, pruned, dict(zip(CHOICES, values, strict=True)))
    for portion, pruned, values in itertools.product(PORTIONS, (False, True), itertools.product(*CHOICES.values()))
]


def rows() -> list[Rendered]:
    """Examples of which the middle third is learnt: dead inputs before it and after it."""
    random, made = np.random.default_rng(3), []
    for row in range(8):
        tokens = random.integers(0, SIZE["vocab_size"], int(random.integers(6, 25)), dtype=np.int32)
        third = len(tokens) // 3
        made.append(Rendered(tokens, (np.arange(len(tokens)) // third) == 1, row))
    return made


def batches(budget: int, pruned: bool) -> list[Batch]:
    """The step's examples as ``pack`` makes batches of them; unpruned: with the inputs after the last target, which it leaves out."""
    if pruned:
        return pack(rows(), budget)
    examples = {example.row: example for example in rows()}
    unpruned = []
    for batch in pack([dataclasses.replace(e, trained=np.ones_like(e.trained)) for e in examples.values()], budget):
        trained = np.concatenate([examples[row].trained[1:] for row in batch.rows])
        unpruned.append(dataclasses.replace(batch, targets=batch.targets.where(torch.from_numpy(trained), NONE)))
    return unpruned


def step(portion: str, pruned: bool, choices: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    model = tiny(num_hidden_layers=LAYERS)
    modules = attach(model, LoRA(rank=4))
    torch.manual_seed(1)
    for module in modules.values():
        torch.nn.init.normal_(module.b, std=0.1)
    model.train()
    if not pruned:
        model.forward = lambda *given: Decoder.forward(model, *given[:-1])[given[-1]]  # type: ignore[method-assign]
    training = Training(learning_rate=1e-3, **choices)
    loss = torch.stack([backward(model, batch, training) for batch in batches(PORTIONS[portion], pruned)]).sum()
    return loss, {f"{path}.{name}": getattr(m, name).grad for path, m in adapted(model).items() for name in "ab"}


@pytest.fixture(scope="module")
def plain() -> tuple[Tensor, dict[str, Tensor]]:
    return step("one by one", pruned=False, choices={name: values[0] for name, values in CHOICES.items()})


def test_the_choices_differ() -> None:
    inputs = {(p, pruned): [len(b.tokens) for b in batches(PORTIONS[p], pruned)] for p in PORTIONS for pruned in (0, 1)}
    assert [len(inputs[p, 1]) for p in PORTIONS] == [8, pytest.approx(3, abs=1), 1]
    assert all(sum(inputs[p, 1]) < sum(inputs[p, 0]) for p in PORTIONS)


@pytest.mark.parametrize(("portion", "pruned", "choices"), GRID, ids=str)
def test_every_combination_is_the_plain_step(
    portion: str, pruned: bool, choices: dict[str, Any], plain: tuple[Tensor, dict[str, Tensor]]
) -> None:
    loss, gradients = step(portion, pruned, choices)
    assert float(loss) == pytest.approx(float(plain[0]), rel=1e-6)
    assert gradients.keys() == plain[1].keys()
    worst = {name: error(gradients[name], plain[1][name]) for name in gradients}
    assert max(worst.values()) <= 1e-5, max(worst, key=worst.__getitem__)
