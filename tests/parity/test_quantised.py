"""Quantised bases against transformers + bitsandbytes + PEFT: the same stored bits, the same logits, files both ways."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import error, peft_model, places, some_tokens
from tiny import write_tiny
from torch import Tensor
from torch.nn import functional as F

from lamina.adapter import LoRA, adapted, attach
from lamina.adapter_files import save_adapter
from lamina.errors import ConfigError, ModelError
from lamina.explaining import explain
from lamina.model.decoder import Decoder
from lamina.model.quantised import QuantisedLinear, linears_of
from lamina.model.weights import DTYPES, load_model
from lamina.ops.attention import Packed
from lamina.ops.library import bitsandbytes

pytestmark = pytest.mark.slow

# Rows of whole blocks: bitsandbytes 0.50.2 dequantises others wrongly on AVX-512.
SIZE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_key_value_heads": 2}
STATE = "weight.quant_state.bitsandbytes__nf4"
FORMS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
LORA = LoRA(rank=4, targets=("q_proj", "v_proj", "up_proj", "down_proj"))


def base(place: Path, stored: torch.dtype = torch.bfloat16) -> Path:
    return write_tiny(place / "base", stored, **SIZE)


def hosted(folder: Path, dtype: torch.dtype, kind: str | None = None, double: bool = True) -> Any:
    """The model in transformers; quantised by bitsandbytes while loading, where ``kind`` says so."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bitsandbytes()  # its first import warns of an optional package
    config = None
    if kind is not None:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map="cpu"
    ).eval()


def logits(model: Decoder, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(model(tokens, places([len(tokens)]), Packed([len(tokens)])), model.vocabulary)


def theirs(model: Any, tokens: Tensor) -> Tensor:
    return with_gradient(model, tokens).detach()


def with_gradient(model: Any, tokens: Tensor) -> Tensor:
    """Their logits as training computes them (``prepare_model_for_kbit_training``): where the input of a linear has no
    gradient, bitsandbytes takes another kernel, which rounds to bf16."""
    embedded = model.get_input_embeddings()(tokens[None]).detach().requires_grad_()
    found: Tensor = model(inputs_embeds=embedded).logits[0]
    return found


def ids(count: int = 40) -> Tensor:
    return some_tokens([count]) % 64


@pytest.mark.parametrize(("kind", "double"), FORMS)
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_logits_are_those_of_bitsandbytes_bit_for_bit_in_fp32(
    kind: str, double: bool, stored: torch.dtype, tmp_path: Path
) -> None:
    folder = base(tmp_path, stored)
    model = load_model(folder, "fp32", "cpu", base=kind, double_quant=double)
    assert all(isinstance(linear, QuantisedLinear) for linear in linears_of(model).values())
    assert torch.equal(logits(model, ids()), theirs(hosted(folder, torch.float32, kind, double), ids()))


@pytest.mark.parametrize(("kind", "double"), FORMS)
def test_an_adapter_gives_the_same_logits_in_peft_over_bitsandbytes(kind: str, double: bool, tmp_path: Path) -> None:
    """bf16: the error to the fp32 truth, with the same four-bit weights, is at most 1.2 times theirs."""
    folder = base(tmp_path)
    model = load_model(folder, "bf16", "cpu", base=kind, double_quant=double)
    for module in attach(model, LORA).values():
        torch.nn.init.normal_(module.b, std=0.1)
    save_adapter(model, tmp_path / "adapter", LORA, str(folder))
    ours = logits(model, ids())
    guest = peft_model(hosted(folder, torch.bfloat16, kind, double), tmp_path / "adapter")

    wide = load_model(folder, "bf16", "cpu", base=kind, double_quant=double)
    dense = {f"{path}.weight": linear.form.dense().float() for path, linear in linears_of(wide).items()}  # type: ignore[union-attr]
    truth = load_model(folder, "fp32", "cpu")
    for name, weight in dense.items():
        truth.get_parameter(name).data.copy_(weight)
    for name, parameter in truth.named_parameters():
        if name not in dense:
            parameter.data.copy_(wide.get_parameter(name))
    for path, module in attach(truth, LORA).items():
        module.load_state_dict(
            {name: value for name, value in adapted(model)[path].state_dict().items() if name in "ab"}, strict=False
        )
    exact = logits(truth, ids())
    assert error(ours, exact) <= 1.2 * error(theirs(guest, ids()), exact)
    assert error(ours, exact) < 0.05


@pytest.mark.parametrize(("kind", "double"), FORMS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_transformers_saved_in_four_bits_loads_as_it_is(
    kind: str, double: bool, dtype: Any, tmp_path: Path
) -> None:
    folder = base(tmp_path)
    hosted(folder, DTYPES[dtype], kind, double).save_pretrained(tmp_path / "saved")
    found = load_model(tmp_path / "saved", dtype, "cpu")
    made = load_model(folder, dtype, "cpu", base=kind, double_quant=double)
    for path, linear in linears_of(found).items():
        buffers = dict(linears_of(made)[path].named_buffers())
        assert buffers, path
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in linear.named_buffers()), path
    assert torch.equal(logits(found, ids()), logits(made, ids()))


def test_what_transformers_saved_in_eight_bits_loads_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bitsandbytes()
    config = BitsAndBytesConfig(load_in_8bit=True)
    folder = base(tmp_path)
    guest = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    guest.save_pretrained(tmp_path / "saved")
    model = load_model(tmp_path / "saved", "fp32", "cpu")
    theirs_up = guest.model.layers[1].mlp.up_proj.weight
    ours_up = linears_of(model)["model.layers.1.mlp.up_proj"].form.dense()  # type: ignore[union-attr]
    expected = theirs_up.data.float() * theirs_up.SCB[:, None] / 127
    # One product in fp32 against two: two roundings apart.
    torch.testing.assert_close(ours_up, expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def saved_without(folder: Path, out: Path, *skipped: str) -> Any:
    """Saved by transformers in four bits, but for the linears that are named; returns their model in fp32."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bitsandbytes()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=list(skipped),
    )
    guest = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    guest.save_pretrained(out)
    return guest.eval()


def test_linears_that_were_left_in_numbers_stay_numbers(tmp_path: Path) -> None:
    guest = saved_without(base(tmp_path), tmp_path / "saved", "lm_head", "down_proj")
    model = load_model(tmp_path / "saved", "fp32", "cpu")
    kinds = {path.rsplit(".", 1)[1]: isinstance(linear, QuantisedLinear) for path, linear in linears_of(model).items()}
    assert kinds == {name: name != "down_proj" for name in kinds} and len(kinds) == 7
    assert torch.equal(logits(model, ids()), theirs(guest, ids()))


def test_a_head_in_four_bits_is_refused(tmp_path: Path) -> None:
    saved_without(base(tmp_path), tmp_path / "saved", "nothing")
    with pytest.raises(ModelError, match="lm_head.weight is stored as U8, expected F64, F32, F16 or BF16"):
        load_model(tmp_path / "saved", "fp32", "cpu")


@pytest.mark.parametrize("unknown", ["nf5", "none", ""])
def test_a_form_that_is_none_is_refused(unknown: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"base: found '{unknown}', expected one of bf16, fp32, nf4, fp4, int8, fp8"):
        load_model(base(tmp_path), "fp32", "cpu", base=unknown)
    with pytest.raises(ConfigError, match="base: found nf4 computed in torch.float64, expected bf16 or fp32"):
        load_model(base(tmp_path), torch.float64, "cpu", base="nf4")


def test_a_stored_form_is_not_turned_into_another(tmp_path: Path) -> None:
    hosted(base(tmp_path), torch.bfloat16, "nf4").save_pretrained(tmp_path / "saved")
    for other in ("bf16", "fp4", "int8"):
        with pytest.raises(
            ConfigError, match=f"base: found {other}, but .*saved stores its linears in nf4; leave base out"
        ):
            load_model(tmp_path / "saved", "bf16", "cpu", base=other)


def test_a_damaged_group_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hosted(base(tmp_path), torch.bfloat16, "nf4").save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    absmax = tensors.pop("model.layers.1.mlp.up_proj.weight.absmax")
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj: found .*, expected weight.absmax beside them"):
        load_model(tmp_path / "saved", "bf16", "cpu")
    whole = dict(tensors)
    for change, told in (
        ({"weight": None}, r"model.layers.1.mlp.up_proj"),
        (
            {"weight.nested_absmax": None},
            r"linears stored as nf4, and 1 otherwise, the first model.layers.1.mlp.up_proj with",
        ),
        (
            {STATE: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)},
            "bitsandbytes__nf4 is no JSON object; download it again",
        ),
        ({STATE: torch.tensor([255, 254], dtype=torch.uint8)}, "bitsandbytes__nf4 is no JSON object"),
        ({"weight.quant_map": torch.zeros(0)}, "quant_map is 0 other values, expected the 16 values of nf4"),
    ):
        damaged = {**whole, **{f"model.layers.1.mlp.up_proj.{part}": tensor for part, tensor in change.items()}}
        damaged["model.layers.1.mlp.up_proj.weight.absmax"] = absmax
        save_file({name: tensor for name, tensor in damaged.items() if tensor is not None}, file)
        with pytest.raises(ModelError, match=told):
            load_model(tmp_path / "saved", "bf16", "cpu")


def test_gradients_through_the_same_four_bits(tmp_path: Path) -> None:
    """fp32: the adapter's gradients are within 1e-5 of PEFT's over bitsandbytes, the project's gate."""
    folder = base(tmp_path)
    model = load_model(folder, "fp32", "cpu", base="nf4")
    for module in attach(model, LORA).values():
        torch.nn.init.normal_(module.b, std=0.1)
    save_adapter(model, tmp_path / "adapter", LORA, str(folder))
    guest = peft_model(hosted(folder, torch.float32, "nf4"), tmp_path / "adapter", is_trainable=True)
    tokens = ids()
    states = model(tokens, places([len(tokens)]), Packed([len(tokens)]))
    F.cross_entropy(F.linear(states, model.vocabulary)[:-1], tokens[1:]).backward()
    F.cross_entropy(with_gradient(guest, tokens)[:-1], tokens[1:]).backward()
    gradients = {name: parameter.grad for name, parameter in guest.named_parameters() if parameter.requires_grad}
    assert len(gradients) == 2 * len(adapted(model))
    for path, module in adapted(model).items():
        for factor, parameter in (("A", module.a), ("B", module.b)):
            expected = gradients[f"base_model.model.{path}.lora_{factor}.default.weight"]
            assert parameter.grad is not None and expected is not None
            assert error(parameter.grad, expected) < 1e-5, (path, factor)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_is_explained_beside_what_transformers_saved(kind: str, tmp_path: Path) -> None:
    """As beside the numbers that bitsandbytes makes of the saved bits, here given as an ordinary checkpoint."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = base(tmp_path)
    functional = bitsandbytes().functional
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
        guest = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
        )
    else:
        guest = hosted(folder, torch.float32, kind)
    guest.save_pretrained(tmp_path / "saved")
    numbers = load_file(folder / "model.safetensors")
    for path, linear in linears_of(load_model(folder, "fp32", "cpu")).items():
        weight = guest.get_submodule(path).weight
        if kind == "int8":
            numbers[f"{path}.weight"] = weight.data.float() * weight.SCB[:, None] / 127
        else:
            numbers[f"{path}.weight"] = functional.dequantize_4bit(weight.data, weight.quant_state).float()
        assert numbers[f"{path}.weight"].shape == (linear.out_features, linear.in_features)
    shutil.copytree(folder, tmp_path / "numbers")
    save_file(numbers, tmp_path / "numbers" / "model.safetensors")

    model = load_model(folder, "fp32", "cpu")
    for module in attach(model, LORA).values():
        torch.nn.init.normal_(module.b, std=0.1)
    save_adapter(model, tmp_path / "adapter", LORA, "x")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # as PEFT writes it: it does not name its base
    found = explain(tmp_path / "adapter", base=tmp_path / "saved").updates
    expected = explain(tmp_path / "adapter", base=tmp_path / "numbers").updates
    assert len(found) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.relation is not None and theirs.relation is not None
        # In eight bits one product in fp32 against two: 2^-23 of W, and of what is measured on it some times that.
        tolerance = 1e-5 if kind == "int8" else 0.0
        assert ours.relation.relative == pytest.approx(theirs.relation.relative, rel=tolerance)
        for measure in ("size", "amplification", "left", "right", "intruders"):
            assert getattr(ours.relation, measure) == pytest.approx(getattr(theirs.relation, measure), rel=tolerance)
