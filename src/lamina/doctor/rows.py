"""Rules about the rows themselves: their lengths, what is left of them, and the split."""

from collections.abc import Iterator

import numpy as np

from lamina.data.forms import Example, Message
from lamina.data.render import mark, tokens_of
from lamina.doctor.case import Case
from lamina.doctor.finding import Finding, counted
from lamina.errors import DataError

WILD = 20
"""A row is wildly long from so many medians on, …"""
WILD_TOKENS = 1024
"""… and so many tokens: nobody minds 40 tokens among rows of two."""

FEW_HELD_OUT = 20
"""Held-out rows below which a loss says little: its standard error is about a quarter of the rows' own spread."""

REPEATED = 0.01
"""Share of repeated rows from which on they weigh in the loss."""


def truncation(case: Case) -> Iterator[Finding]:
    """What is lost at the chosen length."""
    report = case.report
    if not report.lost_tokens:
        return
    chosen = "the default" if case.job.data.max_length is None else "--max-length"
    gone = {"drop": "left out", "truncate": "cut at the end", "split": "cut into pieces"}[report.long]
    answers = f"{counted(report.cut_answers, _answer(case))} cut, {report.lost_answers:,} lost"
    severe = report.cut_answers + report.lost_answers > 0
    longest = min(case.architecture.max_position if case.architecture else report.lengths[2], report.lengths[2])
    longer = f"--max-length {longest}" if longest > report.max_length else ""
    yield Finding(
        "truncation",
        "warning" if severe else "note",
        f"longer than {report.max_length:,} tokens ({chosen}), and {gone}: {report.long_rows:,} of {counted(report.rows, 'row')}; "
        f"{report.lost_tokens:,} tokens lost ({report.lost_tokens / report.tokens:.1%}), {answers}",
        "an answer without its end teaches to stop nowhere; one that is cut away teaches nothing"
        if severe
        else "these tokens are never read; no answer is among them",
        " or ".join(filter(None, (longer, "" if report.long == "split" else "--long split"))) or "shorten these rows",
        case.lengths.rows_where(case.lengths.tokens > report.max_length),
    )


def nothing_to_learn(case: Case) -> Iterator[Finding]:
    """Rows without any token to learn."""
    if rows := case.report.nothing_to_learn:
        yield Finding(
            "nothing-to-learn",
            "warning",
            f"never trained on, for they hold no token to learn: {len(rows):,} of {counted(case.report.rows, 'row')}",
            "elsewhere such rows give a loss of 0 or NaN; here they are left out, and the run is shorter than it seems",
            "give them an answer (or weight 1), raise --max-length where the prompt fills it, or remove them",
            rows,
        )


def empty_answers(case: Case) -> Iterator[Finding]:
    """Answers without text."""
    if rows := case.report.concerned.get("blank_answers", ()):
        yield Finding(
            "empty-answers",
            "warning",
            f"{counted(case.report.blank_answers, 'answer')} without text, not learnt",
            "a blank answer would teach the model to stop at once",
            "fill in these answers, or remove the rows",
            rows,
        )


def short_answers(case: Case) -> Iterator[Finding]:
    """Answers of one token, where others are longer."""
    lengths = case.lengths
    sizes = lengths.stops - lengths.starts - (lengths.ended > 0) - _around(case)
    short = sizes <= 1
    if short.any() and "text" not in case.report.forms and np.median(sizes) > 4:
        yield Finding(
            "one-token-answers",
            "note",
            f"{int(short.sum()):,} of {len(sizes):,} answers are a single token, the median is {int(np.median(sizes)):,}",
            "they may be meant (yes, no), or what is left of a broken export",
            "look at these rows",
            lengths.rows_of_answers(short),
        )


def _around(case: Case) -> int:
    """Tokens that the template writes around an answer, beside its end token: Llama-2's a space after it."""
    if case.chat is None:
        return 0
    try:
        probe = mark(Example(1, "messages", (Message("user", "a"), Message("assistant", "a"))), case.chat)
    except DataError:
        return 0
    start, stop, ended = tokens_of([probe], case.chat, "answers")[0].turns[0]
    return stop - start - ended - 1


def long_rows(case: Case) -> Iterator[Finding]:
    """Rows that are wildly longer than the others."""
    tokens = case.lengths.tokens
    if not len(tokens):
        return
    median = int(np.median(tokens))
    wild = (tokens > WILD * median) & (tokens > WILD_TOKENS)
    if wild.any():
        whole = bool((np.minimum(tokens, case.report.max_length) > WILD * median).any())  # even after the cut
        yield Finding(
            "wildly-long-rows",
            "warning" if whole else "note",
            f"{counted(int(wild.sum()), 'row')} more than {WILD} times as long as the median of {median:,} tokens; "
            f"the longest has {int(tokens.max()):,}",
            ("memory is planned for the longest row; " if whole else "")
            + "such rows are often several examples, or a file, in one cell",
            "look at these rows; split or remove them" + (", or lower --max-length" if whole else ""),
            case.lengths.rows_where(wild),
        )


def repeated_rows(case: Case) -> Iterator[Finding]:
    """Rows that stand in the data more than once."""
    rows, number = case.counts.repeats, case.report.duplicates
    if number:
        share = number / case.report.rows
        yield Finding(
            "repeated-rows",
            "warning" if share > REPEATED else "note",
            f"{number:,} of {case.report.rows:,} rows repeat an earlier one ({share:.1%}); copies stand on one side of the split",
            "what stands in the data twice is learnt twice as hard, and is memorised first",
            "remove the copies, unless they are meant as weights",
            rows,
        )


def in_both_splits(case: Case) -> Iterator[Finding]:
    """Held-out rows that also stand in training."""
    if copies := case.report.held_out_copies:
        yield Finding(
            "in-both-splits",
            "warning",
            f"{counted(copies, 'held-out row')} left out, for the same text stands in training",
            "what was trained on measures memory, not learning",
            "remove them from one of the two, or raise --max-length where they differ only beyond it",
        )
    if rows := case.counts.shared_prompts:
        yield Finding(
            "prompt-in-both-splits",
            "note",
            f"the prompts of {len(rows):,} of {case.report.held_out_rows:,} held-out rows also stand in training, "
            "with other answers",
            "the held-out loss then measures in part what was seen",
            "hold out by prompt: name the held-out rows yourself as --eval-data",
            rows,
        )


def nothing_held_out(case: Case) -> Iterator[Finding]:
    """No rows, or few, to measure by."""
    report, data, held = case.report, case.job.data, case.report.held_out_whole
    if data.eval_data is None and data.eval_fraction == 0:
        yield Finding(
            "nothing-held-out",
            "warning",
            "no rows are held out (eval_fraction = 0, no eval_data)",
            "nobody can say whether the run has learnt or only memorised; there is no best adapter and no card of before and after",
            "--eval-fraction 0.05, or --eval-data FILE",
        )
    elif report.distinct >= 2 * FEW_HELD_OUT and held < FEW_HELD_OUT:
        own = data.eval_data is not None  # then a share has no say
        share = f"--eval-fraction {FEW_HELD_OUT / report.distinct:.3g}, or --eval-data FILE"
        yield Finding(
            "few-held-out",
            "note",
            f"held out: {counted(held, 'row')}" + ("" if own else f" of {report.rows:,}"),
            "a loss over so few rows moves with the rows that happen to be among them",
            "--eval-data FILE, with more rows" if own else share,
        )


def preferences(case: Case) -> Iterator[Finding]:
    """Rows of pairs to prefer from, of which only a part is read."""
    if {"chosen", "rejected"} <= set(case.report.ignored):
        yield Finding(
            "preference-data",
            "warning",
            "the columns chosen and rejected are not used: the rows are made for learning preferences (DPO)",
            "what is learnt here is the answers in the conversation, not the chosen ones",
            "append the chosen answer to the conversation as its last message, and leave both columns out",
        )


def _answer(case: Case) -> str:
    """What the rows hold, as the account of the data calls it."""
    return "text" if set(case.report.forms) == {"text"} else "answer"


RULES = (
    truncation,
    nothing_to_learn,
    empty_answers,
    short_answers,
    long_rows,
    repeated_rows,
    in_both_splits,
    nothing_held_out,
    preferences,
)
