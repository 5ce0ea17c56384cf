"""The card reads its rows from disk one after another, and measures nothing where there are none."""

import weakref

from models import examples, tiny

from lamina.data.render import Rendered
from lamina.data.store import TokenStore, TokenWriter
from lamina.evaluation import Evaluating
from lamina.understand.card import Measured, measure


def stored(rows: list[Rendered]) -> TokenStore:
    with TokenWriter() as writer:
        for row in rows:
            writer.append(row)
        return writer.store()


def test_rows_on_disk_are_measured_like_rows_in_memory(monkeypatch) -> None:
    from lamina import evaluation

    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 5)
    rows, most, read = examples(40), 0, TokenStore.__getitem__
    alive: list[weakref.ref[Rendered]] = []

    def counted(store: TokenStore, index: int) -> Rendered:
        nonlocal most
        row = read(store, index)
        alive.append(weakref.ref(row))
        most = max(most, sum(one() is not None for one in alive))
        return row

    model, settings = tiny(), Evaluating(eval_samples=0)
    expected = measure(model, None, set(), rows, [], settings, 64)
    store = stored(rows)
    monkeypatch.setattr(TokenStore, "__getitem__", counted)
    assert measure(model, None, set(), store, [], settings, 64) == expected
    assert 5 <= most <= 11, "five rows are packed while the next are read; never all forty"


def test_no_rows() -> None:
    for rows in ([], stored([])):
        assert measure(tiny(), None, set(), rows, [], Evaluating(), 64) == Measured(None, None, None)
