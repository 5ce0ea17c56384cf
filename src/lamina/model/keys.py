"""Reading a JSON object closed: what nobody has read must be known to be irrelevant, or switched off."""

import json
from pathlib import Path
from typing import Any

from lamina.errors import ModelError

# Keys of config.json that may hold anything: identity, storage, token ids, training history, defaults for sampling.
_TEXT = """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _from_model_config
    _name_or_path architectures attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_decoder is_llama_config label2id length_penalty max_length
    max_sequence_length min_length model_max_length name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class
    tokenizer_model_max_length tokenizer_padding_side top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_cache
"""
IRRELEVANT = frozenset(_TEXT.split())


class Keys:
    """The keys of one JSON object: which have been read, and what was wrong with them."""

    def __init__(self, config: dict[str, Any], prefix: str = "") -> None:
        self.config, self.prefix = config, prefix
        self.read: set[str] = set()
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def take(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return self.config.get(key, default)

    def size(self, key: str, default: int | None = None, null: int | None = None, minimum: int = 1) -> int:
        """An integer; ``default`` stands for an absent key, ``null`` for an explicit null."""
        value = self.take(key, default)
        value = null if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
            return value
        found = "missing" if key not in self.config else f"found {short(value)}"
        self.problem(f"{self.prefix}{key}: {found}, expected an integer of at least {minimum}")
        return 1

    def size_or_none(self, key: str, default: int | None) -> int | None:
        return None if self.take(key, default) is None else self.size(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.take(key, default)
        value = default if value is None else value
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
        found = "missing" if key not in self.config else f"found {short(value)}"
        self.problem(f"{self.prefix}{key}: {found}, expected a number above 0")
        return 1.0

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problem(f"{self.prefix}{key}: found {short(value)}, expected true or false")
        return False

    def must_be(self, key: str, only: Any) -> None:
        value = self.take(key)
        if value is not None and value != only:
            self.problem(f"{self.prefix}{key} {short(value)} (computed: {only})")

    def refuse_leftovers(self) -> None:
        """Names each key that nobody has read, that is not known to be irrelevant, and that is not switched off."""
        for key in sorted(self.config.keys() - self.read - IRRELEVANT):
            value = self.config[key]
            if value is not None and value is not False and value not in ({}, []):
                self.problem(f"unknown key {self.prefix}{key} = {short(value)}")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: the file is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ModelError(f"{path}: not valid JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: found a JSON {type(value).__name__}, expected an object; download the file again")
    return value


def short(value: Any) -> str:
    """The value as JSON, cut to fit a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
