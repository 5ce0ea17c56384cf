"""The learning rate: rule of thumb and schedules; what AdamW is given."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from lamina.errors import ConfigError
from lamina.training.optimizer import (
    Kind,
    Schedule,
    Shape,
    adamw,
    moments,
    rate_factor,
    relative_update,
    rule_of_thumb,
)

SCHEDULES: list[Schedule] = ["constant", "linear", "cosine"]


def test_rule_of_thumb() -> None:
    assert rule_of_thumb(4096, "llama") == pytest.approx(2.86e-4, rel=2e-3)
    assert rule_of_thumb(2000, "llama") == rule_of_thumb(2000, "qwen3") == 5e-4
    assert rule_of_thumb(4096, "mistral") == rule_of_thumb(4096, "llama")
    assert rule_of_thumb(4000, "qwen2") == pytest.approx(5e-4 * 2**-0.0775, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.0), (10, 0.3), (37, 0.1), (1, 0.0), (200, 0.99)])
def test_schedules_are_those_of_transformers(schedule: Schedule, steps: int, warmup: float) -> None:
    """After the warm-up; in it transformers' first step has rate 0 and does nothing, so ours is one step ahead."""
    from transformers import get_scheduler

    rising = math.ceil(warmup * steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    theirs = get_scheduler(name, optimizer, rising, steps)
    expected = []
    for _ in range(steps + 1):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    for step in range(steps):
        ours = rate_factor(step, steps, schedule, warmup)
        assert ours == pytest.approx(expected[step + 1] if step < rising else expected[step], rel=1e-12), step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_is_wasted(schedule: Schedule) -> None:
    for steps in (1, 2, 3, 100, 1000):
        for warmup in (0.0, 0.03, 0.5, 1.0):
            factors = [rate_factor(step, steps, schedule, warmup) for step in range(steps)]
            assert all(0 < factor <= 1 for factor in factors), (steps, warmup)
            assert max(factors) == 1.0


@pytest.mark.parametrize(("steps", "warmup", "rising"), [(100, 0.07, 7), (50, 0.14, 7), (25, 0.28, 7), (100, 0.03, 3)])
def test_warmup_counts_steps_as_people_do(steps: int, warmup: float, rising: int) -> None:
    """0.07·100 is 7.000000000000001 in floating point, and seven steps all the same."""
    factors = [rate_factor(step, steps, "constant", warmup) for step in range(steps)]
    assert factors.index(1.0) == rising - 1


def test_decay_is_decoupled_and_moments_are_fp32() -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = adamw("adamw", [parameter], weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    parameter.grad = torch.tensor([3.0])
    optimizer.step()
    # Adam's first step is the sign of the gradient, times the rate; the decay takes rate · 0.1 of the old value.
    assert parameter.item() == pytest.approx(2.0 - 0.5 * 0.1 * 2.0 - 0.5, rel=1e-6)
    assert {tensor.dtype for tensor in optimizer.state[parameter].values()} == {torch.float32}


def quadratic(kind: Kind, steps: int, size: int = 8192) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A parameter after some steps down ½‖p - 1‖², and its optimiser."""
    parameter = nn.Parameter(torch.linspace(-2, 2, size))
    optimizer = adamw(kind, [parameter], weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2
        parameter.grad = parameter.detach() - 1
        optimizer.step()
    return parameter.detach(), optimizer


def test_moments_in_eight_bits_take_a_quarter_of_the_memory_and_go_the_same_way() -> None:
    plain, wide = quadratic("adamw", 50)
    found, narrow = quadratic("adamw8bit", 50)
    size = {}
    for name, optimizer in (("wide", wide), ("narrow", narrow)):
        kept = moments(optimizer, optimizer.param_groups[0]["params"][0])
        size[name] = sum(moment.nbytes for moment in kept.values())
    assert size["narrow"] == 2 * (8192 + 8192 // 256 * 4)  # a byte a number, and a scale of four bytes for 256 of them
    assert size["wide"] == 8 * 8192
    # An eight-bit moment is within 1/32 of the number (dynamic map), and a step is a ratio of two: 50 steps of 1e-2 differ
    # by at most a tenth of their sum.
    assert (plain - found).abs().max() < 0.1 * 50 * 1e-2
    assert not torch.equal(plain, found)


@pytest.mark.parametrize("kind", ["paged-adamw", "paged-adamw8bit"])
def test_pages_need_a_gpu(kind: Kind) -> None:
    with pytest.raises(ConfigError, match=f"optimizer: found {kind} on cpu, but pages live in CUDA's unified memory"):
        quadratic(kind, 1)


def test_the_update_that_a_merge_would_swallow() -> None:
    """The reference jobs at Llama-2-7B's width, where a weight is about 0.02: A learns enough, C about 1e-3 of the weights."""
    seven_b = Shape(scale=16 / 64, rank=64, inputs=4096, weight=0.02)
    assert relative_update(250, 2e-4, "cosine", 0.03, seven_b) > 2**-9
    assert relative_update(250, 1e-5, "cosine", 0.03, seven_b) == pytest.approx(1e-3, rel=0.2)
    long = relative_update(4096, 1e-5, "cosine", 0.03, seven_b)  # a longer run has the same shape
    assert relative_update(10**9, 1e-5, "cosine", 0.03, seven_b) == pytest.approx(long * 10**9 / 4096)


@pytest.mark.slow
def test_adamw_loads_no_compiler() -> None:
    """It takes a second, which a run would wait for before its first step."""
    program = (
        "import sys, torch; from lamina.training.optimizer import adamw; p = torch.nn.Parameter(torch.ones(3))\n"
        "made = adamw('adamw', [p], 0.0, (0.9, 0.999), 1e-8); p.grad = torch.ones(3); made.step(); made.zero_grad()\n"
        "made.load_state_dict(made.state_dict()); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_adamw_takes_the_steps_of_torchs_own() -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    one = adamw("adamw", [ours], 0.1, (0.9, 0.999), 1e-8)
    other = torch.optim.AdamW([theirs], lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True)
    for step in range(3):
        for optimizer, parameter in ((one, ours), (other, theirs)):
            optimizer.param_groups[0]["lr"] = 0.01
            parameter.grad = torch.full((7,), step - 1.0)
            optimizer.step()
        assert torch.equal(ours, theirs)
