"""The case: everything that the rules judge by, gathered once.

Most of the statistics were counted while the data were read (``DataReport``, ``Lengths``). What only the tokens tell is counted
here in one pass over the stores of the run, which are in memory or in the page cache by then. What could not be read is empty:
rules that count find nothing in it.
"""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.data.lengths import Lengths
from lamina.data.prepare import Prepared
from lamina.data.render import Rendered
from lamina.data.report import DataReport
from lamina.data.templates import ChatFormat
from lamina.job import Job
from lamina.model.architecture import Architecture
from lamina.planning import Planned

MANY_BYTES = 0.3
"""Share of byte tokens above which a row is named: it is written in letters that the tokenizer does not know."""

NO_PROMPT = 0
"""Stands for the prompt of a row that has none."""

SAMPLED = 64
"""Plain texts that are looked at for the marks of a dialogue."""


@dataclass(frozen=True)
class Counts:
    """What the tokens of the training rows tell, and of the held-out rows against them.

    Args:
        tokens, learnt: of the training rows; ``byte`` are those that stand for a byte of a character without a token.
        unknown_rows: rows that hold the token for what is unknown, ``byte_rows`` those with many byte tokens.
        no_start_rows: rows that begin without the token that begins a text, ``double_start_rows`` hold a second one in one block.
        repeats: training rows whose tokens, of all their pieces, stand in an earlier one.
        shared_prompts: held-out rows whose prompt also stands in training.
        texts: the beginnings of some rows that are learnt from their first token.
    """

    tokens: int = 0
    learnt: int = 0
    byte: int = 0
    unknown: int = 0
    unknown_rows: tuple[int, ...] = ()
    byte_rows: tuple[int, ...] = ()
    no_start_rows: tuple[int, ...] = ()
    double_start_rows: tuple[int, ...] = ()
    repeats: tuple[int, ...] = ()
    shared_prompts: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A job, and what is known of its base and its data.

    Args:
        architecture: None where the base's config cannot be read.
        chat: how the tokenizer writes conversations; None where there is no tokenizer, or no such template.
        report, lengths, counts: of the data; empty where they cannot be read.
        ranks: the rank of each adapted linear by its path; empty where the adapter does not fit.
        planned: the memory plan; None where there is none.
        merged: the dtype in which a merge would write the adapted matrices; None where the base's files cannot be read.
    """

    job: Job
    architecture: Architecture | None = None
    chat: ChatFormat | None = None
    report: DataReport = field(default_factory=lambda: DataReport("", "", "truncate", 0, "answers"))
    lengths: Lengths = field(default_factory=Lengths)
    counts: Counts = field(default_factory=Counts)
    ranks: Mapping[str, int] = field(default_factory=dict)
    planned: Planned | None = None
    merged: torch.dtype | None = None

    @property
    def steps(self) -> int:
        """The optimiser steps of the run; 0 where the data could not be read."""
        return self.job.train.total_steps(self.report.train_rows) if self.report.train_rows else 0

    @property
    def chats(self) -> int:
        """Rows that the template writes."""
        return sum(number for form, number in self.report.forms.items() if form not in ("text", "llama2-text"))

    @property
    def alpha(self) -> float:
        """The alpha that the adapter amounts to, s·R: the median over its matrices; the job's, where they are not known."""
        lora = self.job.adapter
        return float(np.median([lora.scale_of(path) * rank for path, rank in self.ranks.items()] or [lora.alpha]))


def count(data: Prepared, tokenizer: Any) -> Counts:
    """Counts what the tokens tell, in one pass; it keeps two numbers a row."""
    of = _Tokens(tokenizer)
    tokens = learnt = byte = unknown = 0
    about: dict[str, list[int]] = {name: [] for name in ("unknown", "byte", "no start", "double start")}
    contents, prompts, numbers = array("q"), array("q"), array("q")
    texts: list[str] = []
    for row in data.train:
        kinds = np.bincount(of.kinds[row.tokens], minlength=3)
        tokens, learnt = tokens + len(row.tokens), learnt + int(np.count_nonzero(row.trained))
        byte, unknown = byte + int(kinds[1]), unknown + int(kinds[2])
        for name in of.about(row, kinds):
            about[name].append(row.row)
        content = hash(row.tokens.tobytes())
        if numbers and numbers[-1] == row.row:  # one more piece of a row that was cut into pieces
            contents[-1] = hash((contents[-1], content))
        else:
            contents.append(content)
            numbers.append(row.row)
        prompts.append(_prompt(row))
        if row.trained[1:2].all() and len(texts) < SAMPLED:
            texts.append(str(tokenizer.decode(row.tokens[:256].tolist())))
    rows = {name: tuple(dict.fromkeys(found)) for name, found in about.items()}
    again = np.ones(len(numbers), dtype=np.bool_)
    again[np.unique(contents, return_index=True)[1]] = False
    held = [(row.row, _prompt(row)) for row in data.held_out]
    shared = np.isin([prompt for _, prompt in held], np.setdiff1d(prompts, [NO_PROMPT]))
    return Counts(
        tokens=tokens,
        learnt=learnt,
        byte=byte,
        unknown=unknown,
        unknown_rows=rows["unknown"],
        byte_rows=rows["byte"],
        no_start_rows=rows["no start"],
        double_start_rows=rows["double start"],
        repeats=tuple(np.array(numbers)[again].tolist()),
        shared_prompts=tuple(row for (row, _), stands in zip(held, shared, strict=True) if stands),
        texts=tuple(texts),
    )


def _prompt(row: Rendered) -> int:
    """Tells the prompts of rows apart: the tokens before the first that is learnt, where they are more than a beginning."""
    first = int(row.trained.argmax())
    return hash(row.tokens[:first].tobytes()) if first > 1 else NO_PROMPT


class _Tokens:
    """What the ids of a tokenizer stand for: 0 text, 1 a byte, 2 the unknown."""

    def __init__(self, tokenizer: Any) -> None:
        known: Mapping[str, int] = tokenizer.get_vocab()
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.kinds = np.zeros(max(known.values()) + 1, dtype=np.int64)  # ids may have gaps
        self.kinds[[index for name, index in known.items() if _is_byte(name)]] = 1
        if (unknown := tokenizer.unk_token_id) not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
            self.kinds[unknown] = 2

    def about(self, row: Rendered, kinds: NDArray[np.int64]) -> Iterator[str]:
        """What is to be said of a row."""
        if kinds[2]:
            yield "unknown"
        if kinds[1] > MANY_BYTES * len(row.tokens):
            yield "byte"
        if self.start is not None and self.start != self.end:
            if row.tokens[0] != self.start:
                yield "no start"
            if self._starts_again(row.tokens):
                yield "double start"

    def _starts_again(self, tokens: NDArray[np.int32]) -> bool:
        """Whether a start token follows another one with no end token between them."""
        starts = np.flatnonzero(tokens == self.start)
        if len(starts) < 2:
            return False
        ends_before = np.searchsorted(np.flatnonzero(tokens == self.end), starts)
        return bool((np.diff(ends_before) == 0).any())


def _is_byte(name: str) -> bool:
    """Whether a token is a byte of a character outside ASCII, which for these lies in a single byte."""
    return len(name) == 6 and name.startswith("<0x") and name[3] in "89ABCDEF"
