"""The same numbers on a GPU: fp32 within rounding of the CPU's, and the whole road on the device."""

import numpy as np
import pytest
import torch
from models import places, tiny
from torch import Tensor

from lamina import cuda
from lamina.adapter import AdaptedLinear, LoRA, adapted, attach
from lamina.data.pack import pack
from lamina.data.render import Rendered
from lamina.generation import Sampling, generate
from lamina.model import decoder
from lamina.ops.attention import Packed
from lamina.ops.lora import plain
from lamina.ops.loss import cross_entropy_sum
from lamina.training.loop import Training, backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = [5, 17, 1, 30]


def gradients(device: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one packed batch on a device, computed in ``dtype``, given back in fp32 on the CPU."""
    model = tiny("llama-grouped")
    for module in attach(model, LoRA(rank=4)).values():
        torch.nn.init.normal_(module.b, std=0.1)
    model = model.to(device)
    for name, parameter in model.named_parameters():
        if not name.endswith((".a", ".b")):
            parameter.data = parameter.data.to(dtype)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, 96, (sum(LENGTHS),), generator=generator).to(device) for _ in range(2))
    hidden = model(tokens, places(LENGTHS).to(device), Packed(LENGTHS), 1)
    loss, count = cross_entropy_sum(hidden, model.vocabulary, targets)
    loss.backward()
    found = {f"{path}.{n}": p.grad.cpu() for path, m in adapted(model).items() for n, p in (("a", m.a), ("b", m.b))}
    return loss.item() / count, found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative distance of two sets of gradients."""
    off = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (off / sum(float(tensor.square().sum()) for tensor in other.values())) ** 0.5


def test_fp32_equals_the_cpu() -> None:
    """fp32 products are rounded in another order: 2⁻²⁴ times the square root of the longest sum, a few hundred terms."""
    loss, found = gradients("cuda", torch.float32)
    expected_loss, expected = gradients("cpu", torch.float32)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert distance(found, expected) < 1e-5


def test_bf16_is_no_worse_than_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain path: the formula of the adapter in autograd's own graph, and none of our kernels."""
    _, truth = gradients("cpu", torch.float32)
    _, ours = gradients("cuda", torch.bfloat16)
    monkeypatch.setattr(cuda, "available", lambda device, dtype: False)
    monkeypatch.setattr(AdaptedLinear, "forward", by_autograd)
    monkeypatch.setattr(decoder, "together", lambda x, *linears: [linear(x) for linear in linears])
    _, usual = gradients("cuda", torch.bfloat16)
    assert distance(ours, truth) <= 1.2 * distance(usual, truth)


def by_autograd(module: AdaptedLinear, x: Tensor) -> Tensor:
    a, b = module.a.to(x.dtype), module.b.to(x.dtype)
    return plain(x, x, module.base.weight, module.base.bias, a, b, module.scale)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_micro_batch_does_not_wait_for_the_device() -> None:
    """Between the batch's way to the device and its loss nothing asks the device for a number."""
    model = tiny("llama-grouped").bfloat16()
    attach(model, LoRA(rank=4))
    model.cuda()
    examples = [Rendered(np.arange(3, 40, dtype=np.int32), np.arange(37) > n, n) for n in (1, 5, 20)]
    (batch,) = pack(examples, 200)
    backward(model, batch, Training())
    try:
        torch.cuda.set_sync_debug_mode("error")
        backward(model, batch, Training())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_greedy_text_equals_the_cpu() -> None:
    prompts = [[1, 5, 9], [3] * 20, [7, 8]]
    sampling = Sampling(max_new_tokens=24)
    on_cpu = generate(tiny(), prompts, sampling, {2}, 0)
    assert generate(tiny().cuda(), prompts, sampling, {2}, 0) == on_cpu
