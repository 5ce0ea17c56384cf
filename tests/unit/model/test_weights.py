import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tensors, write_tiny, write_weights

from lamina.errors import ConfigError, ModelError
from lamina.model.weights import ModelSettings, load_model, pick_device


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_arrive_where_they_belong(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    write_tiny(tmp_path, dtype, shards)
    model = load_model(tmp_path, "bf16", "cpu")
    expected = tensors(dtype)
    assert {name for name, _ in model.named_parameters()} == expected.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16())


def test_model_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path), torch.float32, torch.device("cpu"))
    assert not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not list(model.buffers())


@pytest.mark.parametrize("stored_as", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_may_be_stored_under_either_name(tmp_path: Path, stored_as: str) -> None:
    weights = tensors(tie_word_embeddings=True)
    embedding = weights.pop("model.embed_tokens.weight")
    write_weights(write_tiny(tmp_path, tie_word_embeddings=True), weights | {stored_as: embedding})
    assert torch.equal(load_model(tmp_path, "fp32", "cpu").vocabulary, embedding)


def test_of_two_tied_tensors_the_embedding_wins(tmp_path: Path) -> None:
    weights = tensors(tie_word_embeddings=True)
    write_weights(write_tiny(tmp_path, tie_word_embeddings=True), weights | {"lm_head.weight": torch.zeros(64, 32)})
    assert torch.equal(load_model(tmp_path, "fp32", "cpu").vocabulary, weights["model.embed_tokens.weight"])


def test_rotary_buffers_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_weights(write_tiny(tmp_path), tensors() | buffer)
    load_model(tmp_path, "fp32", "cpu")


def test_all_misfits_are_told_at_once(tmp_path: Path) -> None:
    weights = tensors()
    for layer in range(2):
        del weights[f"model.layers.{layer}.mlp.up_proj.weight"]
        weights[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["lm_head.weight"] = torch.zeros(65, 32)
    weights["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    write_weights(write_tiny(tmp_path), weights)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path, "fp32", "cpu")
    assert str(caught.value) == (
        f"{tmp_path}: the weights do not fit config.json: missing 2: model.layers.{{0,1}}.mlp.up_proj.weight; "
        "unexpected 2: model.layers.{0,1}.self_attn.q_proj.bias; model.norm.weight is stored as I8, expected F64, F32, "
        "F16 or BF16; lm_head.weight has shape [65, 32], expected [64, 32]"
    )


MEASURE = """
from lamina.process import prepare
prepare()  # as the command does: a library leaves the place of large tensors to glibc, whose holes are chance
import sys
from pathlib import Path
import lamina.model.weights as weights
weights.load_model(sys.argv[2], "bf16", "cpu")  # a small one first: what libraries allocate once is not the model's

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
model = weights.load_model(sys.argv[1], "bf16", "cpu")
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(status("VmHWM") - before, status("VmRSS") - before, size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures the peak through Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_weights_and_one_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    """100 million parameters, 400 MB in fp32: resident memory of the process, mapped files included, at its peak."""
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 24000}
    write_tiny(tmp_path / "large", dtype, shards=2, **sizes)
    write_tiny(tmp_path / "small", dtype)
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small")]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120).stdout
    peak, after, size = map(int, out.split())
    largest = 24000 * 1024 * dtype.itemsize
    assert 150e6 < size < after + 8e6, "the weights are resident, or this measures nothing"
    # 8 MB for the header's objects, the allocator's rounding and the pages of code that run for the first time.
    assert peak <= size + largest + 8e6


def test_settings_take_the_base_of_the_computation() -> None:
    for dtype in ("bf16", "fp32"):
        assert ModelSettings(model="m", dtype=dtype).base is None
        assert ModelSettings(model="m", dtype=dtype, base=dtype).dtype == dtype


def test_base_and_dtype_must_agree() -> None:
    with pytest.raises(
        ConfigError, match="^base: found bf16 with dtype fp32, expected the same; set dtype to bf16, or leave base out$"
    ):
        ModelSettings(model="m", dtype="fp32", base="bf16")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="^device: found cuda, but PyTorch sees no GPU; run with --device cpu$"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")


QUANTISING = """
from lamina.process import prepare
prepare()  # as the command does: a library leaves the place of large tensors to glibc, whose holes are chance
import sys
from pathlib import Path
from lamina.model.weights import load_model
from lamina.ops.library import bitsandbytes

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

form = sys.argv[3]
load_model(sys.argv[2], "bf16", "cpu", base=form)  # what is imported and set up by the first
bitsandbytes()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
model = load_model(sys.argv[1], "bf16", "cpu", base=form)
kept = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
print(kept, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures the peak through Linux's /proc")
@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
def test_peak_while_quantising_is_the_final_size_and_two_tensors(form: str, tmp_path: Path) -> None:
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 1024}
    write_tiny(tmp_path / "large", torch.float16, **large)
    write_tiny(tmp_path / "small", torch.float16, hidden_size=64, intermediate_size=64)
    arguments = [sys.executable, "-c", QUANTISING, str(tmp_path / "large"), str(tmp_path / "small"), form]
    kept, peak = map(int, subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split())
    dense = 6 * (4 * 1024**2 + 3 * 1024 * 4096) * 2
    tensor = 1024 * 4096 * 2
    assert kept < 0.65 * dense
    # 1 MB for slices, the allocator's rounding and code that runs for the first time.
    assert peak <= kept + 2 * tensor + 1e6
