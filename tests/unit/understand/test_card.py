"""The card reads its rows from disk one after another, measures both models on the same rows, and nothing where there is nothing."""

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import examples, logits, tiny
from tiny import write_tiny
from tokens import pieces
from torch import nn

from lamina.adapter import LoRA, adapted, adapter_scale, attach
from lamina.data.render import Rendered
from lamina.data.store import TokenStore, TokenWriter
from lamina.evaluation import evaluate, score, score_both
from lamina.model.decoder import Decoder
from lamina.model.weights import load_model
from lamina.understand.budget import Sizes
from lamina.understand.card import Asked, Card, measure

PORTION = 192
"""Tokens at once: some portions for the rows of most tests, and not many, for each is a forward pass."""
SIZES = Sizes(portion=PORTION, samples=0, new_tokens=4, compared=10_000, neutral=10_000, dosed=10_000)


def stored(rows: list[Rendered]) -> TokenStore:
    with TokenWriter() as writer:
        for row in rows:
            writer.append(row)
        return writer.store()


def tuned(dtype: torch.dtype = torch.float32) -> Decoder:
    """The tiny model with an adapter that makes a difference."""
    return adapted_by_chance(tiny(dtype=dtype))


def adapted_by_chance(model: Decoder) -> Decoder:
    attach(model, LoRA(rank=4))
    torch.manual_seed(5)
    for module in adapted(model).values():
        nn.init.normal_(module.b, std=0.05)
    return model


def asked(model: Decoder) -> Asked:
    return Asked(model, pieces(), {2})


def test_rows_on_disk_are_measured_like_rows_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
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

    model, sizes = tuned(), replace(SIZES, compared=1, dosed=1)
    expected = measure(asked(model), rows, [], sizes)
    store = stored(rows)
    monkeypatch.setattr(TokenStore, "__getitem__", counted)
    assert measure(asked(model), store, [], sizes) == expected
    assert 5 <= most <= 11, "five rows are packed while the next are read; never all forty"


def test_no_rows() -> None:
    for rows in ([], stored([])):
        card = measure(asked(tuned()), rows, [], SIZES)
        assert card == Card()
        assert (card.table(), card.answers(), card.lines()) == ([], [], [])
        found = card.as_json()
        assert found["base"] == {"held_out": None, "answers": None, "neutral": None}
        assert (found["difference"], found["kl"]) == ({}, {"answers": None, "neutral": None})
        assert found["learnt"] is None and found["dose"] is None and found["counted"] is None


def test_nothing_held_out_and_yet_neutral_text() -> None:
    card = measure(asked(tuned()), [], examples(5), SIZES)
    assert [name for name, _, _ in card.measures()] == ["perplexity of neutral text"]
    assert set(card.kl) == {"neutral"} and card.dose is None and card.learnt is None
    assert card.lines()[0].startswith("distance from the base, KL(base‖adapter): ")


def test_the_distance_is_the_definitions() -> None:
    model, rows = tuned(torch.float64), examples(30)
    base, _, kl = score_both(model, rows, PORTION)
    expected = []
    for row in rows:
        tokens = torch.from_numpy(row.tokens).long()
        with torch.no_grad():
            q = logits(model, tokens).log_softmax(1)
            with adapter_scale(model, 0.0):
                p = logits(model, tokens).log_softmax(1)
        expected += [float((p[i - 1].exp() * (p[i - 1] - q[i - 1])).sum()) for i in np.flatnonzero(row.trained)]
    # Logarithms of probabilities below 16 in fp32 are rounded by 16·2^-24 = 1e-6 each, p and q: 2e-6 in their mean.
    assert kl.tolist() == pytest.approx(expected, abs=2e-6)
    assert max(expected) > 0.01
    assert base.targets.tolist() == [token for row in rows for token in row.tokens[row.trained]]
    card = measure(asked(model), rows, [], SIZES)
    assert card.kl["answers"].tokens == len(expected)
    assert card.kl["answers"].mean == pytest.approx(np.mean(expected), abs=2e-6)
    low, high = card.kl["answers"].interval or (0, 0)
    assert low < card.kl["answers"].mean < high


def test_one_pass_over_both_gives_the_scores_of_each_to_the_last_bit() -> None:
    model, rows = tuned(), examples(30)
    base, adapter, _ = score_both(model, rows, PORTION)
    with adapter_scale(model, 0.0):
        alone = score(model, rows, PORTION)
    for found, expected in ((base, alone), (adapter, score(model, rows, PORTION))):
        for name in ("targets", "losses", "correct", "ends"):
            assert (getattr(found, name) == getattr(expected, name)).all(), name
    assert (base.losses != adapter.losses).any()


def test_only_some_slices_of_logits_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.ops import loss

    monkeypatch.setattr(loss, "SLICE", 8)
    sizes, product = [], loss.product

    def counted(factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(factors[0]))
        return product(factors)

    monkeypatch.setattr(loss, "product", counted)
    model = tuned()
    with torch.no_grad():
        states = torch.randn(100, 32)
        loss.paired_scores(states, states + 1, model.vocabulary, torch.arange(100) % 96)
    assert max(sizes) == 8 and sum(sizes) == 200


def test_the_card_is_made_of_the_scores_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tuned(), examples(30)
    with adapter_scale(model, 0.0):
        base = score(model, rows, PORTION)
    adapter = score(model, rows, PORTION)
    expected = measure(asked(model), rows, examples(4, seed=9), SIZES)
    assert measure(asked(model), rows, examples(4, seed=9), SIZES, base, adapter) == expected
    held_out = expected.parts["held_out"].measures
    # Sums of rows' sums and sums of tokens: two orders of some 300 terms in float64.
    assert held_out["loss"].base == pytest.approx(evaluate_base(model, rows), rel=1e-13)
    assert held_out["loss"].adapter == pytest.approx(evaluate(model, rows, PORTION).loss, rel=1e-13)
    for measured in held_out.values():
        for value, span in ((measured.base, measured.base_interval), (measured.adapter, measured.adapter_interval)):
            assert span is not None and span[0] < value < span[1]
    monkeypatch.setattr("lamina.understand.card.score", None)  # what is known is not computed again
    measure(asked(model), rows, [], SIZES, base, adapter)


def test_pieces_of_a_row_make_nothing_more_certain() -> None:
    """Six rows, and each of them four times under its number: sums are four times as large, and intervals the same."""
    model, text = tuned(), [1, 40, 41, 42, 43, 44, 45, 46]
    rows = [Rendered(np.array([*text[: n + 3], n + 50, 2], dtype=np.int32), np.arange(n + 5) > 2, n) for n in range(6)]
    pieces = [row for row in rows for _ in range(4)]
    sizes = replace(SIZES, samples=24)
    whole, cut = measure(asked(model), rows, [], sizes), measure(asked(model), pieces, [], sizes)
    assert measure(asked(model), stored(pieces), [], sizes) == cut
    for name in ("held_out", "answers"):
        assert cut.parts[name].rows == 6
        for key, of in whole.parts[name].measures.items():
            again = cut.parts[name].measures[key]
            for span in ("base_interval", "adapter_interval", "difference_interval"):
                # The scores of other batches differ by some 1e-6 nats a token, and so by 1e-6 of a perplexity.
                assert getattr(again, span) == pytest.approx(getattr(of, span), rel=1e-5, abs=1e-5), (name, key, span)
    assert cut.kl["answers"].interval == pytest.approx(whole.kl["answers"].interval, abs=1e-5)


def evaluate_base(model: Decoder, rows: list[Rendered]) -> float:
    with adapter_scale(model, 0.0):
        return evaluate(model, rows, PORTION).loss


@pytest.mark.parametrize("form", ["plain", "nf4"])
def test_the_dose_curve_ends_at_base_and_adapter(form: str, tmp_path: Path) -> None:
    model, rows, neutral = tuned(), examples(20), examples(6, seed=3)
    if form == "nf4":
        write_tiny(tmp_path / "base", vocab_size=96, hidden_size=64, intermediate_size=64)
        model = adapted_by_chance(load_model(tmp_path / "base", "fp32", "cpu", base="nf4"))
    card = measure(asked(model), rows, neutral, SIZES)
    assert card.dose is not None and card.dose.neutral is not None
    curve = dict(zip(card.dose.scales, card.dose.task, strict=True))
    text = dict(zip(card.dose.scales, card.dose.neutral, strict=True))
    assert card.dose.rows == 20
    assert (curve[0.0], curve[1.0]) == (evaluate_base(model, rows), evaluate(model, rows, PORTION).loss)
    assert (text[0.0], text[1.0]) == (evaluate_base(model, neutral), evaluate(model, neutral, PORTION).loss)
    with adapter_scale(model, 1.25):
        assert curve[1.25] == evaluate(model, rows, PORTION).loss
    assert len(set(curve.values())) == 7


def test_parts_are_bounded_and_the_same_rows_each_time() -> None:
    model, rows = tuned(), examples(60)
    sizes = replace(SIZES, compared=120, dosed=60)
    card = measure(asked(model), rows, [], sizes)
    assert card == measure(asked(model), rows, [], sizes)
    assert card.dose is not None and 1 <= card.dose.rows < 15
    supervised = sum(int(row.trained.sum()) for row in rows)
    assert card.kl["answers"].tokens < supervised / 3
    assert card.parts["held_out"].tokens == supervised
    smallest = measure(asked(model), rows, [], replace(SIZES, compared=1, dosed=1))
    assert smallest.dose is not None and smallest.dose.rows == 1


def test_answers_of_both_and_none_where_there_is_no_prompt() -> None:
    model = tuned()
    prompted = [Rendered(np.array([1, 40, 41, 42, 43, 2], dtype=np.int32), np.arange(6) > 2, row) for row in range(8)]
    card = measure(asked(model), prompted, [], replace(SIZES, samples=5))
    assert card.given is not None and len(card.given[0].rows) == len(card.given[1].rows) == 5
    assert len(card.answers()) == 3
    assert card.measures()[0][0] == "held-out loss (nats per answer token)"
    assert " nats per token of held-out answers" in card.lines()[0]
    found = card.as_json()
    assert set(found["adapter"]["answers"]["intervals"]) == {"stop_rate", "exact_match", "mean_tokens"}
    assert set(found["difference"]) >= {"held_out.loss", "answers.stop_rate", "answers.exact_match"}
    everything = [Rendered(row.tokens, np.arange(6) > 0, row.row) for row in prompted]
    card = measure(asked(model), everything, [], replace(SIZES, samples=5))
    assert card.given is None and card.answers() == []
    assert card.as_json()["adapter"]["answers"] is None
    assert [name for name, _, _ in card.measures()] == [
        "held-out loss (nats per token)", "held-out perplexity", "tokens predicted",
    ]  # fmt: skip
    assert " nats per token of held-out rows" in card.lines()[0]
    assert card.as_json()["counted"] == "tokens"


def test_answers_that_are_too_long_to_be_matched_are_not() -> None:
    row = Rendered(np.array([1, 40, 41, 42, 43, 44, 45, 46, 2], dtype=np.int32), np.arange(9) > 2, 1)
    card = measure(asked(tuned()), [row], [], replace(SIZES, samples=1, new_tokens=3))
    assert "answers that are the data's, word for word" not in [name for name, _, _ in card.measures()]
    assert card.as_json()["adapter"]["answers"]["exact_match"] is None
    assert "answers.exact_match" not in card.as_json()["difference"]
    assert card.as_json()["difference"]["held_out.loss"][1:] == [None, None], "one row has no interval"


def test_what_is_printed_can_be_read() -> None:
    card = measure(asked(tuned()), examples(40), examples(5, seed=2), SIZES)
    name, before, after, change = card.table()[0]
    assert (name, before, after) == card.measures()[0]
    assert change == "{:+.4f} [{:+.4f}, {:+.4f}]".format(*card.as_json()["difference"]["held_out.loss"])
    points = card.table()[2][3]
    assert points.endswith(" points") and points[0] in "+-"
    assert any(line.startswith("dose: at") for line in card.lines())
    for told in re.findall(r"[\d.]+ nats per token of [a-z -]+ \[[^]]+\]", card.lines()[0]):
        assert len({len(number.partition(".")[2]) for number in re.findall(r"[\d.]+", told)}) == 1, told
    assert json.loads(json.dumps(card.as_json())) == card.as_json()
