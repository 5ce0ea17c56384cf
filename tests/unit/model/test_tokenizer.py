import json
from pathlib import Path
from typing import Any

import pytest
from conftest import shared_data
from tokenizers import Tokenizer

from lamina.errors import ModelError
from lamina.model.tokenizer import load_tokenizer, stop_tokens

MODEL = {
    "type": "BPE",
    "vocab": {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4},
    "merges": [["a", "b"]],
    "unk_token": "<unk>",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete tokenizer of five pieces."""
    end = {"id": 1, "content": "</s>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    form = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    write(tmp_path / "tokenizer.json", {"version": "1.0", **form, "added_tokens": [end], "model": MODEL})
    write(tmp_path / "tokenizer_config.json", {"eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"})
    return tmp_path


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def test_tokenizer_reports_offsets(folder: Path) -> None:
    out = load_tokenizer(folder)("abb</s>", return_offsets_mapping=True)
    assert out["input_ids"] == [4, 3, 1]
    assert out["offset_mapping"] == [(0, 2), (2, 3), (3, 7)]


@pytest.mark.parametrize("name", ["llama2-tokenizer", "tinystories-656k-hf"])
def test_tokens_are_those_of_the_published_file(name: str) -> None:
    """Also where transformers' AutoTokenizer departs from it: leading spaces and unknown characters."""
    folder = shared_data(name)
    tokenizer, published = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (
        "Once upon a time",
        "  two spaces",
        " ",
        "\n x",
        "漢字 é",
        "<s>[INST] hi [/INST] ho </s><s>[INST] on",
        "",
    ):
        for special in (True, False):
            expected = published.encode(text, add_special_tokens=special).ids
            assert tokenizer(text, add_special_tokens=special)["input_ids"] == expected


def test_chat_template_in_its_own_file_is_found() -> None:
    assert "[INST]" in load_tokenizer(shared_data("llama2-tokenizer")).chat_template


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, {1}),
        ({}, {1}),
        ({"eos_token_id": None}, {1}),
        ({"eos_token_id": 3}, {1, 3}),
        ({"eos_token_id": [1, 4]}, {1, 4}),
    ],
)
def test_stop_tokens(folder: Path, generation: dict[str, Any] | None, expected: set[int]) -> None:
    if generation is not None:
        write(folder / "generation_config.json", generation)
    assert stop_tokens(folder, load_tokenizer(folder)) == expected


def test_tokenizer_without_an_end_token(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {})
    assert stop_tokens(folder, load_tokenizer(folder)) == set()


def test_damaged_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config.json: not valid JSON"):
        stop_tokens(folder, load_tokenizer(folder))


@pytest.mark.parametrize("found", ["no tokenizer", "only tokenizer.model"])
def test_no_tokenizer_json(tmp_path: Path, found: str) -> None:
    if found.startswith("only"):
        (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ModelError, match=f"{found}, expected tokenizer.json; copy it from another repository"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_json(folder: Path, name: str) -> None:
    (folder / name).write_text((folder / name).read_text()[:-20])
    with pytest.raises(ModelError, match=rf"{name}: not valid JSON .*; download the file again"):
        load_tokenizer(folder)


@pytest.mark.parametrize("model", [None, [], {"type": "BPE"}, {"type": "BPE", "vocab": {}}])
def test_tokenizer_without_a_vocabulary(folder: Path, model: Any) -> None:
    write(folder / "tokenizer.json", {"version": "1.0", "model": model})
    with pytest.raises(ModelError, match=r"tokenizer.json: holds no model with a vocabulary; download the file again"):
        load_tokenizer(folder)


def test_config_of_the_wrong_types(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"eos_token": 5})
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_folder_is_never_run_as_code(folder: Path) -> None:
    """A tokenizer class that the folder brings itself is passed over: the published file is the tokenizer."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    config = {"eos_token": "</s>", "tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    write(folder / "tokenizer_config.json", config)
    assert load_tokenizer(folder)("ab")["input_ids"] == [4]
    assert not (folder / "ran").exists()


def test_a_failure_without_a_message_is_named_by_its_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    def fail(*_: object, **__: object) -> None:
        raise ValueError

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"the tokenizer cannot be loaded \(ValueError\)"):
        load_tokenizer(folder)
