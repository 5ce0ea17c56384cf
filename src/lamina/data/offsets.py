"""Texts → ids with the characters that each stands for."""

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.errors import ModelError


class Encoded(NamedTuple):
    """The tokens of a text, int32 [n], and the characters ``starts[i]:stops[i]`` of each."""

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """Tokenises texts as they stand: no token is added, none is cut.

    Raises:
        ModelError: the tokenizer drops characters, so that its offsets cannot be trusted.
    """
    if not texts:
        return []
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    encoded = []
    for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
        pairs = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        encoded.append(Encoded(np.array(ids, dtype=np.int32), pairs[:, 0], pairs[:, 1]))
        _check_cover(text, encoded[-1])
    return encoded


def _check_cover(text: str, encoded: Encoded) -> None:
    """Every character must belong to a token, but white space, marks, and what normalisation joins to the one before.

    A tokenizer without an unknown token silently drops what it has no token for, and moves all later offsets.
    """
    reached = np.concatenate([[0], np.maximum.accumulate(encoded.stops)])
    begins = np.concatenate([encoded.starts, [len(text)]])
    for gap in np.flatnonzero(begins > reached).tolist():
        lost = text[reached[gap] : begins[gap]]
        joined = text[max(0, reached[gap] - 1) : begins[gap]]
        if len(unicodedata.normalize("NFC", joined)) < len(joined):
            continue
        if any(not character.isspace() and unicodedata.category(character)[0] not in "MC" for character in lost):
            raise ModelError(
                f"the tokenizer drops characters without a trace (no token stands for {lost[:20]!r}), so answers cannot be "
                "found in its tokens; it needs an unknown token or byte tokens"
            )
