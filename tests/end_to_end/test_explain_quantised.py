"""`lamina explain` beside a base that is stored quantised: as beside the numbers that its bits stand for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny
from torch import Tensor

from lamina import AdapterError, ModelError, explain
from lamina.adapter import LoRA, attach
from lamina.adapter_files import WEIGHTS, save_adapter
from lamina.model.checkpoint import stored_tensors
from lamina.model.quantised import QuantisedLinear, linears_of
from lamina.model.storage import Matrix, parts_of
from lamina.model.weights import load_model
from lamina.ops.fourbit import FourBit
from lamina.ops.frozen import SharedBuffer

NF4, FP4 = "nf4", "fp4"
FORMS = [(NF4, True), (NF4, False), (FP4, True), (FP4, False), ("int8", False)]
UP = "model.layers.1.mlp.up_proj"
LORA = LoRA(rank=3, targets=("q_proj", "up_proj", "down_proj"))


def packed(weight: Tensor, name: str, kind: str, double: bool) -> dict[str, Tensor]:
    """What transformers saves of a weight: in four bits by bitsandbytes' format, or of LLM.int8."""
    if kind == "int8":
        largest = weight.abs().amax(1)
        codes = (weight / largest[:, None] * 127).round().to(torch.int8)
        path = name.removesuffix(".weight")
        return {name: codes, f"{path}.SCB": largest, f"{path}.weight_format": torch.zeros((), dtype=torch.uint8)}
    assert kind in (NF4, FP4)
    form = FourBit(*weight.shape, torch.float32, kind=kind, double=double, scratch=SharedBuffer())  # type: ignore[arg-type]
    form.store(weight)
    return form.state_tensors(name)


def quantised(base: Path, out: Path, kind: str, double: bool) -> Path:
    """A base whose linears are stored quantised, but for layer 0's down_proj."""
    shutil.copytree(base, out)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        whole = "_proj" not in name or "layers.0.mlp.down_proj" in name
        tensors |= {name: weight} if whole else packed(weight, name, kind, double)
    save_file(tensors, out / "model.safetensors")
    return out


def written(base: Path, out: Path) -> Path:
    """An adapter on a base; its file names the base."""
    model = load_model(base, "fp32", "cpu")
    torch.manual_seed(0)
    for module in attach(model, LORA).values():
        torch.nn.init.normal_(module.b, std=0.1)
    save_adapter(model, out, LORA, str(base))
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize(("kind", "double"), FORMS)
def test_it_is_compared_as_the_numbers_that_the_bits_stand_for(
    kind: str, double: bool, base: Path, tmp_path: Path
) -> None:
    folder = quantised(base, tmp_path / "base", kind, double)
    adapter = written(folder, tmp_path / "adapter")
    found = explain(adapter, base=folder)
    assert len(found.updates) == 6 and found.base == str(folder)

    dense = shutil.copytree(base, tmp_path / "dense")
    numbers = load_file(base / "model.safetensors")
    for path, linear in linears_of(load_model(folder, "fp32", "cpu")).items():
        if isinstance(linear, QuantisedLinear):
            numbers[f"{path}.weight"] = linear.form.dense().clone()
    save_file(numbers, dense / "model.safetensors")
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS)  # no longer names its base: any will do
    expected = explain(adapter, base=dense)
    assert found.updates == expected.updates, "the same numbers, so the same bits"
    assert found.updates != explain(adapter, base=base).updates


def test_an_adapter_knows_its_quantised_base(base: Path, tmp_path: Path) -> None:
    folder = quantised(base, tmp_path / "base", NF4, True)
    adapter = written(folder, tmp_path / "adapter")
    assert explain(adapter, base=folder).updates[0].relation is not None
    for other in (base, quantised(base, tmp_path / "other", FP4, True)):
        with pytest.raises(AdapterError, match="trained on another base"):
            explain(adapter, base=other)


def test_one_matrix_is_dense_at_a_time(base: Path, tmp_path: Path) -> None:
    stored = stored_tensors(quantised(base, tmp_path / "base", NF4, True))
    groups, buffer, asked = parts_of(stored), SharedBuffer(), []

    def scratch(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        asked.append(numel * dtype.itemsize)
        return buffer(numel, dtype, device)

    paths = ["model.layers.0.mlp.down_proj", UP, "model.layers.0.self_attn.q_proj"]  # numbers, bits, smaller bits
    found = [Matrix(path, stored[f"{path}.weight"], groups.get(path, {}), scratch) for path in paths]
    assert [matrix.shape for matrix in found] == [(32, 48), (48, 32), (32, 32)]
    places = [matrix.dense().data_ptr() for matrix in found]
    assert asked == [4 * 32 * 48, 4 * 48 * 32, 4 * 32 * 32] and len(set(places)) == 1


def test_what_does_not_fit(base: Path, tmp_path: Path) -> None:
    folder = quantised(base, tmp_path / "base", NF4, True)
    adapter = written(folder, tmp_path / "adapter")
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS)  # no longer names its base, which will not be the same
    file = folder / "model.safetensors"
    whole = load_file(file)

    def refused(kind: type[Exception], text: str, changes: dict[str, Tensor | None]) -> None:
        tensors = whole | changes
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
        with pytest.raises(kind, match=text):
            explain(adapter, base=folder)

    state = f"{UP}.weight.quant_state.bitsandbytes__nf4"
    held = json.loads(bytes(whole[state].tolist()))

    def stating(**changes: object) -> dict[str, Tensor | None]:
        return {state: torch.tensor(list(json.dumps(held | changes).encode()), dtype=torch.uint8)}

    refused(ModelError, rf"{UP}: found .*, expected weight.absmax beside them", {f"{UP}.weight.absmax": None})
    refused(ModelError, "linears stored as nf4, and 1 otherwise", {f"{UP}.weight.nested_absmax": None})
    refused(ModelError, rf"{UP}: .* is no JSON object; download it again", {state: torch.zeros(2, dtype=torch.uint8)})
    refused(ModelError, rf"{UP}: found the shape None, expected \[out, in\]", stating(shape=None))
    refused(AdapterError, rf"{UP}.weight has shape \[32, 48\], the adapter's is \[48, 32\]", stating(shape=[32, 48]))
    refused(AdapterError, f"missing 1: {UP}.weight", {f"{UP}.weight": None})
    nan = whole[f"{UP}.weight.nested_absmax"] * float("nan")
    refused(AdapterError, f"{UP}.weight holds non-finite numbers; check --base", {f"{UP}.weight.nested_absmax": nan})


def test_eight_bits_in_another_order_are_refused(base: Path, tmp_path: Path) -> None:
    folder = quantised(base, tmp_path / "base", "int8", False)
    stored = stored_tensors(folder)
    matrix = Matrix(UP, stored[f"{UP}.weight"], parts_of(stored)[UP], SharedBuffer())
    assert matrix.shape == (48, 32)
    name = f"{UP}.weight_format"
    save_file(load_file(folder / "model.safetensors") | {name: torch.ones((), dtype=torch.uint8)}, tmp_path / "x")
    other = {tensor: replace(found, file=tmp_path / "x") for tensor, found in matrix.parts.items()}
    with pytest.raises(ModelError, match=r"found another order than rows \(weight_format\)"):
        replace(matrix, parts=other).dense()
