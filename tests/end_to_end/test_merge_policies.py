"""The three policies of `merge` over a quantised base: what each writes, what it proves, and who can read it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_runs import a_run, again, proof, rewrite
from models import places, some_tokens
from torch import Tensor
from torch.nn import functional as F

from lamina import cli
from lamina.adapter_files import outline_adapter
from lamina.errors import ConfigError
from lamina.job import read_job
from lamina.merging import merge
from lamina.model.architecture import read_config
from lamina.model.checkpoint import stored_tensors
from lamina.model.decoder import Decoder
from lamina.model.fingerprint import stored_fingerprint
from lamina.model.quantised import QuantisedLinear, linears_of
from lamina.model.weights import load_model, outline
from lamina.opened import open_run
from lamina.ops.attention import Packed
from lamina.ops.library import bitsandbytes
from lamina.policies import Pieces, dense_dtype
from lamina.training.plan import ranks_of

pytestmark = pytest.mark.slow

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
FORMS = [("nf4", True), ("nf4", False), ("fp4", True)]


def logits(model: Decoder, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(model(tokens, places([len(tokens)]), Packed([len(tokens)])), model.vocabulary).float()


def ids() -> Tensor:
    return some_tokens([24]) % 40


def places_of(run: Path) -> list[str]:
    """The paths of a run's adapted matrices."""
    job = read_job(run)
    return list(ranks_of(read_config(Path(job.model.model)), job.adapter))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("form", "double"), [*FORMS, ("int8", True), ("fp8", True)])
def test_dequantised_is_what_training_saw(form: str, double: bool, tmp_path: Path) -> None:
    """Adapted and other matrices alike; in fp32 the merged model differs from base + adapter by the order of sums alone."""
    run = a_run(tmp_path, dtype=torch.float32, form=form, double=double, **SIZE)
    rewrite(run, targets=["q_proj", "down_proj"])
    record = merge(run, tmp_path / "out")
    assert record.policy == "dequantised"
    assert len(record.matrices) == 4
    assert max(matrix.error for matrix in record.matrices) < 1e-6
    assert record.survived == pytest.approx(1, abs=1e-5)
    merged = load_model(tmp_path / "out", "fp32", "cpu")
    assert not any(isinstance(linear, QuantisedLinear) for linear in linears_of(merged).values())
    opened = open_run(run).model
    seen = {path.removesuffix(".base"): linear.form.dense().clone() for path, linear in linears_of(opened).items()}  # type: ignore[union-attr]
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"):
        assert torch.equal(merged.get_parameter(f"{path}.weight"), seen[path]), path
    if form not in ("int8", "fp8"):  # these round the activations too, which a dense model does not
        assert distance(logits(merged, ids()), logits(opened, ids())) < 1e-5
        assert proof(record).same and proof(record).kl < 1e-7  # of differences of logits of 1e-5, squared, and rounding


@pytest.mark.parametrize(("form", "double"), FORMS)
def test_original_is_another_base_than_training_saw(form: str, double: bool, tmp_path: Path) -> None:
    run = a_run(tmp_path, form=form, double=double, **SIZE)
    record = merge(run, tmp_path / "out", policy="original")
    dequantised = merge(run, tmp_path / "other", policy="dequantised")
    # NF4 is about 8 % from normally distributed weights, FP4 about 12 %; one rounding to bf16 is 0.2 %.
    assert all(0.05 < matrix.error < 0.2 for matrix in record.matrices)
    assert all(matrix.error < 0.005 for matrix in dequantised.matrices)
    assert proof(record).kl > 20 * proof(dequantised).kl
    assert "farthest from base + adapter" in "\n".join(record.lines())


@pytest.mark.parametrize(("form", "double"), FORMS)
def test_requantised_loads_in_transformers_and_here_with_the_same_logits(
    form: str, double: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    bitsandbytes()
    run = a_run(tmp_path, 0.3, torch.float32, form, double, **SIZE)
    record = merge(run, tmp_path / "out", policy="requantised")
    # The sum is rounded to four bits: as far from it as the base was, but around it, so that the update is there.
    assert all(0.05 < matrix.error < 0.5 for matrix in record.matrices)
    assert record.survived == pytest.approx(1, abs=0.1)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["bnb_4bit_quant_type"] == form
    assert written["quantization_config"]["bnb_4bit_use_double_quant"] == double

    ours = load_model(tmp_path / "out", "fp32", "cpu")
    assert all(isinstance(linear, QuantisedLinear) for linear in linears_of(ours).values())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu").eval()
    embedded = theirs.get_input_embeddings()(ids()[None]).detach().requires_grad_()
    assert torch.equal(logits(ours, ids()), theirs(inputs_embeds=embedded).logits[0].detach())


def test_a_base_that_is_stored_in_four_bits_merges_into_what_training_saw(tmp_path: Path) -> None:
    run = a_run(tmp_path, form="nf4", **SIZE)
    merge(run, tmp_path / "packed", policy="requantised")
    rewrite(run, model=str(tmp_path / "packed"), base="none", section="model")
    (run / "adapter" / "adapter_model.safetensors").unlink()
    model = read_job(run).model.load(tmp_path / "packed")
    again(run, model)
    with pytest.raises(ConfigError, match="policy: found original, but the base is stored quantised"):
        merge(run, tmp_path / "out", policy="original")
    for policy in ("dequantised", "requantised"):
        record = merge(run, tmp_path / policy, policy=policy)  # type: ignore[arg-type]
        quantised = "quantization_config" in json.loads((tmp_path / policy / "config.json").read_text())
        assert quantised == (policy == "requantised")
        assert (proof(record).kl < 1e-3) == (policy == "dequantised")
    plain = {tensor.code for tensor in stored_tensors(tmp_path / "dequantised").values()}
    assert plain == {"BF16"}
    assert dense_dtype(stored_tensors(tmp_path / "packed"), places_of(run), torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("form", [None, "nf4"])
def test_what_the_doctor_takes_a_merge_to_be_written_in(form: Any, tmp_path: Path) -> None:
    """The dtype in which the base is stored, whatever training computed in and however it kept the base."""
    run = a_run(tmp_path, dtype=torch.float16, form=form, **SIZE)
    merge(run, tmp_path / "out")
    stored, written = stored_tensors(tmp_path / "base"), stored_tensors(tmp_path / "out")
    assert {written[f"{path}.weight"].dtype for path in places_of(run)} == {torch.float16}
    assert dense_dtype(stored, places_of(run), torch.float32) == torch.float16


@pytest.mark.parametrize("policy", ["original", "dequantised", "requantised"])
def test_nothing_of_the_base_stays_in_memory(policy: Any, tmp_path: Path) -> None:
    run = a_run(tmp_path, form="nf4", **SIZE)
    job = read_job(run)
    model, stored = outline(Path(job.model.model), torch.bfloat16, "nf4")
    adapter = outline_adapter(model, run / "adapter", stored_fingerprint(model.architecture, stored))
    pieces = Pieces(policy, model, stored, adapter, torch.bfloat16)
    for piece in pieces:
        assert {name: (tuple(t.shape)) for name, t in piece.make().items()} == {
            n: f.shape for n, f in piece.forms.items()
        }
    assert len(pieces.matrices) == 14
    frozen = [t for linear in linears_of(model).values() for t in linear.buffers()]
    assert frozen and all(tensor.is_meta for tensor in frozen)


@pytest.mark.parametrize(
    ("form", "policy", "found"),
    [
        (None, "dequantised", "policy: found dequantised, but the run's base is not quantised; expected original"),
        (None, "requantised", "policy: found requantised, but the run's base is not quantised; expected original"),
        ("int8", "requantised", "policy: found requantised, which writes bitsandbytes' four bits"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(
    form: Any, policy: Any, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path, form=form, **SIZE)
    assert cli.main(["merge", str(run), "--out", str(tmp_path / "out"), "--policy", policy]) == 2
    assert capsys.readouterr().err.startswith(f"lamina: {found}")
    assert not (tmp_path / "out").exists()


def test_the_table_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path, form="nf4", **SIZE)
    assert cli.main(["merge", str(run), "--out", str(tmp_path / "out"), "--policy", "original"]) == 0
    said = capsys.readouterr().out
    assert "layer" in said and "survived" in said and "error/‖W‖" in said
    assert "original (added to the weights as they are stored)" in said
