"""Text from tokens as they come, for an answer that is shown while it is written.

A token is not a piece of text: it can be one byte of a character, and whether it begins with a space depends on what
stands before it (sentencepiece drops the space at the beginning of a text). So a token is decoded together with the tokens
of the last piece shown, and what that piece did not have is new. A piece that ends within a character waits.
"""

from typing import Any

_BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet


class Detokenizer:
    """Turns token ids into printable text, one at a time.

    All pieces together are ``tokenizer.decode`` of all tokens, special ones left out and spaces not "cleaned up". Where the
    tokens hold bytes that are not UTF-8, the pieces can keep a character that stands before these bytes and that
    ``decode`` would give up together with them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Asked of the decoder itself: checkpoints exist whose declared special tokens it does not recognise.
        self._special = {
            token
            for token in tokenizer.added_tokens_decoder
            if self._decode([token], skip_special_tokens=True) != self._decode([token])
        }
        self._shown: list[int] = []  # the tokens of the last piece, without which the next cannot be decoded
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Takes one token and returns the text that is certain now, often none."""
        if token in self._special:
            return ""
        self._waiting.append(token)
        new = self._new()
        return "" if new.endswith(_BROKEN) else self._show(new)

    def flush(self) -> str:
        """Returns what still waits: bytes that never became a character."""
        return self._show(self._new())

    def _new(self) -> str:
        known, text = self._decode(self._shown), self._decode(self._shown + self._waiting)
        return text[len(known) :] if text.startswith(known) else self._decode(self._waiting)

    def _show(self, new: str) -> str:
        if new:  # a token without text of its own cannot stand for what comes before the next
            self._shown, self._waiting = self._waiting, []
        return new

    def _decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text
