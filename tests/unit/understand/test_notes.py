"""What is said of a run in words: of constructed faults each once, of sound runs nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from models import SIZE, examples, tiny

from lamina.adapter import LoRA, adapted, attach
from lamina.data.render import Rendered
from lamina.model.decoder import Decoder
from lamina.training.loop import State, Step, Training, start, train
from lamina.training.order import rows_of_step
from lamina.understand.ledger import COLUMNS, Observer, Place, Row, places
from lamina.understand.notes import Notes

LENGTHS = np.array([10, 12, 14, 16])


class InOrder:
    """Rows so arranged that the shuffled epoch meets them in their order."""

    def __init__(self, rows: Sequence[Rendered]) -> None:
        self.rows = rows
        self.place = {index: place for place, index in enumerate(rows_of_step(0, len(rows), len(rows), 0))}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Rendered:
        return self.rows[self.place[index]]


def begun(layers: int = 2, **settings: Any) -> tuple[Decoder, Training, State]:
    model = tiny(num_hidden_layers=layers)
    attach(model, LoRA(rank=4))
    training = Training(**{"batch_size": 4, "steps": 41, "learning_rate": 1e-3, "clip": None, **settings})
    state = start(model, training)
    state.step = 1  # the first step would refuse a matrix without a gradient
    return model, training, state


def notes_of(model: Decoder, training: Training, state: State, rows: Any) -> list[str]:
    """Trains with the ledger, and what is said."""
    observer = Observer(model, state)
    notes = Notes(places(model), training, np.array([len(rows[n].tokens) for n in range(len(rows))]))
    said = []
    for step in train(model, rows, training, state, 0):
        said += notes.step(step, observer.row())
    assert said == notes.said
    return said


def test_a_sound_run_is_not_talked_about() -> None:
    assert notes_of(*begun(layers=1, steps=71), examples(64)) == []


def test_a_matrix_that_is_fed_zeros_does_not_move() -> None:
    """Nor do those whose only way to the loss leads through its product with theirs."""
    model, training, state = begun()
    module = adapted(model)["model.layers.1.mlp.up_proj"]
    module.register_forward_pre_hook(lambda _, given: (torch.zeros_like(given[0]),))
    (said,) = notes_of(model, training, state, examples(64))
    assert said.startswith(
        "note, step 30: 3 of 14 adapted matrices do not move: "
        "layer 1 mlp.gate_proj, layer 1 mlp.up_proj, layer 1 mlp.down_proj; over 20 entries"
    )
    assert "leave them out of adapter.targets" in said


def test_a_layer_with_a_rate_a_hundred_times_too_large_runs_away() -> None:
    model, training, state = begun()
    layer = [p for path, m in adapted(model).items() if ".layers.1." in path for p in (m.a, m.b)]
    before: list[torch.Tensor] = []
    state.optimizer.register_step_pre_hook(lambda *_: before.extend(p.detach().clone() for p in layer))

    def enlarge(*_: object) -> None:
        with torch.no_grad():
            for parameter, old in zip(layer, before, strict=True):
                parameter.copy_(old + 100 * (parameter - old))
        before.clear()

    state.optimizer.register_step_post_hook(enlarge)
    said = notes_of(model, training, state, examples(64))
    runaway = [note for note in said if "runs away" in note]
    assert len(runaway) == 1
    assert "the update of layer 1 self_attn.q_proj, layer 1 self_attn.k_proj" in runaway[0]
    assert "layer 0" not in runaway[0]


def test_a_gradient_that_grows_alone_runs_away() -> None:
    """By 50 times, which over half a window comes to 26, while the others' does not; if all of them grow, no layer has run away."""

    def said(growth: Sequence[float]) -> list[str]:
        where = [Place(layer, "mlp.up_proj") for layer in range(3)]
        notes, found = Notes(where, Training(batch_size=4, steps=100), LENGTHS), []
        for number in range(1, 61):
            values = np.full((len(COLUMNS), 3), 0.01, dtype=np.float32)
            values[COLUMNS.index("grad_norm")] *= np.array(growth) if number > 30 else 1
            found += notes.step(step(number), Row(number, values))
        return found

    (note,) = said([1, 50, 1])
    assert note.startswith(
        "note, step 40: the gradient of layer 1 mlp.up_proj runs away: it is 26 times that of the first 20"
    )
    assert said([50, 50, 50]) == said([1, 10, 1]) == said([1, 1 / 50, 1]) == []


def test_a_gradient_that_is_always_clipped_is_told_once() -> None:
    model, training, state = begun(layers=1, steps=81, clip=1e-3)
    (said,) = notes_of(model, training, state, examples(64))
    assert said.startswith("note, step 60: the gradient was clipped in 50 of the last 50 steps")
    assert "clip is 0.001" in said


@pytest.mark.parametrize(
    ("clip", "lowest", "highest", "told"),
    [(1.0, 1.05, 1.4, "1.4"), (1.0, 1.01, 1.04, "1.1"), (10.0, 10.5, 14.9, "15"), (100.0, 105.0, 140.0, "140")],
)
def test_a_clip_is_named_that_clips_little(clip: float, lowest: float, highest: float, told: str) -> None:
    """The norm that nine of ten steps stay below, in plain digits, and above the clip that they pass now."""
    notes, found = Notes([], Training(batch_size=4, steps=100, clip=clip), LENGTHS), []
    for number, norm in enumerate(np.linspace(lowest, highest, 50).tolist(), 1):
        found += notes.step(step(number, norm=norm), None)
    assert [f"raise train.clip to about {told}, or look for" in note for note in found] == [True]


@pytest.mark.slow
def test_a_loss_that_follows_the_length_of_sorted_batches_is_told() -> None:
    """Long rows repeat one token, short ones are random: what a step's loss is depends on the length of its rows."""
    random = np.random.default_rng(0)

    def row(number: int, length: int) -> Rendered:
        tokens = random.integers(0, SIZE["vocab_size"], length, dtype=np.int32)
        if length > 12:
            tokens[:] = 7
        return Rendered(tokens, np.arange(length) >= length // 3, number)

    rows = [row(n, int(random.integers(4, 24))) for n in range(1, 321)]
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    batches = [by_length[n : n + 4] for n in range(0, len(rows), 4)]
    random.shuffle(batches)
    grouped = InOrder([row for batch in batches for row in batch])
    said = notes_of(*begun(steps=None, epochs=1.0), grouped)
    assert len(said) == 1
    assert "the batches are ordered by length (it varies " in said[0]
    assert "follows the number of trained tokens per example (correlation -0." in said[0]


@pytest.mark.parametrize(("noise", "told"), [(0.05, True), (0.7, False)])
def test_a_loss_that_follows_the_length_of_drawn_batches_is_told_where_nothing_else_moves_it(
    noise: float, told: bool
) -> None:
    """At a noise of 0.7 the correlation is 0.8: as much as the demo shows, and no reason for a word."""
    random = np.random.default_rng(1)
    lengths = 100 * LENGTHS
    notes, found = Notes([], Training(batch_size=4, steps=100), lengths), []
    for number, drawn in enumerate(random.normal(0, 1, 80), 1):
        tokens = round(4 * lengths.mean() + drawn * 2 * lengths.std())
        found += notes.step(step(number, loss=5 + drawn + random.normal(0, noise), tokens=tokens), None)
    assert [("step 50: the loss of the last 50 steps follows" in note) for note in found] == [True] * told


def test_a_last_short_step_is_not_counted() -> None:
    notes = Notes([], Training(batch_size=4, steps=60), LENGTHS)
    random = np.random.default_rng(0)
    for number in range(1, 60):
        assert notes.step(step(number, loss=random.normal(2, 0.1), tokens=int(random.integers(40, 60))), None) == []
    assert notes.step(step(60, loss=50.0, tokens=1), None) == []


def test_what_is_heard_again_is_said_again() -> None:
    """A resumed run goes through the rows of its ledger, and has then said what it had said."""
    where = [Place(layer, "mlp.up_proj") for layer in range(3)]
    values = np.full((len(COLUMNS), 3), 0.01, dtype=np.float32)
    values[COLUMNS.index("ratio"), 2] = 0
    first, again = (Notes(where, Training(batch_size=4, steps=100), LENGTHS) for _ in range(2))
    for number in range(1, 61):
        first.step(step(number), Row(number, values))
    for number in range(1, 41):
        again.step(step(number), Row(number, values))
    assert len(first.said) == 1
    assert again.said == first.said
    assert again.step(step(41), Row(41, values)) == []


def step(number: int, loss: float = 2.0, tokens: int = 50, norm: float = 0.5) -> Step:
    return Step(number, loss, tokens, tokens, 1e-3, norm, 0.1, 10**9)
