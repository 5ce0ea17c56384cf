"""The tokenizer that comes with a model, and the tokens that end its answers."""

from pathlib import Path
from typing import Any

from lamina.errors import ModelError, first_line
from lamina.model.keys import read_json


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of the model in ``folder``, exactly as its ``tokenizer.json`` says.

    Never over the network, never with the folder's own code. Not ``AutoTokenizer``: for llama checkpoints transformers 5
    builds the normaliser and the unknown token anew from the class name, so that leading spaces are lost and unknown
    characters vanish, where the published file (and sentencepiece) keep them.

    Raises:
        ModelError: no tokenizer.json, or a damaged one.
    """
    from transformers import PreTrainedTokenizerFast

    _check_files(folder)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from None
    _find_specials_as_written(tokenizer)
    return tokenizer


def _find_specials_as_written(tokenizer: Any) -> None:
    """Lets special tokens be found in a text as it is written, before the normaliser puts ``▁`` before its parts.

    Files of the first Llama and its children ask for the opposite: ``</s>`` right after a word is then read as ``</``,
    ``s``, ``>``, and a model trained on that never learns to end.
    """
    from tokenizers import AddedToken

    hidden = [token for token in tokenizer.added_tokens_decoder.values() if token.special and token.normalized]
    tokenizer.backend_tokenizer.add_special_tokens(
        [
            AddedToken(
                token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False
            )
            for token in hidden
        ]
    )


def _check_files(folder: Path) -> None:
    """Refuses what the tokenizer library would refuse with a bare ``Exception``."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        found = "only tokenizer.model" if (folder / "tokenizer.model").is_file() else "no tokenizer"
        raise ModelError(
            f"{folder}: {found}, expected tokenizer.json; copy it from another repository of this model, or write it with "
            "transformers' AutoTokenizer and save_pretrained"
        )
    model = read_json(path).get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise ModelError(f"{path}: holds no model with a vocabulary; download the file again")
    if (folder / "tokenizer_config.json").exists():
        read_json(folder / "tokenizer_config.json")


def stop_tokens(folder: Path, tokenizer: Any) -> set[int]:
    """The ids that end an answer: the tokenizer's end token and those of ``generation_config.json``."""
    path = folder / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.exists() else None
    ids = named if isinstance(named, list) else [named]
    return {int(token) for token in [tokenizer.eos_token_id, *ids] if token is not None}
