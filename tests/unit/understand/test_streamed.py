"""Run from its files, layer by layer, a model gives the bits of the whole model, with and without an adapter."""

import json
from pathlib import Path

import pytest
import torch
from models import FAMILIES, config, examples, hidden, tiny
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lamina.adapter import LoRA, adapted, attach
from lamina.adapter_files import fingerprint, outline_adapter, save_adapter
from lamina.data.pack import pack
from lamina.model.weights import outline
from lamina.understand.streamed import streamed_logits

LAYOUT = LoRA(rank=4, targets=("q_proj", "mlp.up_proj", "down_proj"), rank_pattern={"up_proj": 2}, layers="1-2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_are_those_of_the_whole_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(family, dtype, num_hidden_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(config(family, num_hidden_layers=3)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    batches = pack(examples(7), 60)
    assert len(batches) > 1
    rows = [(batch.targets >= 0).nonzero().squeeze(1) for batch in batches]

    def whole():
        states = [hidden(model, batch.tokens, batch.lengths) for batch in batches]
        pairs = zip(states, rows, strict=True)
        return torch.cat([F.linear(x[chosen], model.vocabulary).float() for x, chosen in pairs])

    sketch, stored = outline(tmp_path, dtype)
    cpu = torch.device("cpu")
    base = torch.cat(streamed_logits(sketch, stored, {}, batches, rows, cpu))
    assert torch.equal(base, whole())

    for module in attach(model, LAYOUT).values():
        nn.init.normal_(module.b, std=0.1)
    save_adapter(model, tmp_path / "adapter", LAYOUT, "some/base")
    tensors = outline_adapter(sketch, tmp_path / "adapter", fingerprint(model))
    assert adapted(sketch).keys() == adapted(model).keys()
    found = torch.cat(streamed_logits(sketch, stored, tensors, batches, rows, cpu))
    assert torch.equal(found, whole())
    assert not torch.equal(found, base)
    assert all(parameter.is_meta for parameter in sketch.parameters()), "nothing stays in memory"
