"""Before and after: the measures with their intervals, the answers side by side, the tokens that were learnt, the dose."""

from collections.abc import Sequence

from lamina.report import charts
from lamina.report.chapters.words import certain, figure, interval_of, loss, nats, rows_of, span
from lamina.report.charts import Line
from lamina.report.drawing import thin
from lamina.report.forms import Answer, Card, Dose, Interval, Kl, Learnt, Side
from lamina.report.forms import Token as Loss
from lamina.report.kept import Kept
from lamina.report.page import Page, Section, Table, Token, Tokens
from lamina.understand.bootstrap import three_digits
from lamina.understand.card import held_out_text

SHOWN = 8
"""Answers side by side."""
LONGEST = 600
"""Characters of a prompt or an answer."""
TOKENS = 160
"""Tokens of a row that is shown token by token."""
LISTED = 12
"""Tokens in the lists of the most and the least learnt."""

_MEASURES = (
    ("loss on {held_out} (nats per token)", "held_out", "loss", ".3f", 1.0),
    ("perplexity of {held_out}", "held_out", "perplexity", ",.2f", 1.0),
    ("{tokens} predicted (%)", "held_out", "accuracy", ".1f", 100.0),
    ("answers that are the data's, word for word (%)", "answers", "exact_match", ".1f", 100.0),
    ("answers that end by themselves (%)", "answers", "stop_rate", ".1f", 100.0),
    ("mean length of an answer (tokens)", "answers", "mean_tokens", ".1f", 1.0),
    ("loss on neutral text (nats per token)", "neutral", "loss", ".3f", 1.0),
    ("perplexity of neutral text", "neutral", "perplexity", ",.2f", 1.0),
)
_SHADES = (
    ("much", "learnt: at least 2 nats less (seven times as likely)"),
    ("some", "0.3 to 2 nats less"),
    ("same", "about as before"),
    ("worse", "at least 0.3 nats more"),
    ("context", "given, nothing to learn"),
)


def before_after(page: Page, kept: Kept) -> None:
    """Adds the chapter of the card."""
    section = page.section(
        "Before and after",
        "The untouched base beside the adapter, on the same held-out rows; none of them was trained on.",
    )
    card = kept.card
    if card is None:
        section.note("There is no card.json.")
        return
    held_out = held_out_text(kept.counted)
    rows = [
        row
        for name, part, key, form, factor in _MEASURES
        if (row := _row(card, name.format(held_out=held_out, tokens=kept.counted), part, key, form, factor))
    ]
    if not rows:
        section.note("Nothing was measured: no rows were held out and there is no neutral text.")
        return
    sure = any(interval_of(change) for change in card.difference.values())
    caption = "In brackets 95\u00a0% intervals; a change whose interval holds 0 may be chance." if sure else ""
    section.table(Table("The measures", ["measure", "base", "adapter", "change"], rows, caption, True))
    for name, what in (("answers", held_out), ("neutral", "neutral text")):
        if kl := (card.kl or {}).get(name):
            section.text(
                f"On {what} the adapter's predictions are {_distance(kl)} nats per token away from the base's "
                f"(KL divergence, {kl.tokens:,} tokens)."
            )
    _answers(section, card)
    if card.dose is not None:
        section.chart(_dose(card.dose, held_out))
    else:
        section.note("No dose curve was measured.")


def _distance(kl: Kl) -> str:
    said = nats(kl.mean)
    form = three_digits(kl.mean)
    return said if said.startswith("less") else f"{figure(kl.mean, form)}{span(kl.interval, form)}"


def tokens(page: Page, kept: Kept) -> None:
    """Adds the chapter that shows what was learnt token by token."""
    section = page.section(
        "Token by token",
        "What the model was given, what it was to learn, and how hard it found each token before and after.",
    )
    learnt = None if kept.card is None else kept.card.learnt
    if learnt is None:
        section.note("The card holds no losses of single tokens: they are measured on held-out rows.")
        return
    for number, row in enumerate(learnt.rows):
        shown = row.tokens[:TOKENS]
        rest = len(row.tokens) - len(shown)
        more = [Token(f" … {rest:,} more", "context")] if rest else []
        section.add(
            Tokens(
                f"Held-out row {row.row}",
                [*map(_token, shown), *more],
                () if number else _SHADES,
                "" if number else "Below each token that counts: its loss in nats before → after.",
            )
        )
    _lists(section, learnt, held_out_text(kept.counted))


def samples(page: Page, kept: Kept) -> None:
    """Adds the chapter of the answers over the steps."""
    section = page.section(
        "Answers over the steps", "The same held-out prompts, answered at every evaluation; step 0 is the base."
    )
    if not kept.samples:
        section.note("There is no samples.jsonl: no prompts were asked during the run.")
    rows: dict[int, list[Answer]] = {}
    for sample in kept.samples:
        rows.setdefault(sample.row, []).append(sample)
    for row, answers in rows.items():
        first = answers[0]
        wanted = f"Expected: {_cut(first.reference, 300)}" if first.reference else ""
        lines = [[f"{one.step:,}", _said(one)] for one in thin(answers, 12)]
        section.table(
            Table(f"Held-out row {row}: {_cut(' '.join(first.prompt.split()), 120)}", ["step", "answer"], lines, wanted)
        )


def shade(before: float | None, after: float | None) -> str:
    """The class of a token by its gain; the thresholds are those of the legend."""
    if before is None or after is None:
        return "context"
    gain = before - after
    return "much" if gain >= 2 else "some" if gain >= 0.3 else "worse" if gain <= -0.3 else "same"


def _row(card: Card, name: str, part: str, measure: str, form: str, factor: float) -> list[str] | None:
    before, after = _value(card.base, part, measure), _value(card.adapter, part, measure)
    if before is None or after is None:
        return None
    change = card.difference.get(f"{part}.{measure}")
    delta = change[0] if change else after - before
    cells = [
        f"{figure(value * factor, form)}{span(_times(_span(side, part, measure), factor), form)}"
        for value, side in ((before, card.base), (after, card.adapter))
    ]
    moved = f"{figure(delta * factor, f'+{form}')}{span(_times(interval_of(change), factor), f'+{form}')}"
    chance = " (may be chance)" if delta and interval_of(change) and not certain(change) else ""
    return [name, *(cell.replace("-", "−") for cell in (*cells, moved + chance))]


def _value(side: Side, part: str, measure: str) -> float | None:
    found = getattr(side, part)
    value: float | None = None if found is None else getattr(found, measure)
    return value


def _span(side: Side, part: str, measure: str) -> Interval:
    interval: Interval = getattr(side, part).intervals.get(measure)
    return interval


def _times(interval: Interval, factor: float) -> Interval:
    return None if interval is None else (interval[0] * factor, interval[1] * factor)


def _answers(section: Section, card: Card) -> None:
    if card.base.answers is None or card.adapter.answers is None or not card.adapter.answers.rows:
        section.note("No held-out prompts were answered.")
        return
    pairs = list(zip(card.base.answers.rows, card.adapter.answers.rows, strict=False))
    rows = [[_cut(a.prompt), _cut(a.reference), _said(b), _said(a)] for b, a in pairs[:SHOWN]]
    caption = (
        f"The first {len(rows)} of {len(pairs):,}; all of them are in card.json." if len(pairs) > len(rows) else ""
    )
    section.table(Table("Answers side by side", ["prompt", "expected", "base", "adapter"], rows, caption, True))


def _said(answer: Answer) -> str:
    text = _cut(answer.answer) or "(nothing)"
    return text if answer.stopped else f"{text} … (cut off: it did not stop)"


def _cut(text: str, longest: int = LONGEST) -> str:
    text = text.strip()
    return text if len(text) <= longest else f"{text[:longest]} …"


def _dose(dose: Dose, held_out: str) -> charts.Chart:
    lines = [Line(held_out, dose.scales, dose.task, style="points")]
    if dose.neutral is not None:
        lines.append(Line("neutral text", dose.scales, dose.neutral, "third", "dashed"))
    knee = "At no strength is the held-out loss clearly below the base's, so there is no knee. "
    marks = [(1.0, "as trained")]
    if dose.knee is not None:
        knee = f"From {dose.knee:g} on more of it brings little: the knee. "
        marks = [(dose.knee, "knee")] if dose.knee == 1 else [(1.0, "as trained"), (dose.knee, "knee")]
    return charts.lines(
        "Dose",
        "The adapter at other strengths, 0 being the base. The strength with the lowest held-out loss is best for the task; what the "
        f"line of neutral text rises by is the price. {knee}Measured on {rows_of(dose.rows)}.",
        lines,
        "scale of the adapter",
        "loss (nats per token)",
        marks=marks,
    )


def _token(token: Loss) -> Token:
    text = token.text.replace("\n", "⏎\n").replace("\t", "⇥")
    if not token.trained or token.before is None or token.after is None:
        return Token(text, "context")
    text = text if text.strip(" ") else "␣" * len(text)
    return Token(text, shade(token.before, token.after), f"{_short(token.before)}→{_short(token.after)}")


def _short(nats: float) -> str:
    return f"{nats:.1f}" if nats >= 0.05 else "0"


def _lists(section: Section, learnt: Learnt, held_out: str) -> None:
    for title, of in (("Learnt most", learnt.most), ("Became worse", learnt.least)):
        if of:
            section.table(_list(title, of[:LISTED], held_out))
        else:
            section.note(f"{title}: none of the tokens that occur often.")


def _list(title: str, of: Sequence[Loss], held_out: str) -> Table:
    rows = [[_visible(t.text), f"{t.count:,}", loss(t.before), loss(t.after), _whole(_total(t))] for t in of]
    columns = ["token", "times", "before", "after", "in all"]
    return Table(
        title,
        columns,
        rows,
        f"Tokens of the {held_out}: how often each is the right one, its mean loss before and after, and the change of all of them "
        "together, in nats. In this order they make up the change of the whole loss.",
    )


def _total(token: Loss) -> float:
    return token.count * ((token.after or 0.0) - (token.before or 0.0))


def _whole(nats: float) -> str:
    return figure(nats, ",.0f" if abs(nats) >= 100 else ".3g").replace("-", "−")


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "(nothing)"
