import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tensors, write_tiny, write_weights
from torch import Tensor

from lamina.errors import CheckpointError, ModelError
from lamina.model.architecture import read_config
from lamina.model.checkpoint import stored_tensors
from lamina.model.merged import Merged, Piece, as_stored
from lamina.model.merged import write_merged as write_pieces
from lamina.model.weights import load_model, used_tensors


def write_merged(base: Path, out: Path, update: Callable[[str, Tensor], Tensor], **options: int) -> Merged:
    """Writes every tensor of a base passed through ``update``."""
    stored = used_tensors(base, read_config(base)).values()
    pieces = [Piece(as_stored(one).forms, lambda one=one: {one.name: update(one.name, one.read())}) for one in stored]
    return write_pieces(base, out, pieces, **options)


def same(name: str, value: Tensor) -> Tensor:
    return value


def doubled(name: str, value: Tensor) -> Tensor:
    return value * 2 if "up_proj" in name else value


def left_beside(out: Path) -> list[str]:
    """What is in the folder above ``out`` that was not there before."""
    return sorted(path.name for path in out.parent.iterdir() if path.name != "base")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "base", torch.bfloat16)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("shards", [1, 3])
def test_only_what_the_update_changes_is_changed(tmp_path: Path, out: Path, shards: int) -> None:
    base = write_tiny(tmp_path / "base", torch.float16, shards)
    record = write_merged(base, out, doubled)
    written, before = load_file(out / "model.safetensors"), tensors(torch.float16)
    assert written.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(written[name], doubled(name, value))
    assert record == Merged(out, ("model.safetensors",), len(before), sum(t.nbytes for t in before.values()))
    assert left_beside(out) == ["out"]


def test_update_may_work_in_place_and_return_a_view(base: Path, out: Path) -> None:
    write_merged(base, out, lambda name, value: value.add_(1).t().contiguous().t())
    for name, value in tensors(torch.bfloat16).items():
        assert torch.equal(stored_tensors(out)[name].read(), value + 1)


def test_shards_stay_below_their_limit_and_have_an_index(base: Path, out: Path) -> None:
    record = write_merged(base, out, same, max_shard_bytes=8000)
    assert len(record.shards) > 1
    assert record.shards == tuple(
        f"model-{n:05}-of-{len(record.shards):05}.safetensors" for n in range(1, len(record.shards) + 1)
    )
    for shard in record.shards:
        assert sum(value.nbytes for value in load_file(out / shard).values()) <= 8000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": record.size}
    assert index["weight_map"].keys() == tensors().keys()
    for name, value in tensors(torch.bfloat16).items():
        assert torch.equal(load_file(out / index["weight_map"][name])[name], value)


def test_one_tensor_larger_than_the_limit_is_a_shard_of_its_own(base: Path, out: Path) -> None:
    record = write_merged(base, out, same, max_shard_bytes=1)
    assert len(record.shards) == record.tensors == len(tensors())


def test_files_carry_the_metadata_that_transformers_asks_for(base: Path, out: Path) -> None:
    write_merged(base, out, same)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_lies_at_a_multiple_of_its_element(tmp_path: Path, out: Path) -> None:
    weights = tensors(torch.bfloat16, attention_bias=True, vocab_size=61)
    weights |= {name: value.float() for name, value in weights.items() if "norm" in name}
    write_weights(write_tiny(tmp_path / "base", attention_bias=True, vocab_size=61), weights)
    write_merged(tmp_path / "base", out, same)
    stored = stored_tensors(out)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.bfloat16}
    assert all(tensor.start % tensor.dtype.itemsize == 0 for tensor in stored.values())
    assert all(torch.equal(stored[name].read(), value) for name, value in weights.items())


def test_everything_but_weights_comes_along(base: Path, out: Path) -> None:
    (base / "additional_chat_templates").mkdir()
    kept = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE.txt"]
    kept += ["tokenizer.model", "additional_chat_templates/tools.jinja"]
    left = ["pytorch_model.bin", "consolidated.safetensors", "model.safetensors.index.json", "README.md"]
    for name in kept + left:
        (base / name).write_text(name)
    write_merged(base, out, same)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {*kept, "config.json", "model.safetensors"}
    assert (out / "additional_chat_templates/tools.jinja").read_text() == "additional_chat_templates/tools.jinja"


@pytest.mark.parametrize(
    "stored_as", [["model.embed_tokens.weight"], ["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]]
)
def test_tied_models_are_written_once_and_load_in_transformers(tmp_path: Path, out: Path, stored_as: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    weights = tensors(tie_word_embeddings=True)
    embedding = weights.pop("model.embed_tokens.weight")
    folder = write_tiny(tmp_path / "base", tie_word_embeddings=True)
    write_weights(folder, weights | {name: embedding.clone() for name in stored_as})
    write_merged(folder, out, doubled)
    assert "lm_head.weight" not in stored_tensors(out)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, embedding)
    assert torch.equal(load_model(out, "fp32", "cpu").vocabulary, embedding)


def test_place_that_is_taken(base: Path, out: Path) -> None:
    out.mkdir()
    (out / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="out: exists and is not an empty folder; name another place as --out"):
        write_merged(base, out, same)
    (out / "notes").unlink()
    write_merged(base, out, same)
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        write_merged(base, out / "config.json", same)


def test_a_place_inside_of_a_file(base: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").touch()
    for out in (tmp_path / "p.txt" / "x", tmp_path / "p.txt" / "x" / "y"):
        with pytest.raises(CheckpointError, match=r"p\.txt is a file, expected a folder; name another place as --out$"):
            write_merged(base, out, same)


def test_damaged_base_leaves_nothing(base: Path, out: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="its header says"):
        write_merged(base, out, same)
    assert left_beside(out) == []


def test_interrupt_leaves_nothing(base: Path, out: Path) -> None:
    def interrupted(name: str, value: Tensor) -> Tensor:
        if "norm" in name:
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt):
        write_merged(base, out, interrupted)
    assert left_beside(out) == []


def test_too_little_room_is_found_before_work_starts(base: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    with pytest.raises(CheckpointError, match=r"out: the merged model needs [\d,]+ bytes and the disk has 1,000 free"):
        write_merged(base, out, same)
    assert left_beside(out) == []


def test_write_that_the_system_refuses_leaves_nothing(base: Path, out: Path) -> None:
    """As a full disk does, in the middle of a shard."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))  # the kernel refuses to write beyond
    try:
        with pytest.raises(CheckpointError) as error:
            write_merged(base, out, same)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == f"{out}: the merged model cannot be written (File too large); nothing was left"
    assert left_beside(out) == []


def test_folder_that_cannot_be_made(base: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object, **how: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(CheckpointError, match=r"out: the merged model cannot be written \(Read-only file system\)"):
        write_merged(base, out, same)


MEASURE = """
import sys
from pathlib import Path
from lamina.model.checkpoint import stored_tensors
from lamina.model.merged import Piece, as_stored, write_merged

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

out = Path(sys.argv[1]).parent
def pieces(base, update):
    stored = stored_tensors(base).values()
    return [Piece(as_stored(one).forms, lambda one=one: {one.name: update(one.read())}) for one in stored]

write_merged(Path(sys.argv[2]), out / "first", pieces(Path(sys.argv[2]), lambda value: value))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
added = pieces(Path(sys.argv[1]), lambda value: value.add_(1))
print(write_merged(Path(sys.argv[1]), out / "second", added).size, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures the peak through Linux's /proc")
@pytest.mark.slow
def test_peak_memory_is_one_tensor(tmp_path: Path) -> None:
    large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 20000}
    write_tiny(tmp_path / "large", torch.bfloat16, **large)
    write_tiny(tmp_path / "small", torch.bfloat16)
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small")]
    size, peak = map(int, subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split())
    largest = 20000 * 512 * 2
    assert size > 5 * largest
    # 8 MB for headers, the allocator's rounding and code that runs for the first time.
    assert peak <= largest + 8e6
