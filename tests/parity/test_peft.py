"""Training as PEFT, transformers and torch do it, by a plain loop with padding: the same gradients, the same losses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import error, examples, hosted, peft_model, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.adapter import LoRA, adapted, attach
from lamina.adapter_files import save_adapter
from lamina.data.pack import pack
from lamina.data.render import Rendered
from lamina.model.decoder import Decoder
from lamina.training.loop import Training, backward, start, train
from lamina.training.order import rows_of_step

LORA = LoRA(rank=4, alpha=6)


def pair(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, b: float = 0.0, **size: int) -> Any:
    """Our model with an adapter, and PEFT's with the same one, ready to train."""
    model = tiny(family, dtype, **size)
    guest = hosted(model, family, **size)
    for module in attach(model, LORA, seed=2).values():
        nn.init.normal_(module.b, std=b)
    save_adapter(model, folder, LORA, "some/base")
    return model.train(), peft_model(guest, folder, is_trainable=True).train()


def ours(model: Decoder, data: list[Rendered], budget: int = 60) -> dict[str, Tensor]:
    """The gradient of the step's mean loss, by PEFT's names."""
    batches = pack(data, budget)
    assert len(batches) > 1
    supervised = sum(batch.supervised for batch in batches)
    for batch in batches:
        backward(model, batch, Training())
    found = {
        f"{path}.lora_{f.upper()}": getattr(m, f).grad / supervised for path, m in adapted(model).items() for f in "ab"
    }
    model.zero_grad()
    return found


def padded_loss(guest: Any, data: list[Rendered]) -> Tensor:
    """Mean loss over the supervised tokens of examples padded to one length."""
    rows, longest = len(data), max(len(example.tokens) for example in data)
    tokens, labels = torch.zeros(rows, longest, dtype=torch.int64), torch.full((rows, longest), -100)
    mask = torch.zeros(rows, longest, dtype=torch.int64)
    for row, example in enumerate(data):
        length = len(example.tokens)
        ids = torch.from_numpy(example.tokens.astype("int64"))
        tokens[row, :length], mask[row, :length] = ids, 1
        labels[row, :length] = ids.where(torch.from_numpy(example.trained), -100)
    logits = guest(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def theirs(guest: Any, data: list[Rendered]) -> dict[str, Tensor]:
    guest.zero_grad()
    padded_loss(guest, data).backward()
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter.grad
        for name, parameter in guest.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "mistral", "qwen2", "qwen3"])
def test_gradients_of_the_first_step(family: str, tmp_path: Path) -> None:
    """The bound is the project's gate, 84 ε of fp32; two ways to sum the same products differ by a few."""
    model, guest = pair(tmp_path, family, b=0.1, num_hidden_layers=4)
    data = examples(8)
    found, expected = ours(model, data), theirs(guest, data)
    assert found.keys() == expected.keys() and len(found) == 4 * 7 * 2
    for name, gradient in expected.items():
        assert error(found[name], gradient) < 1e-5, name


def test_a_fresh_adapter_has_a_gradient_in_every_b_and_in_no_a(tmp_path: Path) -> None:
    model, guest = pair(tmp_path)
    data = examples(8)
    found, expected = ours(model, data), theirs(guest, data)
    for name, gradient in expected.items():
        if name.endswith("lora_A"):
            assert not gradient.any() and not found[name].any()
        else:
            assert error(found[name], gradient) < 1e-5, name


def rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Cosine to zero after a warm-up that reaches the peak with its last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@pytest.mark.slow
def test_fifty_steps(tmp_path: Path) -> None:
    """Decay, clipping, cosine with warm-up, four micro-batches a step here and one padded batch there. The bound is the
    project's gate; losses are about 4."""
    steps, batch, peak = 50, 8, 5e-3
    training = Training(
        steps=steps, batch_size=batch, micro_batch_tokens=40, learning_rate=peak, schedule="cosine", warmup=0.1,
        weight_decay=0.1, clip=0.3, betas=(0.9, 0.99), checkpoint_layers=1,
    )  # fmt: skip
    model, guest = pair(tmp_path, "llama-grouped", num_hidden_layers=3)
    data = examples(60)
    found = [(step.loss, step.grad_norm) for step in train(model, data, training, start(model, training), seed=4)]

    learns = [parameter for parameter in guest.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=peak, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    expected = []
    for step in range(steps):
        loss = padded_loss(guest, [data[row] for row in rows_of_step(step, len(data), batch, 4)])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learns, 0.3)
        optimizer.param_groups[0]["lr"] = rate(step, steps, 5, peak)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item()))

    assert len(found) == steps
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True)) < 1e-4
    assert any(norm > 0.3 for _, norm in expected), "nothing was clipped"
    assert expected[-1][0] < expected[0][0] - 0.3, "nothing was learnt"


def test_bf16_gradients_are_no_farther_from_the_truth_than_those_of_peft(tmp_path: Path) -> None:
    """1.2: the rule of the house. The truth is fp32 on the same bf16 weights. PEFT computes its adapter's part in fp32, we
    in bf16, and both inherit the errors of the base's activations. Which error a single tensor meets is luck, so the
    norms of all tensors' errors are added, each relative to its tensor."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    data = examples(16)
    model, guest = pair(tmp_path, dtype=torch.bfloat16, b=0.1, **size)
    found, reference = ours(model, data), theirs(guest, data)
    truth = ours(model.float(), data)
    mistakes = {name: (error(found[name], truth[name]), error(reference[name], truth[name])) for name in truth}
    mine, peft = (sum(pair) for pair in zip(*mistakes.values(), strict=True))
    assert 0.001 * len(truth) < peft < 0.1 * len(truth), "bf16 or not at all"
    assert mine <= 1.2 * peft
