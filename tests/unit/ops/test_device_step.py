"""A whole step through the kernels for CUDA, by Triton's interpreter: that each op hands them what they expect."""

import pytest
import torch
from models import places, tiny
from torch import Tensor

from lamina import cuda, native
from lamina.adapter import LoRA, adapted, attach
from lamina.model.quantised import QuantisedLinear, linears_of, new_form, replace
from lamina.ops.attention import Packed
from lamina.ops.frozen import SharedBuffer
from lamina.ops.loss import cross_entropy_sum

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: tests/gpu")
LENGTHS = [5, 17, 1, 9]


def gradients(dtype: torch.dtype, base: str | None = None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one packed batch, of which half of the tokens have a target."""
    model = tiny("llama-grouped")
    scratch = SharedBuffer()
    for path, linear in linears_of(model).items() if base else ():
        form = new_form(base, linear.out_features, linear.in_features, True, dtype, scratch)
        form.store(linear.weight)
        replace(model, path, QuantisedLinear(form, linear.out_features, linear.in_features, linear.bias))
    for module in attach(model, LoRA(rank=4)).values():
        torch.nn.init.normal_(module.b, std=0.1, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if not name.endswith((".a", ".b")):
            parameter.data = parameter.data.to(dtype)
    tokens, targets = torch.randint(0, 96, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    targets[::2] = -100
    hidden = model(tokens, places(LENGTHS), Packed(LENGTHS), 1)
    loss, count = cross_entropy_sum(hidden, model.vocabulary, targets)
    loss.backward()
    found = {f"{path}.{n}": p.grad for path, m in adapted(model).items() for n, p in (("a", m.a), ("b", m.b))}
    return loss.item() / count, found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative distance of two sets of gradients."""
    off = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (off / sum(float(tensor.square().sum()) for tensor in other.values())) ** 0.5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Sends bf16 on the CPU to the kernels for CUDA; which were called."""
    from lamina.cuda import eights, rows, scores

    called: set[str] = set()

    def noted(name: str, function):
        def call(*arguments, **settings):
            called.add(name)
            return function(*arguments, **settings)

        return call

    for module, names in ((rows, "norm norm_back gate gate_back rotate"), (scores, "cross_entropy")):
        for name in names.split():
            monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    for name in ("quantise_rows", "transpose"):
        monkeypatch.setattr(eights, name, noted(name, getattr(eights, name)))
    monkeypatch.setattr(native, "takes", lambda *tensors: False)
    monkeypatch.setattr(cuda, "available", lambda device, dtype: dtype == torch.bfloat16)
    return called


def test_a_step_is_near_the_one_by_torch(calls: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts off where a GPU rounds: twice the error of each operation, and all of it in one direction."""
    exact, truth = gradients(torch.float32)
    loss, ours = gradients(torch.bfloat16)
    assert calls == {"norm", "norm_back", "gate", "gate_back", "rotate", "cross_entropy"}
    monkeypatch.setattr(cuda, "available", lambda device, dtype: False)
    usual, plain = gradients(torch.bfloat16)
    assert distance(ours, truth) <= 4 * distance(plain, truth)
    assert abs(loss - exact) <= 4 * max(abs(usual - exact), 2**-8 * exact)


@pytest.mark.slow
def test_a_step_over_fp8_takes_its_kernels(calls: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = gradients(torch.bfloat16, "fp8")
    assert {"quantise_rows", "transpose"} <= calls
    monkeypatch.setattr(cuda, "available", lambda device, dtype: False)
    _, plain = gradients(torch.bfloat16, "fp8")
    assert distance(ours, plain) <= 0.25
