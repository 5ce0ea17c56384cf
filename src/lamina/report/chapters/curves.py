"""How the run went: losses over the steps, the learning rate, the gradient."""

from collections.abc import Sequence

import numpy as np

from lamina.report import charts
from lamina.report.chapters.words import loss
from lamina.report.charts import Line
from lamina.report.forms import Step
from lamina.report.kept import Kept
from lamina.report.page import Page

WIDE = 20.0
"""Ratio of the largest to the smallest loss from which on their axis is logarithmic."""


def curves(page: Page, kept: Kept) -> None:
    """Adds the chapter of curves."""
    section = page.section(
        "How it learnt", "The loss is −log p of the right next token, in nats: 0 is certainty, 0.69 one chance in two."
    )
    if not kept.steps:
        section.note("There is no metrics.jsonl with a step in it.")
        return
    section.chart(_training(kept.steps), *_held_out(kept))
    section.chart(*_optimisation(kept.steps))
    if not kept.evaluations:
        section.note(
            "Nothing was held out, so there is no curve of the held-out loss: set eval_fraction, or name eval_data."
        )


def smoothed(steps: Sequence[Step]) -> list[float]:
    """Mean over a window of about a fifteenth of the steps around each, every supervised token counted alike."""
    if not steps:
        return []
    half, count = max(1, len(steps) // 30), len(steps)
    losses = np.array([step.loss for step in steps], dtype=np.float64)
    tokens = np.array([step.supervised_tokens for step in steps], dtype=np.float64)
    with np.errstate(all="ignore"):  # a damaged record may hold any number
        nats, inside = (np.convolve(of, np.ones(2 * half + 1))[half:][:count] for of in (losses * tokens, tokens))
        found: list[float] = np.where(inside > 0, nats / inside, losses).tolist()
    return found


def _training(steps: Sequence[Step]) -> charts.Chart:
    x, raw, smooth = [step.step for step in steps], [step.loss for step in steps], smoothed(steps)
    rose = "It rose, f" if smooth[-1] > smooth[0] else "F"
    return charts.lines(
        "Training loss",
        f"{rose}rom {loss(smooth[0])} to {loss(smooth[-1])}. Single steps jump because their rows differ; look at the strong "
        "line. It should fall fast, then slowly.",
        [Line("each step", x, raw, style="faint"), Line("smoothed", x, smooth)],
        "step",
        "loss (nats per trained token)",
        log=_axis(smooth),
    )


def _held_out(kept: Kept) -> list[charts.Chart]:
    if not kept.evaluations:
        return []
    base = next((one.eval_loss for one in kept.evaluations if one.step == 0), None)
    tuned = [one for one in kept.evaluations if one.step > 0]
    x, y = [one.step for one in tuned], [one.eval_loss for one in tuned]
    lines = [Line("adapter", x, y, style="points")] if tuned else []
    caption = "Rows that it was not trained on. "
    if base is not None:
        ends = [0, max(x, default=1)]
        lines.append(Line("base", ends, [base, base], "base", "dashed"))
        caption += "Below the dashed line it is better than the untouched base. "
    caption += _turn(x, y)
    return [
        charts.lines(
            "Held-out loss",
            caption,
            lines,
            "step",
            f"loss (nats per {kept.counted[:-1]})",
            log=_axis([*y, *([base] if base else [])]),
        )
    ]


def _turn(steps: Sequence[int], losses: Sequence[float]) -> str:
    """Whether it got worse again."""
    if len(losses) < 2:
        return ""
    best = min(range(len(losses)), key=lambda n: losses[n])
    if best == len(losses) - 1:
        return f"The best value is the last one, {loss(losses[-1])}: it had not begun to learn by heart."
    return (
        f"The best value is {loss(losses[best])} at step {steps[best]}, after which it rose to {loss(losses[-1])}: the run's folder has "
        "that adapter as best/."
    )


def _optimisation(steps: Sequence[Step]) -> list[charts.Chart]:
    x = [step.step for step in steps]
    return [
        charts.lines(
            "Learning rate",
            "Warm-up, peak, and what the schedule makes of the rest.",
            [Line("learning rate", x, [step.learning_rate for step in steps])],
            "step",
            "learning rate",
        ),
        charts.lines(
            "Gradient norm",
            "Of the whole gradient, before clipping. Lone peaks are harmless; a steady rise is a rate that is too high.",
            [Line("gradient norm", x, [step.grad_norm for step in steps])],
            "step",
            "norm",
            log=_axis([step.grad_norm for step in steps]),
        ),
    ]


def _axis(values: Sequence[float]) -> str:
    positive = [value for value in values if value > 0]
    return "y" if positive and max(positive) / min(positive) > WIDE else ""
