"""What a run's ledger and its steps show to be wrong, in words: each kind at most once, so that a note is worth reading.

A note needs a window of steps and a wide bound, because a false alarm costs more trust than a late one costs time. The bounds
follow from what AdamW can do. It moves a number by its rate times q = |m|/√v, and q lies between 0.23, for gradients that are
pure noise (√((1-β₁)/(1+β₁)) at β₁ = 0.9), and 1, for gradients that never turn: a spread of 4.3. The norm of the pair is that of A at
first, which is drawn in ±1/√in, so the change relative to it goes with √(in + out): a spread of 1.8 over the shapes of a Llama.
Together 8: among matrices that learn, none moves by less than an eighth of another. Measured over the demo and over GSM8K on
TinyStories, the slowest comes to 0.57 of the median, and the largest ‖ΔW‖/‖W‖ to 1.6 medians.

Everything said is a function of the steps and the ledger's rows in their order. A resumed run goes through those again that it
finds, and then knows what it has said.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lamina.training.loop import Step, Training
from lamina.understand.ledger import Place, Row

ENTRIES = 20
"""Entries of the ledger over which a matrix is judged: twice as many as the steps that m remembers at β₁ = 0.9."""

STEPS = 50
"""Steps over which the loss and the clipping are judged."""

EVERY = 10
"""Steps between two judgements."""

STILL = 1 / 20
"""A matrix whose steps, by the median over the window, are less than this share of the others' does not move: 2½ times below the
eighth that AdamW's spread explains."""

RUNAWAY = 20.0
"""A matrix whose ‖ΔW‖/‖W‖ is so many medians of all runs away: 2½ times what the spread explains. So does one whose gradient is so
many times what it was, and so many medians of all; gradients differ by nature, by 12 in the demo, but do not drift apart so far."""

LARGE = 0.1
"""‖ΔW‖/‖W‖ from which an update can be said to run away: a tenth of the weight is beyond what LoRA usually needs."""

CLIPPED = 0.9
"""Share of the steps with a clipped gradient from which clipping is no guard against outliers any more."""

FOLLOWS = 0.9
"""Correlation of the steps' loss with their supervised tokens per example at which four fifths of its variance (0.81) are explained
by it. 0.73 is seen in the demo, whose rows are drawn at random."""

ORDERED = 2.5
"""Batches are ordered by length if the variance of their mean length is so many times that of rows drawn at random, which is the
rows' own by the batch size. Drawn at random it comes to 1 ± 0.2 over 50 steps (0.8 to 1.4 in the demo, on GSM8K and guanaco);
grouped by length, to nearly the batch size (3.9 to 4.0 at four)."""

FOLLOWS_ORDER = 0.4
"""The correlation from which such an order is told: over 50 steps, chance gives so much once in 250 times."""


_TINY = 1e-300


class Notes:
    """Listens to a run's steps, and says what is wrong when it is.

    Args:
        places: of the adapted matrices, in the order of the ledger's rows.
        lengths: tokens of each training row.

    Attributes:
        said: the notes so far, in their order.
    """

    def __init__(self, places: Sequence[Place], training: Training, lengths: NDArray[np.int64]) -> None:
        self._places, self._batch, self._clip = places, training.batch_size, training.clip
        self._spread, self._last = float(np.var(lengths)), training.total_steps(len(lengths))
        self._rows: deque[Row] = deque(maxlen=ENTRIES)
        self._first: NDArray[np.float64] | None = None
        self._steps: deque[Step] = deque(maxlen=STEPS)
        self._kinds = [self._still, self._runaway, self._clipping, self._composition]
        self.said: list[str] = []

    def step(self, step: Step, row: Row | None) -> list[str]:
        """Takes a step and its entry in the ledger, if it has one; returns the notes that are new."""
        if step.step < self._last:  # which may be a short one
            self._steps.append(step)
        if row is not None:
            self._rows.append(row)
            if self._first is None and len(self._rows) == ENTRIES:
                self._first = self._median("grad_norm")
        new = [] if step.step % EVERY else list(self._judge(step.step))
        self.said += new
        return new

    def _judge(self, step: int) -> Iterable[str]:
        for kind in tuple(self._kinds):
            if text := kind():
                self._kinds.remove(kind)
                yield f"note, step {step}: {text}"

    def _still(self) -> str:
        """Matrices that do not move."""
        if len(self._rows) < ENTRIES:
            return ""
        ratio = self._median("ratio")
        still = (ratio < STILL * np.median(ratio)) | (self._rows[-1]["b_norm"] == 0)
        if not still.any():
            return ""
        share, count = ratio[still].max() / max(np.median(ratio), _TINY), int(still.sum())
        return (
            f"{count} of {len(still)} adapted matrices {'does' if count == 1 else 'do'} not move: {self._named(still)}; over "
            f"{ENTRIES} entries of the ledger their steps are at most {share:.2g} of the median (expected: at least {STILL:g}); see "
            f"whether the base feeds them zeros, or leave them out of adapter.targets"
        )

    def _runaway(self) -> str:
        """Matrices whose update or gradient leaves the others behind."""
        if len(self._rows) < ENTRIES or self._first is None:
            return ""
        relative = self._rows[-1]["relative"].astype(np.float64)
        size = relative / max(_low_median(relative), _TINY)
        large = (size > RUNAWAY) & (relative > LARGE)
        if large.any():
            return (
                f"the update of {self._named(large)} runs away: ‖ΔW‖/‖W‖ is {relative[large].max():.2g}, {size[large].max():,.0f} times "
                f"the median of all matrices (expected: at most {RUNAWAY:g}); lower its alpha, or the learning rate"
            )
        gradient = self._median("grad_norm")
        growth = gradient / np.maximum(self._first, _TINY)
        beside = np.minimum(growth / max(_low_median(growth), _TINY), gradient / max(_low_median(gradient), _TINY))
        if (
            large := np.minimum(growth, beside) > RUNAWAY
        ).any():  # from next to nothing to as much as others is no fault
            return (
                f"the gradient of {self._named(large)} runs away: it is {growth[large].max():,.0f} times that of the first {ENTRIES} "
                f"entries, of all matrices {_low_median(growth):.2g} times (expected: at most {RUNAWAY:g} times as much); lower the "
                f"learning rate"
            )
        return ""

    def _clipping(self) -> str:
        """Clipping that acts in most steps."""
        if self._clip is None or len(self._steps) < STEPS:
            return ""
        norms = np.array([step.grad_norm for step in self._steps])
        clipped = int((norms > self._clip).sum())
        if clipped < CLIPPED * STEPS:
            return ""
        return (
            f"the gradient was clipped in {clipped} of the last {STEPS} steps (its norm is {np.median(norms):.3g} at the median, clip is "
            f"{self._clip:g}): all steps weigh alike, and none is told from an outlier; raise train.clip to about "
            f"{_above(norms):g}, or look for what makes the gradient large"
        )

    def _composition(self) -> str:
        """A loss that goes up and down with the length of the answers."""
        if len(self._steps) < STEPS:
            return ""
        loss = np.array([step.loss for step in self._steps])
        answers, length = (
            np.array([getattr(step, tokens) / self._batch for step in self._steps])
            for tokens in ("supervised_tokens", "tokens")
        )
        if not (np.ptp(loss) and np.ptp(answers)):
            return ""
        found = max(_correlation(loss, answers), _correlation(_beside_trend(loss), _beside_trend(answers)), key=abs)
        order = self._batch * float(np.var(length)) / (self._spread or np.inf)
        if abs(found) < (FOLLOWS_ORDER if order > ORDERED else FOLLOWS):
            return ""
        ordered = f"the batches are ordered by length (it varies {order:.1f} times as much as at random), and "
        return (
            f"{ordered if order > ORDERED else ''}the loss of the last {STEPS} steps follows the number of trained tokens per example "
            f"(correlation {found:+.2f}): it shows how the batches are composed more than what is learnt; go by the held-out loss"
        )

    def _median(self, column: str) -> NDArray[np.float64]:
        """Of each matrix over the window, [M]."""
        found: NDArray[np.float64] = np.median(np.array([row[column] for row in self._rows], dtype=np.float64), axis=0)
        return found

    def _named(self, chosen: NDArray[np.bool_], most: int = 4) -> str:
        names = [f"layer {self._places[n].layer} {self._places[n].module}" for n in np.flatnonzero(chosen).tolist()]
        return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _low_median(values: NDArray[np.float64]) -> float:
    """The median, the lower of the middle two: that of the sound ones as long as half of them are."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def _beside_trend(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is left of a series beside its straight line: a loss that falls hides what else moves it."""
    places = np.arange(len(values))
    left: NDArray[np.float64] = values - np.polyval(np.polyfit(places, values, 1), places)
    return left


def _above(norms: NDArray[np.float64]) -> float:
    """A limit that only the largest tenth passes, of two digits: rounded up, for it has to lie above what clips now."""
    norm = float(np.quantile(norms, 0.9))
    digit = 10.0 ** (math.floor(math.log10(norm)) - 1)
    return math.ceil(norm / digit) * digit
