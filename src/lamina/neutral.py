"""Text that has nothing to do with the task, read as rows: what a fine-tune costs shows in its perplexity.

Read in windows of bounded length, each begun as a text is, and up to a bounded number of tokens: a long book makes the
number no better.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data.render import Rendered
from lamina.errors import DataError

NEUTRAL_WINDOW = 512
"""Tokens of neutral text that are read together, the one that begins a text included."""

NEUTRAL_TOKENS = 65_536
"""Tokens of neutral text that count, from its beginning: enough for two digits of the perplexity."""


def read_neutral(path: Path, tokenizer: Any, max_position: int) -> list[Rendered]:
    """Reads plain text as rows for ``evaluate``: windows of up to ``NEUTRAL_WINDOW`` tokens, each begun as a text is.

    What looks like a special token in the text is taken as text.

    Args:
        max_position: tokens that the model can read.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is empty.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(16 * NEUTRAL_TOKENS)  # hardly a tokenizer makes fewer tokens of it than count
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), expected a text file; check neutral") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}), expected a text file; check neutral") from None
    if not text.strip():
        raise DataError(f"{path}: found no text, expected some for measuring forgetting; check neutral")
    tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    return list(_windows(tokens[:NEUTRAL_TOKENS], tokenizer.bos_token_id, min(NEUTRAL_WINDOW, max_position)))


def _windows(tokens: list[int], bos: int | None, size: int) -> Iterator[Rendered]:
    begin = [] if bos is None else [bos]
    for number, window in enumerate(range(0, len(tokens), size - len(begin)), 1):
        ids = np.array(begin + tokens[window : window + size - len(begin)], dtype=np.int32)
        if len(ids) > 1:  # a single token has nothing before it that could predict it
            yield Rendered(ids, np.arange(len(ids)) > 0, number)
