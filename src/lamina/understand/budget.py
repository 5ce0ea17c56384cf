"""How much the card measures: as much as a tenth of the run's time pays for, decided by the job and the data and by no clock.

The unit is one token's way forward through the model. Training costs two of it a token: the base is frozen, so the way back
goes to the activations only, as many products as the way forward (measured on the demo's base: 2.4; with checkpointed layers
about 3). A run over T training tokens takes about 2·T, and the card may take B = ``SHARE``·2·T:

    answers                50 % of B    base and adapter each read the prompts and write up to the limit; a step of n answers
                                        costs ``STEP`` + ``WRITTEN``·n, because its products wait for the weights
    KL on held-out rows    10 % of B    each token passes twice, without and with the adapter
    neutral text           15 % of B    each token passes twice; loss and KL come out of one pass
    dose curve             25 % of B    each token passes at five scales (0 and 1 are known), held-out rows and neutral text

The estimate is on the high side: answers mostly end before the limit, and the run is more than its training. Each part has a
most, beyond which its numbers get no better, and a least, below which they say nothing: where the run has fewer than some
100,000 training tokens the leasts decide, and the card takes the time of some thousand tokens. The held-out loss itself,
before and after, is an evaluation of the run, over all rows. ``eval_samples`` is obeyed when it is set.

Sizes are rounded down to powers of two, so that runs of about the same length are measured on the same rows and the same text,
and can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamina.data.render import Rendered
from lamina.data.store import TokenStore
from lamina.evaluation import Answer, Evaluating
from lamina.neutral import NEUTRAL_TOKENS
from lamina.training.loop import Training

SHARE = 0.1
"""Part of the training's time that the card may take."""

ANSWERS, COMPARED, NEUTRAL, DOSED = 0.5, 0.1, 0.15, 0.25
STEP, WRITTEN = 50, 2
"""Cost of a step of writing, and of each token in it: on the demo's base 16 answers at a time cost 5.3 a token, 64 cost 2.5."""

SAMPLES = (4, 64)
TOKENS = (256, 16_384)
"""Least and most tokens of held-out rows for KL; also the least of neutral text."""

DOSE_TOKENS = (128, 8_192)
NEW_SCALES = 5
"""Scales of the dose curve at which the model has to be run."""


@dataclass(frozen=True)
class Sizes:
    """What the card measures, in rows and tokens; ``portion`` is computed at one time."""

    portion: int
    samples: int
    """Prompts that are answered."""
    new_tokens: int
    """Tokens of an answer at most."""
    compared: int
    """Tokens of the held-out rows on which KL is measured."""
    neutral: int
    """Tokens of neutral text."""
    dosed: int
    """Tokens of held-out rows on the dose curve, and as many of neutral text."""


def sizes(settings: Evaluating, training: Training, train: TokenStore, held_out: TokenStore) -> Sizes:
    """The sizes for a job and its data."""
    examples = training.steps * training.batch_size if training.steps else round(len(train) * training.epochs)
    mean = float(train.lengths.mean()) if len(train) else 0.0
    budget = SHARE * 2 * examples * mean
    prompt = float(held_out.lengths.mean()) if len(held_out) else 0.0
    limit, samples = settings.eval_max_new_tokens, settings.eval_samples
    affordable = (ANSWERS * budget / 2 - STEP * limit) / (prompt + WRITTEN * limit)
    return Sizes(
        portion=training.portion,
        samples=_within(affordable, SAMPLES) if samples is None else samples,
        new_tokens=limit,
        compared=_within(COMPARED * budget / 2, TOKENS),
        neutral=_within(NEUTRAL * budget / 2, (TOKENS[0], NEUTRAL_TOKENS)),
        dosed=_within(DOSED * budget / (2 * NEW_SCALES), DOSE_TOKENS),
    )


def some(lengths: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """The places of rows that together hold at most so many tokens, at least one row: drawn from all parts of the data, and
    each time the same ones."""
    order = np.random.default_rng(0).permutation(len(lengths))
    count = int(np.searchsorted(lengths[order].cumsum(), tokens, side="right"))
    return np.sort(order[: max(1, count)])


def lengths_of(rows: TokenStore | Sequence[Rendered]) -> NDArray[np.int64]:
    """Tokens of each row."""
    if isinstance(rows, TokenStore):
        return rows.lengths
    return np.array([len(row.tokens) for row in rows], dtype=np.int64)


def numbers_of(rows: TokenStore | Sequence[Rendered] | Sequence[Answer]) -> NDArray[np.int64]:
    """The number of the row that each is, or is a piece of."""
    if isinstance(rows, TokenStore):
        return rows.rows
    return np.array([row.row for row in rows], dtype=np.int64)


def _within(number: float, bounds: tuple[int, int]) -> int:
    """The largest power of two in the number, within bounds, which are such powers themselves."""
    power = 1 << (max(int(number), 1).bit_length() - 1)
    return min(max(power, bounds[0]), bounds[1])
