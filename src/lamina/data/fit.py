"""What becomes of examples that are longer than a run allows: left out, cut, or cut into pieces."""

from collections import Counter
from typing import Literal

import numpy as np

from lamina.data.render import Rendered, Turn

Long = Literal["drop", "truncate", "split"]


def fit(example: Rendered, max_length: int, long: Long, begins: int | None, count: Counter[str]) -> list[Rendered]:
    """Brings an example to at most ``max_length`` tokens.

    ``truncate`` keeps the beginning. ``split`` cuts into pieces, one after another; each sees nothing of the piece
    before it and begins, as the example does, with the token that begins a text. Pieces without a target are left out.

    Args:
        begins: the id of the token that begins a text, if the tokenizer has one.
        count: takes what is lost: tokens, targets, answers that were cut or lost whole.

    Returns:
        The pieces that hold at least one target; none, when nothing is left to learn.
    """
    size = len(example.tokens)
    if size <= max_length:
        return [example] if example.trained.any() else []
    lead = 1 if example.tokens[0] == begins else 0
    ranges = [(0, max_length)] if long != "drop" else []
    if long == "split":
        ranges += [(at, min(at + max_length - lead, size)) for at in range(max_length, size, max_length - lead)]
    pieces = [(start, stop, _piece(example, start, stop, lead)) for start, stop in ranges]
    kept = [(start, stop, piece) for start, stop, piece in pieces if piece.trained.any()]

    covered = np.zeros(size, dtype=np.bool_)
    for start, stop, _ in kept:
        covered[start:stop] = True
    count["long_rows"] += 1
    count["lost_tokens"] += size - int(covered.sum())
    count["lost_targets"] += int(example.trained.sum()) - sum(int(piece.trained.sum()) for _, _, piece in kept)
    for turn in example.turns:
        whole = covered[turn.start : turn.stop]
        count["lost_answers"] += not whole.any()
        count["cut_answers"] += bool(whole.any() and not whole.all())
    return [piece for _, _, piece in kept]


def _piece(example: Rendered, start: int, stop: int, lead: int) -> Rendered:
    """The tokens ``start:stop``, after the token that begins a text; the first token of a piece is no target."""
    lead = lead if start else 0
    tokens = np.concatenate([example.tokens[:lead], example.tokens[start:stop]])
    trained = np.concatenate([np.zeros(lead, dtype=np.bool_), example.trained[start:stop]])
    trained[0] = False
    moved = lead - start
    turns = tuple(
        Turn(max(turn.start, start) + moved, min(turn.stop, stop) + moved, turn.ended and turn.stop <= stop)
        for turn in example.turns
        if turn.start < stop and turn.stop > start
    )
    return Rendered(tokens, trained, example.row, turns)
