"""Whatever makes a step fast changes nothing of it: each choice on and off, in every combination, against the plain step.

The plain step computes the examples one by one, with the inputs that come after an example's last target, the last layer for all of
its tokens, each projection by itself, and keeps everything. Nothing is compiled by torch (docs/decisions/0011), so that is no choice; the
kernels that stand in its place compute in bf16 and have their twins beside them (``ops``).

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
from lamina.data.pack import Batch, pack
from lamina.data.render import Rendered
from lamina.model import decoder
from lamina.model.decoder import Decoder
from lamina.ops import lora
from lamina.ops.loss import IGNORED
from lamina.training.loop import Training, backward

LAYERS = 3
CHOICES: dict[str, tuple[Any, ...]] = {
    "portion": (1, 40, 4096),  # tokens of a micro-batch: one by one, split, packed
    "dead": (True, False),  # inputs after the last target
    "whole": (True, False),  # the last layer for all tokens
    "apart": (True, False),  # q, k and v, gate and up
    "checkpoint_layers": (0, 1, LAYERS),
}
"""The plain one first."""
GRID = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
CASES = [  # between two ends are the slow ones
    pytest.param(one, marks=[pytest.mark.slow] * (one["portion"] == 40 or one["checkpoint_layers"] == 1))
    for one in GRID
]


def rows() -> list[Rendered]:
    """Examples of which the middle third is learnt: dead inputs before it and after it."""
    random, made = np.random.default_rng(3), []
    for row in range(8):
        tokens = random.integers(0, SIZE["vocab_size"], int(random.integers(6, 25)), dtype=np.int32)
        third = len(tokens) // 3
        made.append(Rendered(tokens, (np.arange(len(tokens)) // third) == 1, row))
    return made


def batches(portion: int, dead: bool) -> list[Batch]:
    """The step's examples as ``pack`` makes batches of them, or with the inputs after the last target, which it leaves out."""
    if not dead:
        return pack(rows(), portion)
    examples = {example.row: example for example in rows()}
    whole = []
    for batch in pack([dataclasses.replace(e, trained=np.ones_like(e.trained)) for e in examples.values()], portion):
        trained = np.concatenate([examples[row].trained[1:] for row in batch.rows])
        whole.append(dataclasses.replace(batch, targets=batch.targets.where(torch.from_numpy(trained), IGNORED)))
    return whole


def step(
    portion: int, dead: bool, whole: bool, apart: bool, checkpoint_layers: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    model = tiny(num_hidden_layers=LAYERS)
    modules = attach(model, LoRA(rank=4))
    torch.manual_seed(1)
    for module in modules.values():
        torch.nn.init.normal_(module.b, std=0.1)
    model.train()
    if whole:
        model.forward = lambda *given, wanted, **more: Decoder.forward(model, *given, **more)[wanted]  # type: ignore[method-assign]
    training = Training(learning_rate=1e-3, checkpoint_layers=checkpoint_layers)
    with pytest.MonkeyPatch.context() as patch:
        if apart:
            patch.setattr(decoder, "together", lambda x, *linears: [linear(x) for linear in linears])
        loss = torch.stack([backward(model, batch, training) for batch in batches(portion, dead)]).sum()
    return loss, {f"{path}.{name}": getattr(m, name).grad for path, m in adapted(model).items() for name in "ab"}


@pytest.fixture(scope="module")
def plain() -> tuple[Tensor, dict[str, Tensor]]:
    return step(**GRID[0])


def test_the_choices_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {(p, dead): [len(b.tokens) for b in batches(p, dead)] for p in CHOICES["portion"] for dead in (0, 1)}
    assert [len(inputs[p, 0]) for p in CHOICES["portion"]] == [8, pytest.approx(3, abs=1), 1]
    assert all(sum(inputs[p, 0]) < sum(inputs[p, 1]) for p in CHOICES["portion"])
    ops: list[int] = []
    counted = lora._Project.apply
    monkeypatch.setattr(lora._Project, "apply", lambda x, *given: ops.append(len(x)) or counted(x, *given))
    found = {}
    for whole, apart in itertools.product((True, False), (True, False)):
        step(**GRID[-1] | {"whole": whole, "apart": apart, "checkpoint_layers": 0})
        found[whole, apart], ops = (len(ops), sum(ops)), []
    assert found[True, True][0] == 7 * LAYERS and found[True, False][0] == 4 * LAYERS
    assert found[False, True][0] == 7 * LAYERS and found[False, True][1] < found[True, True][1]


@pytest.mark.parametrize("choices", CASES, ids=str)
def test_every_combination_is_the_plain_step(choices: dict[str, Any], plain: tuple[Tensor, dict[str, Tensor]]) -> None:
    loss, gradients = step(**choices)
    assert float(loss) == pytest.approx(float(plain[0]), rel=1e-6)
    assert gradients.keys() == plain[1].keys()
    worst = {name: error(gradients[name], plain[1][name]) for name in gradients}
    assert max(worst.values()) <= 1e-5, max(worst, key=worst.__getitem__)
