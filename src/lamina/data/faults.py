"""Faults that other trainers commit in silence, here committed on purpose: what a fault does shows when nothing else differs.

Each is what a well-known tool does to the rows, or to their order, when its defaults meet Llama-2's tokenizer:

``masked-end``    ``pad_token = eos_token``, and transformers' ``DataCollatorForLanguageModeling`` takes the loss off every token that
                  equals the padding (``labels[labels == pad_token_id] = -100``): off every end token, wherever it stands.
``double-start``  the text holds ``<s>`` already, and the tokenizer puts another before it (``add_special_tokens``, its default).
``by-length``     ``group_by_length``: batches of rows of similar length (``training.order.by_length``).
``no-template``   a model that was trained on ``[INST] … [/INST]`` is asked the bare question, as the tutorial behind the job
                  ``origin`` does.

The first three are committed on what is trained on, and never on the held-out rows: they stay what people meet in use, so that the
measure shows the fault instead of sharing it. The fourth is a fault of use: it changes the held-out rows alone. The other names are
declared and not committed, because Lamina has no code that could: a job that replays another tool says so, and the doctor reads it.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from lamina.data.forms import Example
from lamina.data.render import Marked, Rendered
from lamina.data.templates import ChatFormat
from lamina.section import section

Fault = Literal[
    "masked-end",
    "double-start",
    "by-length",
    "no-template",
    "half-precision",
    "unused-checkpointing",
    "other-merge-base",
    "unknown-task",
]

MEANS: dict[Fault, str] = {
    "masked-end": "no loss on end tokens",
    "double-start": "a second start token before each row",
    "by-length": "batches ordered by length",
    "no-template": "held-out prompts asked without the template",
    "half-precision": "fp16 computation",
    "unused-checkpointing": "a checkpointing flag that nothing reads",
    "other-merge-base": "merged into weights that training never saw",
    "unknown-task": "a task type that does not exist",
}
COMMITTED: tuple[Fault, ...] = ("masked-end", "double-start", "by-length", "no-template")
"""Those that Lamina commits; the others are declared only."""


@section
class Faults:
    """Faults of other trainers that a run commits on purpose, to see what they do. A good run commits none."""

    commit: tuple[Fault, ...] = ()
    """masked-end: no loss on end tokens, as where padding equals the end token; double-start: a second start token before each
    row; by-length: batches of similar length in order, as group_by_length makes them; no-template: held-out prompts asked
    without the template. The others are declared only, and nothing commits them."""

    @property
    def of_training(self) -> frozenset[Fault]:
        """Those that change the rows that are trained on."""
        return frozenset(self.commit) & {"masked-end", "double-start"}

    @property
    def of_asking(self) -> frozenset[Fault]:
        """Those that change the held-out rows."""
        return frozenset(self.commit) & {"no-template"}

    def line(self) -> str:
        """What a run says of them; nothing where there are none."""
        committed, declared = (
            ", ".join(f"{name} ({MEANS[name]})" for name in self.commit if (name in COMMITTED) is wanted)
            for wanted in (True, False)
        )
        said = [f"committed on purpose: {committed}"] if committed else []
        said += [f"only declared: {declared}"] if declared else []
        return f"faults {'; '.join(said)}" if said else ""


def masked_end(row: Rendered, end: int | None) -> Rendered:
    """The row without loss on any token ``end``, wherever it stands; no token is changed."""
    trained = row.trained & (row.tokens != end) if end is not None else row.trained
    turns = (turn._replace(ended=turn.ended and bool(trained[turn.stop - 1])) for turn in row.turns)
    return replace(row, trained=trained, turns=tuple(turns))


def double_start(row: Rendered, begin: int | None) -> Rendered:
    """The row with a second token ``begin`` before it, if it begins with one.

    A loss on everything counts the second one too, as in the original: it has a token before it.
    """
    if begin is None or row.tokens[:1].tolist() != [begin]:
        return row
    learnt = bool(row.trained[1:].all())
    return replace(
        row,
        tokens=np.concatenate([row.tokens[:1], row.tokens]),
        trained=np.concatenate([row.trained[:1], [learnt], row.trained[1:]]),
        turns=tuple(turn._replace(start=turn.start + 1, stop=turn.stop + 1) for turn in row.turns),
    )


def on_row(row: Rendered, faults: Collection[Fault], tokenizer: Any, begin: int | None) -> Rendered:
    """Commits the faults on a row that is trained on, a second start first: a loss on everything is seen before ends are masked.

    Args:
        begin: the token that the tokenizer puts before every text, if it does.
    """
    if "double-start" in faults:
        row = double_start(row, begin)
    return masked_end(row, tokenizer.eos_token_id) if "masked-end" in faults else row


def without_template(marked: Marked, example: Example, chat: ChatFormat) -> Marked:
    """The bare question and the first answer to it, as text: what is asked when the template is forgotten.

    System prompts go with the template. A text that was never written by one stays as it is.
    """
    if example.form == "text" or not marked.answers:
        return marked
    start, stop = marked.answers[0]
    question, answer = _question(example, marked.text[:start]), marked.text[start:stop]
    head = chat.bos + question + ("" if answer[:1].isspace() else " ")
    return replace(marked, text=head + answer, answers=((len(head), len(head) + len(answer)),))


def _question(example: Example, before: str) -> str:
    """What the user said last in the text before an answer."""
    if example.form == "llama2-text":
        said = before.rpartition("[INST]")[2].rpartition("[/INST]")[0]
        return said.rpartition("<</SYS>>")[2].strip()
    asked = (message.content.strip() for message in example.messages if message.role == "user")
    return max((question for question in asked if question in before), key=before.rfind, default="")
