"""The fingerprint is of the base, whatever lies on it and however it is stored, and no other model has it."""

import json
from pathlib import Path

import pytest
import torch
from models import FAMILIES, config, tiny
from safetensors.torch import save_file
from torch import Tensor, nn

from lamina.adapter import LoRA, attach, detach
from lamina.model.fingerprint import fingerprint, stored_fingerprint
from lamina.model.weights import outline


def test_it_is_of_the_base_whatever_lies_on_it() -> None:
    model = tiny()
    base = fingerprint(model)
    attach(model, LoRA(rank=4))
    assert fingerprint(model) == base
    detach(model)
    assert fingerprint(model.bfloat16()) == base, "an adapter may be used on the base in another dtype"


def test_every_tensor_counts() -> None:
    model = tiny("qwen3", attention_bias=True)
    base = fingerprint(model)

    def moved(parameter: Tensor) -> str:
        before = parameter.clone()
        parameter.data[0] += 0.5
        found = fingerprint(model)
        parameter.data.copy_(before)
        return found

    parameters = list(model.parameters())
    assert len({base, *map(moved, parameters)}) == 1 + len(parameters)
    assert fingerprint(model) == base


def test_a_model_with_an_adapter_merged_in_is_another_base() -> None:
    """Norms and embedding are the base's; one adapted matrix in one layer is enough."""
    model = tiny()
    base = fingerprint(model)
    module = attach(model, LoRA(rank=4, targets=("up_proj",), layers="1"))["model.layers.1.mlp.up_proj"]
    nn.init.normal_(module.b, std=0.1)
    detach(model)
    module.base.weight.data += module.scale * module.b.detach() @ module.a.detach()
    assert fingerprint(model) != base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_have_the_fingerprint_of_what_is_loaded_from_them(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny(family, dtype)
    (tmp_path / "config.json").write_text(json.dumps(config(family)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert stored_fingerprint(*architecture_and_files(tmp_path)) == fingerprint(model)


def architecture_and_files(folder: Path):
    made, stored = outline(folder, torch.float32)
    return made.architecture, stored
