import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tensors, write_tiny, write_weights

from lamina.errors import ModelError
from lamina.model.checkpoint import DTYPES, read_header, stored_tensors, summary
from lamina.model.weights import load_model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of two tensors; the header ends at byte 8 + its length."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.float16)}, path)
    return path


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_read_as_the_library_reads_it(code: str, tmp_path: Path) -> None:
    value = torch.randint(0, 2, (3, 5)).to(DTYPES[code])
    save_file({"first": torch.zeros(3), "x": value, "last": torch.ones(())}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)["x"]
    assert stored.code == code
    library = load_file(tmp_path / "model.safetensors")["x"]
    assert torch.equal(stored.read().view(torch.uint8), library.view(torch.uint8))


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    assert stored["scalar"].read().item() == 3.5
    assert stored["empty"].read().shape == (0, 4)


def test_reading_into_another_dtype_converts_every_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.model.checkpoint._PIECE", 7)  # 32 elements: four full pieces and a rest
    value = torch.randn(4, 8)
    save_file({"x": value}, tmp_path / "model.safetensors")
    out = torch.empty(4, 8, dtype=torch.bfloat16)
    stored_tensors(tmp_path)["x"].read_into(out)
    assert torch.equal(out, value.bfloat16())


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    write_tiny(tmp_path, shards=3)
    for name, value in tensors().items():
        assert torch.equal(stored_tensors(tmp_path)[name].read(), value)


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    write_tiny(tmp_path, shards=2)
    save_file({"only": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(stored_tensors(tmp_path)) == ["only"]


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    write_tiny(tmp_path, shards=3)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"are missing: model-00001-of-00003.safetensors, model-00003-of-00003"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.safetensors", "sub/model.safetensors", ""])
def test_an_index_names_files_beside_it_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"in its weight_map, expected files beside it"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index.json: no readable weight_map; download the file again"):
        stored_tensors(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds pytorch_model.bin, a pickle .* convert it once.*save_pretrained\('"):
        stored_tensors(tmp_path)


QUANTISED = (
    "the weights are stored quantised by GPTQ or AWQ (there is {}), computed are bitsandbytes' 4-bit and 8-bit forms; name the "
    "unquantised model that this one was made from as --model, with --base nf4 for four bits"
)


def test_what_gptq_or_awq_quantised_is_refused_by_name(tmp_path: Path) -> None:
    """As AutoGPTQ wrote it: config.json says nothing of it."""
    weights = tensors()
    path = "model.layers.0.mlp.up_proj"
    weights[f"{path}.qweight"] = torch.zeros(4, 48, dtype=torch.int32)
    del weights[f"{path}.weight"]
    write_weights(write_tiny(tmp_path), weights)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path, "fp32", "cpu")
    assert str(caught.value) == f"{tmp_path}: {QUANTISED.format(f'{path}.qweight')}"


def test_a_folder_that_gptq_or_awq_quantised_is_known_without_its_weights(tmp_path: Path) -> None:
    for name in ("gptq_model-4bit-128g.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "quantize_config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        stored_tensors(tmp_path)
    assert str(caught.value) == f"{tmp_path}: {QUANTISED.format('quantize_config.json')}"


def test_the_conversion_that_the_message_names_works(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32))
    old = tmp_path / "old"
    model.config.save_pretrained(old)
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        stored_tensors(old)
    code = re.search(r'python -c "(.*)"', str(caught.value))
    assert code is not None
    exec(code[1])
    assert "model.norm.weight" in stored_tensors(tmp_path / "old-safetensors")


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter, not a model; name its base instead"):
        stored_tensors(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model.safetensors and no model.safetensors.index.json; choose"):
        stored_tensors(tmp_path)


def test_git_lfs_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(ModelError, match=r"model.safetensors: found a Git LFS pointer.*run git lfs pull"):
        read_header(file)


@pytest.mark.parametrize("kept", [0, 5, 8, 40])
def test_file_cut_in_its_header(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model.safetensors: truncated or not a safetensors file; download"):
        read_header(file)


def test_file_cut_in_its_data(file: Path) -> None:
    length = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ModelError, match=rf"found {length - 3} bytes, its header says {length}; download"):
        read_header(file)


def test_header_of_garbage(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[8:20] = b"\xff" * 12
    file.write_bytes(raw)
    with pytest.raises(ModelError, match=r"model.safetensors: damaged safetensors header; download the file again"):
        read_header(file)


def with_header(file: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "header",
    [[], {"a": 3}, {"a": {"dtype": "F32"}}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}],
)
def test_header_of_another_form(file: Path, header: object) -> None:
    with_header(file, header, b"0000")
    with pytest.raises(ModelError, match="damaged safetensors header"):
        read_header(file)


def test_unknown_dtype(file: Path) -> None:
    with_header(file, {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"0")
    with pytest.raises(ModelError, match=r"a has dtype 'F4', expected one of F64, F32"):
        read_header(file)


@pytest.mark.parametrize("offsets", [[0, 4], [4, 12], [-8, 0]])
def test_byte_range_that_does_not_fit_the_shape(file: Path, offsets: list[int]) -> None:
    with_header(file, {"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}, b"0" * 12)
    with pytest.raises(ModelError, match="the byte range of a does not fit its shape"):
        read_header(file)


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read \(Is a directory\)"):
        stored_tensors(tmp_path)


def test_file_that_vanishes_or_shrinks_before_it_is_read(file: Path) -> None:
    stored = read_header(file)[-1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=rf"model.safetensors: ends inside {stored.name}; download the file again"):
        stored.read()
    file.unlink()
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read \(No such file or directory\)"):
        stored.read()


def test_summary_folds_layers() -> None:
    names = ["model.layers.0.mlp.up.weight", "head", "model.layers.12.mlp.up.weight", "model.layers.3.norm.weight"]
    assert summary(names) == "model.layers.{0,12}.mlp.up.weight, head, model.layers.3.norm.weight"
