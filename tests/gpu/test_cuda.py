"""The same numbers on a GPU: fp32 within rounding of the CPU's, and the whole road on the device."""

import pytest
import torch
from models import places, tiny

from lamina.adapter import LoRA, adapted, attach
from lamina.generation import Sampling, generate
from lamina.ops.attention import Packed
from lamina.ops.loss import cross_entropy_sum

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


def test_bf16_is_no_worse_than_on_the_cpu() -> None:
    _, truth = gradients("cpu", torch.float32)
    _, cpu = gradients("cpu", torch.bfloat16)
    _, cuda = gradients("cuda", torch.bfloat16)
    assert distance(cuda, truth) <= 1.2 * distance(cpu, truth)


def test_greedy_text_equals_the_cpu() -> None:
    prompts = [[1, 5, 9], [3] * 20, [7, 8]]
    sampling = Sampling(max_new_tokens=24)
    on_cpu = generate(tiny(), prompts, sampling, {2}, 0)
    assert generate(tiny().cuda(), prompts, sampling, {2}, 0) == on_cpu
