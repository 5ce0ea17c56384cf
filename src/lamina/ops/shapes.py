"""Shape annotations of public tensor functions, in jaxtyping's notation; checked when the tests run, ignored otherwise.

The letters are those of the whole package: ``B`` rows, ``T`` tokens of one example, ``N`` tokens packed in a batch, ``D``
model width, ``H`` query heads, ``K`` key/value heads, ``h`` head width, ``F`` MLP width, ``V`` vocabulary, ``R`` rank.
"""

from jaxtyping import Bool, Float, Int

__all__ = ["Bool", "Float", "Int"]
