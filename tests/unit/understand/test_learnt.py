"""The held-out loss taken apart adds up to it again, and what is listed is no chance."""

import numpy as np
import pytest
from tokens import byte_level, pieces

from lamina.data.render import Rendered
from lamina.evaluation import Scores
from lamina.understand.learnt import LEAST, kinds, learnt

WORDS = pieces()


def scores(targets: list[int], losses: list[float], ends: list[int]) -> Scores:
    return Scores(
        np.array(targets, dtype=np.int32),
        np.array(losses, dtype=np.float32),
        np.zeros(len(targets), dtype=np.bool_),
        np.array(ends),
    )


def test_the_tokens_add_up_to_the_loss() -> None:
    random = np.random.default_rng(0)
    targets = random.integers(0, 30, 500).tolist()
    base, adapter = (scores(targets, random.gamma(2.0, 1.0, 500).tolist(), [100, 300, 500]) for _ in range(2))
    ids, counts, before, after = kinds(base, adapter)
    assert (np.diff(ids) > 0).all() and counts.sum() == 500
    # Two orders of summing 500 numbers in float64.
    assert before.sum() / 500 == pytest.approx(base.evaluation.loss, rel=1e-13)
    assert after.sum() / 500 == pytest.approx(adapter.evaluation.loss, rel=1e-13)
    assert base.per_row()[:, 0].sum() / 500 == pytest.approx(base.evaluation.loss, rel=1e-13)


def test_rows_are_told_token_by_token() -> None:
    tokens = np.array([1, 300, 301, 302, 2], dtype=np.int32)
    shown = [
        Rendered(tokens, np.array([False, False, False, True, True]), 12),
        Rendered(tokens, np.array([True, True, False, False, True]), 14),  # the first token cannot be predicted
    ]
    base = scores([302, 2, 300, 2], [3.0, 2.0, 1.5, 0.5], [2, 4])
    adapter = scores([302, 2, 300, 2], [1.0, 0.25, 1.0, 0.5], [2, 4])
    found = learnt(base, adapter, shown, WORDS).as_json()
    assert [row["row"] for row in found["rows"]] == [12, 14]
    first, second = ([(t["trained"], t["before"], t["after"]) for t in row["tokens"]] for row in found["rows"])
    assert first == [(False, None, None)] * 3 + [(True, 3.0, 1.0), (True, 2.0, 0.25)]
    assert second == [(False, None, None), (True, 1.5, 1.0), (False, None, None), (False, None, None), (True, 0.5, 0.5)]
    assert [token["text"] for token in found["rows"][0]["tokens"]][4] == "</s>"
    assert found["most"] == found["least"] == [], "nothing is met five times"


@pytest.mark.parametrize("tokenizer", [WORDS, byte_level()], ids=["pieces", "bytes"])
def test_kinds_are_ordered_by_what_they_add_to_the_gain(tokenizer: object) -> None:
    often, seldom, worse, same, once = 40, 41, 42, 43, 44
    targets = [often] * 50 + [seldom] * LEAST + [worse] * LEAST + [same] * 9 + [once] * (LEAST - 1)
    before = [2.0] * 50 + [8.0] * LEAST + [1.0] * LEAST + [1.0] * 9 + [20.0] * (LEAST - 1)
    after = [1.0] * 50 + [0.0] * LEAST + [3.0] * LEAST + [0.995] * 9 + [0.0] * (LEAST - 1)
    found = learnt(scores(targets, before, [len(targets)]), scores(targets, after, [len(targets)]), [], tokenizer)
    assert [(kind.count, kind.before, kind.after) for kind in found.most] == [(50, 2.0, 1.0), (LEAST, 8.0, 0.0)]
    assert [(kind.count, kind.before, kind.after) for kind in found.least] == [(LEAST, 1.0, 3.0)]
    best, worst = found.lines()
    assert best.startswith("learnt most (loss before → after): ") and "2.00 → 1.00 (×50)" in best
    assert worst.startswith("became worse") and "1.00 → 3.00 (×5)" in worst


def test_a_token_that_steers_a_terminal_is_quoted() -> None:
    escape = int(WORDS.convert_tokens_to_ids("<0x1B>"))
    bell = [escape] * LEAST
    found = learnt(scores(bell, [3.0] * LEAST, [LEAST]), scores(bell, [1.0] * LEAST, [LEAST]), [], WORDS)
    assert found.most[0].text == "\x1b"
    assert [line.isprintable() for line in found.lines()] == [True]


def test_tokens_that_look_the_same_are_told_by_their_pieces() -> None:
    """``a`` is a piece and a byte; so is a byte that cannot be shown; a word after a space is another than without."""
    names = ["a", "<0x61>", "▁a", "<0x01>", "<0x02>", "</s>"]
    targets = [int(WORDS.convert_tokens_to_ids(name)) for name in names for _ in range(LEAST)]
    before, ends = [3.0] * len(targets), [len(targets)]
    after = [1.0] * LEAST + [5.0] * LEAST + [1.0] * (len(targets) - 2 * LEAST)
    found = learnt(scores(targets, before, ends), scores(targets, after, ends), [], WORDS)
    assert {kind.text for kind in found.most} == {"a", " a", "<0x01>", "<0x02>", "</s>"}
    assert [kind.text for kind in found.least] == ["<0x61>"], "also where the other one is in the other list"
