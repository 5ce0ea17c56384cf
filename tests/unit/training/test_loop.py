"""The training step: what it counts, what it divides by, what it leaves alone."""

from functools import partial
from typing import Any

import pytest
import torch
from live import allocated_peak
from models import examples, hidden, tiny
from torch import Tensor
from torch.nn import functional as F

from lamina.adapter import LoRA, adapted, attach
from lamina.data.pack import pack
from lamina.model.decoder import Decoder
from lamina.training.loop import State, Step, Training, memory, rehearse, start, train
from lamina.training.optimizer import rate_factor, rule_of_thumb

FLOAT = 2.0**-24  # half the distance from 1 to the next fp32


def model_of(dropout: float = 0.0, dtype: torch.dtype = torch.float32, b: float = 0.1) -> Decoder:
    """A tiny model with an adapter whose B is random, the same at every call."""
    model = tiny(dtype=dtype)
    modules = attach(model, LoRA(rank=4, dropout=dropout))
    torch.manual_seed(1)
    for module in modules.values():
        torch.nn.init.normal_(module.b, std=b)
    return model


def weights(model: Decoder) -> dict[str, Tensor]:
    return {f"{path}.{f}": getattr(m, f).detach().clone() for path, m in adapted(model).items() for f in "ab"}


def gradients_at(state: State) -> list[list[Tensor]]:
    """The gradients that AdamW is given at each step, collected while the run goes on."""
    seen: list[list[Tensor]] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    state.optimizer.register_step_pre_hook(look)
    return seen


def run(model: Decoder, count: int = 16, seed: int = 0, **settings: Any) -> tuple[list[Step], list[list[Tensor]]]:
    training = Training(**{"batch_size": 8, "learning_rate": 1e-3, **settings})
    state = start(model, training)
    gradients = gradients_at(state)
    return list(train(model, examples(count), training, state, seed)), gradients


def test_a_step_says_what_it_did() -> None:
    data, training = examples(10), Training(batch_size=4, learning_rate=1e-3, schedule="linear", warmup=0.5, epochs=2)
    model, reference = model_of(), model_of()
    for step in train(model, data, training, start(model, training), seed=3):
        expected, supervised, real = 0.0, 0, 0
        rows = order(step.step - 1, 4, 10, 20)
        for row in rows:
            tokens = torch.from_numpy(data[row].tokens.astype("int64"))
            logits = F.linear(hidden(reference, tokens, [len(tokens)]), reference.vocabulary)
            losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")[data[row].trained[1:]]
            expected, supervised, real = expected + losses.sum().item(), supervised + len(losses), real + len(tokens)
        # Two orders of summing some fifty losses of a few nats in fp32, each from sums of 32 products: 1e-5 is 84 ε.
        assert step.loss == pytest.approx(expected / supervised, rel=1e-5)
        assert (step.supervised_tokens, step.tokens) == (supervised, real)
        assert step.learning_rate == 1e-3 * rate_factor(step.step - 1, 5, "linear", 0.5)
        assert step.seconds > 0 and step.memory_bytes > 0
        reference.load_state_dict(model.state_dict())
    assert step.step == 5


def order(step: int, batch: int, count: int, last: int) -> list[int]:
    from lamina.training.order import rows_of_step

    return rows_of_step(step, count, batch, 3, last)


@pytest.mark.parametrize("budget", [1, 30])
def test_how_a_step_is_split_changes_nothing(budget: int) -> None:
    """8 × 1 (a budget of one token), 1 × 8, and between. In float64 the only roundings that depend on the split are those
    of the fp32 masters' gradients: each of up to 8 parts is rounded once and added once, and their sum divided, each to
    2⁻²⁴ of what it is. Parts cancel: their norms add up to at most ``cancelled`` times that of the sum."""
    parts, cancelled = 8, 8
    whole, split = model_of(dtype=torch.float64), model_of(dtype=torch.float64)
    (one,), (expected,) = run(whole, 8, micro_batch_tokens=10**6, clip=None)
    (other,), (found,) = run(split, 8, micro_batch_tokens=budget, clip=None)
    assert one.loss == pytest.approx(other.loss, rel=1e-12)
    assert one.supervised_tokens == other.supervised_tokens
    for a, b in zip(expected, found, strict=True):
        assert (a - b).norm() <= (2 * parts + 1) * FLOAT * cancelled * a.norm()
    # AdamW's first step moves by rate · g / (|g| + ε), and |f(g) - f(h)| ≤ 2|g - h| / (max(|g|, |h|) + ε); computing it
    # in fp32 takes some ten roundings of numbers of at most the rate, and of the weight itself.
    for a, b, before, after in zip(expected, found, weights(whole).values(), weights(split).values(), strict=True):
        moved = 2 * (a - b).abs() / (torch.maximum(a.abs(), b.abs()) + 1e-8)
        assert ((before - after).abs() <= 1e-3 * (moved + 10 * FLOAT) + 2 * FLOAT * before.abs()).all()


def test_the_step_is_split_at_all() -> None:
    """Else the test above would compare a run with itself."""
    calls: list[int] = []
    model = model_of()
    model.register_forward_hook(lambda *_: calls.append(1))
    run(model, 8, micro_batch_tokens=1)
    assert len(calls) == 8
    run(model, 8, micro_batch_tokens=10**6)
    assert len(calls) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_layers_train_the_same_bits(dtype: torch.dtype) -> None:
    kept, recomputed = model_of(dropout=0.2, dtype=dtype), model_of(dropout=0.2, dtype=dtype)
    one, _ = run(kept, checkpoint_layers=0)
    other, _ = run(recomputed, checkpoint_layers=2)
    assert [step.loss for step in one] == [step.loss for step in other]
    assert all(torch.equal(a, b) for a, b in zip(weights(kept).values(), weights(recomputed).values(), strict=True))


def test_clipping() -> None:
    """AdamW is given the gradient scaled down to the limit, and the record has the norm before."""
    (free,), (gradient,) = run(model_of(), 8, clip=None)
    limit = free.grad_norm / 3
    (cut,), (clipped,) = run(model_of(), 8, clip=limit)
    (loose,), (untouched,) = run(model_of(), 8, clip=free.grad_norm * 3)

    def norm(tensors: list[Tensor]) -> float:
        return torch.stack([tensor.norm() for tensor in tensors]).norm().item()

    assert free.grad_norm == cut.grad_norm == loose.grad_norm == pytest.approx(norm(gradient), rel=1e-6)
    assert norm(clipped) == pytest.approx(limit, rel=1e-5)  # torch divides by norm + 1e-6
    assert all(torch.equal(a, b) for a, b in zip(gradient, untouched, strict=True))


def test_only_the_adapter_moves_and_all_of_it() -> None:
    model = model_of()
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = weights(model)
    run(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert not any(torch.equal(after, before[name]) for name, after in weights(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_it_learns() -> None:
    steps, _ = run(model_of(b=0.0), count=8, steps=40, learning_rate=1e-2)
    assert steps[0].loss > 4.5 and steps[-1].loss < 1.5  # from beyond ln 96 = 4.56 to memorised


def test_dropout_is_a_function_of_seed_and_step() -> None:
    def losses(seed: int, noise: bool) -> list[float]:
        model, training = model_of(dropout=0.5), Training(batch_size=4, learning_rate=1e-3)
        found = []
        for step in train(model, examples(4) * 4, training, start(model, training), seed):
            found.append(step.loss)
            if noise:  # evaluation between the steps, which draws numbers and leaves the model in evaluation mode
                torch.rand(100)
                model.eval()
        return found

    calm = losses(0, noise=False)
    assert losses(0, noise=True) == calm
    assert losses(1, noise=False) != calm
    model, training = model_of(dropout=0.0), Training(batch_size=4, learning_rate=1e-3)
    assert next(train(model, examples(4) * 4, training, start(model, training), 0)).loss != calm[0]


@pytest.mark.parametrize("left", [1.0, float("nan")])
def test_a_gradient_that_was_left_is_no_part_of_a_step(left: float) -> None:
    """By a step that was broken off, or by whoever looked between two steps; in a rehearsal too."""
    model, disturbed = model_of(), model_of()
    training, data = Training(batch_size=4, learning_rate=1e-3), examples(16)
    expected = [step.grad_norm for step in train(model, data, training, start(model, training), 0)]

    def leave() -> None:
        for parameter in disturbed.parameters():
            parameter.grad = torch.full_like(parameter, left) if parameter.requires_grad else None

    leave()
    rehearse(disturbed, pack(data[:3], 1000)[0], training)
    leave()
    found = []
    for step in train(disturbed, data, training, start(disturbed, training), 0):
        found.append(step.grad_norm)
        leave()
    assert found == expected


def test_a_rehearsal_holds_what_is_not_there_yet() -> None:
    """By torch's own record of what is alive while the loss is computed."""
    model, training, (batch,) = model_of(), Training(), pack(examples(2), 1000)
    peaks = [allocated_peak(partial(rehearse, model, batch, training, beside=more)) for more in (0, 10**6)]
    assert peaks[1] - peaks[0] == pytest.approx(10**6, rel=1e-3)


def test_length_of_a_run_and_its_rate() -> None:
    assert Training(batch_size=4, epochs=1.5).total_steps(10) == 4
    assert Training(batch_size=4, epochs=1.5, steps=7).total_steps(10) == 7
    model = tiny()
    assert Training().rate(model) == rule_of_thumb(32, "llama")
    assert Training(learning_rate=0.5).rate(model) == 0.5
    assert [step.step for step in run(model_of(), count=5, steps=4, batch_size=3)[0]] == [1, 2, 3, 4]


def test_rehearsal_computes_a_batch_and_leaves_no_trace() -> None:
    model, data = model_of(dropout=0.5), examples(20)
    before = weights(model)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    training = Training(batch_size=4, micro_batch_tokens=60, checkpoint_layers=1)
    (batch,) = pack(data[:3], 1000)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    rehearse(model, batch, training, beside=1000)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [len(batch.tokens)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_memory_is_in_bytes() -> None:
    assert 10**7 < memory(torch.device("cpu")) < 10**11
