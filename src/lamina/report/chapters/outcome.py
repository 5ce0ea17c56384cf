"""The outcome in five sentences: did it learn, does it stop, what was forgotten, what is the update, what did it cost.

Each is true of the numbers alone, also of a run that learnt nothing: where an interval reaches over zero no difference is
claimed, and where something was not measured that is the sentence.
"""

import math
import statistics
from collections.abc import Iterator

from lamina.report.chapters.curves import smoothed
from lamina.report.chapters.words import (
    certain,
    figure,
    fine_percent,
    interval_of,
    lasting,
    layer_name,
    loss,
    nats,
    percent,
    plain,
    rows_of,
    size,
    slight,
)
from lamina.report.forms import Card, Change, Explanation, Ranks
from lamina.report.kept import Kept
from lamina.report.page import Page, Sayings

_TELLING = 0.05
"""Relative change of the perplexity of neutral text below which little was forgotten; four times as much is a lot."""
_ILLEGIBLE = 1000.0
"""Perplexity of neutral text above which a base cannot read it, so that it shows nothing."""
_APART = 0.1
"""Nats (KL) on neutral text above which a model writes it differently, even if not worse."""


def outcome(page: Page, kept: Kept) -> None:
    """Adds the first chapter."""
    section = page.section("The outcome")
    card, explanation = kept.card, kept.explanation
    if card is None:
        section.note(
            "The run has no card.json: it has not ended, or it was interrupted. What is below is what there is so far."
        )
        return
    told = [
        ("Learning", learning(card, kept)),
        ("Answers", answering(card)),
        ("Forgetting", forgetting(card)),
        ("The update", updating(explanation)),
        ("Cost", costing(card)),
    ]
    section.add(Sayings(told))
    for remark in _remarks(card, kept):
        section.text(remark)


def _remarks(card: Card, kept: Kept) -> Iterator[str]:
    """What has to be read beside the outcome."""
    grades = [finding.grade for finding in kept.check.findings] if kept.check is not None else []
    errors, warnings = grades.count("error"), grades.count("warning")
    if errors:
        yield f"The doctor found {_many(errors, 'error')} before the run: see its findings below before you trust any of this."
    elif warnings:
        yield f"The doctor had {_many(warnings, 'warning')} before the run: see its findings below."
    if notes := len(card.ledger_notes):
        yield f"The ledger has {_many(notes, 'remark')} on how it trained: see How it grew."


def learning(card: Card, kept: Kept) -> str:
    """Whether the held-out loss fell, by how much, and how sure that is."""
    before, after = card.base.held_out, card.adapter.held_out
    if before is None or after is None:
        steps = kept.steps
        ends = smoothed(steps)[:: max(1, len(steps) - 1)] if steps else []
        moved = (
            f" The training loss (smoothed) went from {loss(ends[0])} to {loss(ends[-1])} nats per token."
            if steps
            else ""
        )
        return f"Nothing was held out, so whether it learnt more than its training rows by heart cannot be said.{moved}"
    change = card.difference.get("held_out.loss")
    delta = after.loss - before.loss
    interval = interval_of(change)
    sure = f" (95\u00a0% interval {loss(interval[0])} to {loss(interval[1])})" if interval else ""
    moved = f"from {loss(before.loss)} to {loss(after.loss)} nats per token, a change of {loss(delta)}{sure}"
    on = f"on {after.tokens:,} held-out {kept.counted}"
    if not math.isfinite(delta) or delta == 0 or (interval and not certain(change)):
        return f"O{on[1:]} the loss went {moved}: that cannot be told from no change, so nothing measurable was learnt."
    if slight(delta, before.loss):
        much = f"{delta:.1e}".replace("-", "−")
        return f"Next to nothing was learnt: {on} the loss stayed at {loss(after.loss)} nats per token (a change of {much})."
    hits = card.difference.get("held_out.accuracy")
    if delta < 0 and hits is not None and certain(hits) and hits[0] < 0:
        return (
            f"The loss fell, but the predictions became worse: {on} it went {moved}, and yet the right one is the first guess at "
            f"{percent(after.accuracy)} of them instead of {percent(before.accuracy)}."
        )
    chance = (
        f"it gives the right next token a probability of {_probability(after.loss)} (geometric mean) instead of "
        f"{_probability(before.loss)}"
    )
    if delta > 0:
        return f"It became worse: {on} the loss rose {moved}; {chance}."
    much = "It learnt" if -delta > 0.02 * before.loss else "It learnt very little"
    return f"{much}: {on} the loss fell {moved}; {chance}."


def answering(card: Card) -> str:
    """Whether answers end, how long they are, how many are the data's."""
    before, after = card.base.answers, card.adapter.answers
    if before is None or after is None or after.stop_rate is None or before.stop_rate is None:
        return (
            "No held-out prompts were answered, so whether it stops is not known. They are asked where rows are held out that have "
            "a prompt, and evaluate.eval_samples is not 0."
        )
    count = len(after.rows)
    of = f"Of its {count:,} answers to held-out prompts" if count else "Of its answers to held-out prompts"
    ends = f"{percent(after.stop_rate)} end by themselves (base {percent(before.stop_rate)})"
    warn = (
        ""
        if after.stop_rate >= 0.9
        else ": many do not, so the end token was not learnt, or eval_max_new_tokens is too small for such answers"
    )
    said = f"{of} {ends}{warn}"
    if after.mean_tokens is not None and before.mean_tokens is not None:
        said += f"; they are {after.mean_tokens:.0f} tokens long on average (base {before.mean_tokens:.0f})"
    if after.exact_match is not None and before.exact_match is not None and after.exact_match + before.exact_match > 0:
        said += f", and {percent(after.exact_match)} are the data's answer word for word (base {percent(before.exact_match)})"
    return f"{said}."


def forgetting(card: Card) -> str:
    """What became of text that has nothing to do with the task."""
    before, after = card.base.neutral, card.adapter.neutral
    if before is None or after is None:
        return "What was forgotten is not known: no neutral text was measured (evaluate.neutral names a file)."
    rise = after.perplexity / before.perplexity - 1 if before.perplexity > 0 else math.nan
    moved = f"the perplexity of neutral text went from {plain(before.perplexity)} to {plain(after.perplexity)}"
    kl = (card.kl or {}).get("neutral")
    far = kl is not None and kl.mean >= _APART
    apart = "" if kl is None else f"{{}} on it the two models differ by {nats(kl.mean)} nats per token (KL)"
    but, apart = apart.format(", but" if far else ";"), apart.format(";")
    change = _neutral_change(card)
    if before.perplexity > _ILLEGIBLE or math.isnan(before.perplexity):
        return f"What was forgotten is not known: the base itself cannot read the neutral text; {moved}{apart}."
    if not math.isfinite(after.perplexity):
        return f"Much was forgotten: {moved}, for the adapter's predictions on it are not finite any more."
    if not math.isfinite(rise) or (interval_of(change) and not certain(change)):
        return f"Nothing measurable was forgotten: {moved}{but}."
    if rise <= 0:
        return f"Nothing was forgotten that the neutral text would show: {moved} ({_signed(rise)}){but}."
    how = "Little was" if rise < _TELLING else "Something was" if rise < 4 * _TELLING else "Much was"
    return f"{how} forgotten: {moved} ({_signed(rise)}){apart}."


def updating(explanation: Explanation | None) -> str:
    """How large the update is, how much rank it needs, where it sits."""
    if explanation is None:
        return "The update was not explained: there is no explanation.json."
    if explanation.changes_nothing:
        return "The adapter changes nothing: B·A is zero in every matrix."
    effective = [matrix.effective_rank for matrix in explanation.matrices if matrix.norm > 0]
    said = f"It has rank {explanation.rank}"
    if effective:
        said += f" and uses it as {statistics.mean(effective):.1f} equal directions would (effective rank, mean)"
    said += "" if explanation.ranks is None else _enough(explanation.ranks)
    modules = sorted(explanation.shares.module.items(), key=lambda item: -item[1])[:2]
    layers = sorted(explanation.shares.layer.items(), key=lambda item: -item[1])[:1]
    where = " and ".join(f"{name} ({percent(share)})" for name, share in modules)
    whole = len(explanation.shares.module) == len(modules)
    what, verb = ("All of it", "is") if whole else ("The largest parts of it", "are")
    said += f". {what}, by squared norm, {verb} in {where}"
    if len(explanation.shares.layer) > 1:
        said += f", and of all layers most in layer {layer_name(layers[0][0])} ({percent(layers[0][1])})"
    relative = [m.relation.relative for m in explanation.matrices if m.relation and m.relation.relative is not None]
    if relative:
        said += f"; it changes a matrix by {fine_percent(statistics.median(relative))} of its norm (median)"
    return f"{said}."


def _enough(ranks: Ranks) -> str:
    on = f" on the {rows_of(ranks.rows)} that it was measured on" if 0 < ranks.rows < ranks.held_out_rows else ""
    better = ranks.base_loss - ranks.adapter_loss
    if better <= 0:
        return ""
    if slight(better, ranks.base_loss):
        return "; as next to nothing was learnt, no rank can be said to do"
    if ranks.enough is None:
        return f"; no lower rank that was tried would have done{on}"
    return f"; rank {ranks.enough} would have done, losing at most 1\u00a0% of the improvement{on}"


def costing(card: Card) -> str:
    """Time and memory."""
    seconds = sum(card.seconds.values()) or card.training_seconds
    rate = f" ({card.tokens / card.training_seconds:,.0f} tokens/s)" if card.training_seconds > 0 else ""
    said = (
        f"{_many(card.steps, 'step')} over {card.tokens:,} tokens, {card.supervised_tokens:,} of them with a loss, took "
        f"{lasting(card.training_seconds)} of training{rate}"
    )
    if card.time is not None:
        said += f", planned were {lasting(card.time.planned_seconds)}"
    if seconds > card.training_seconds:
        said += f", and the whole run {lasting(seconds)}"
    if card.memory is not None:
        planned = card.memory.planned.total_bytes
        said += f"; memory peaked at {size(card.memory.measured_bytes)}, planned were {size(planned)}"
    return f"{said}. The adapter has {card.adapter_parameters:,} numbers ({4 * card.adapter_parameters / 1e6:,.1f} MB)."


def _neutral_change(card: Card) -> Change | None:
    return card.difference.get("neutral.loss") or card.difference.get("neutral.perplexity")


def _probability(nats: float) -> str:
    share = math.exp(-nats) if nats > -1 else math.nan
    return percent(share, 1) if share >= 0.01 else fine_percent(share)


def _signed(share: float) -> str:
    return f"{figure(100 * share, '+,.1f' if abs(share) < 10 else '+,.0f')}\u00a0%".replace("-", "−")


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
