"""The ops that have a backward pass of their own, together in a whole model in bf16: as close to the truth as autograd's."""

from typing import Any

import pytest
import torch
from models import error, hidden, some_tokens, tiny
from torch import Tensor, nn

from lamina.adapter import LoRA, adapted, attach
from lamina.model import decoder
from lamina.model.decoder import Decoder
from lamina.ops import attention, norm, products, swiglu
from lamina.ops.loss import cross_entropy_sum

LENGTHS = (330, 150, 70, 20)
"""Several blocks of queries, and a block that is not full."""


def rotate_plainly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (low, high), cos, sin = x.chunk(2, -1), cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


TWINS: dict[str, tuple[Any, str, Any]] = {
    "attention": (attention, "by_kernel", lambda *_: False),
    "norm": (decoder, "rms_norm", norm.plain),
    "gate": (decoder, "swiglu", swiglu.plain),
    "rotation": (decoder, "rotate", rotate_plainly),
    "products": (products, "faster", lambda *_: False),
    "few": (products, "few_here", lambda: False),
    "siblings": (decoder, "together", lambda x, *linears: [linear(x) for linear in linears]),
}
"""Where each op is called from, its name there, and what autograd differentiates instead."""


def gradients(model: Decoder) -> dict[str, Tensor]:
    """Of every A and B, from a loss on all tokens but the last of each example."""
    targets = torch.cat([one.roll(-1) for one in some_tokens(LENGTHS).split(LENGTHS)])
    targets[torch.tensor(LENGTHS).cumsum(0) - 1] = -100
    loss, _ = cross_entropy_sum(hidden(model, some_tokens(LENGTHS), LENGTHS), model.vocabulary, targets)
    loss.backward()
    found = {f"{path}.{f}": getattr(module, f).grad for path, module in adapted(model).items() for f in "ab"}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama-grouped", "qwen3"))]
)
def test_bf16_gradients_are_no_farther_from_the_truth_than_those_of_the_plain_ops(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """1.2: the rule of the house, for each op by itself and for all. The truth is fp32 and the plain ops, on the same weights
    and on A and B that bf16 holds exactly. Which error a single tensor meets is luck, so the relative errors of all are added."""
    size = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 64,
    }
    model = tiny(family, torch.bfloat16, **size)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.mul_((32 / 256) ** 0.5)  # drawn for a width of 32
    assert sum(LENGTHS) * 256 > norm.CHUNK and sum(LENGTHS) * 512 > swiglu.CHUNK["cpu"], "chunks"
    for module in attach(model, LoRA(rank=4, alpha=6), seed=2).values():
        nn.init.normal_(module.b, std=0.1)
        with torch.no_grad():
            for factor in (module.a, module.b):
                factor.copy_(factor.bfloat16())
    found = {"all": gradients(model)}
    for fast in TWINS:
        with monkeypatch.context() as patch:
            for name, twin in TWINS.items():
                if name != fast:
                    patch.setattr(*twin)
            found[fast] = gradients(model)
    for twin in TWINS.values():
        monkeypatch.setattr(*twin)
    plain, truth = gradients(model), gradients(model.float())
    ours = {name: sum(error(one[path], truth[path]) for path in truth) for name, one in found.items()}
    theirs = sum(error(plain[path], truth[path]) for path in truth)
    assert 0.001 * len(truth) < theirs < 0.1 * len(truth), "bf16 or not at all"
    assert any(not torch.equal(found["all"][path], plain[path]) for path in plain), "the plain ops twice"
    assert max(ours.values()) <= 1.2 * theirs, ours
