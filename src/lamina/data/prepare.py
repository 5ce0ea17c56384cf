"""The whole road from a data set to what a run trains on and measures itself by.

Rows are read, written as text, tokenised, brought to length and stored, a block at a time, so that a set may be larger
than memory. The held-out part is chosen afterwards, by a function of seed and content alone: neither the order of the
rows nor the size of the blocks matters, copies of a row stand on the same side, and rows added later move few others.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.data.examples import DataSettings, examples_in, left_out
from lamina.data.faults import Fault, Faults, on_row, without_template
from lamina.data.fit import fit
from lamina.data.forms import Example
from lamina.data.lengths import Lengths, LengthsWriter
from lamina.data.problems import Problems
from lamina.data.render import Marked, Rendered, mark, tokens_of
from lamina.data.report import DataReport
from lamina.data.store import TokenStore, TokenWriter
from lamina.data.templates import ChatFormat, chat_format
from lamina.errors import ConfigError, DataError, ModelError

Progress = Callable[[int], None]
LONGEST = 2048
"""Tokens of the longest example, where neither the settings nor the model's context say less."""


@dataclass(frozen=True)
class Prepared:
    """What a run trains on, what it measures itself by, the account of both, and the data's rows before any cut."""

    train: TokenStore
    held_out: TokenStore
    report: DataReport
    lengths: Lengths = field(default_factory=Lengths)


@dataclass(frozen=True)
class _Read:
    """A data set as tokens. ``keys`` tell a row by its whole content, ``pieces`` what is left of it after a cut."""

    store: TokenStore
    keys: NDArray[np.uint64]
    pieces: NDArray[np.uint64]
    count: Counter[str]
    forms: Counter[str]
    ignored: Counter[str]
    lengths: Lengths
    nothing: tuple[int, ...]
    concerned: dict[str, tuple[int, ...]]


def prepare(
    settings: DataSettings,
    tokenizer: Any,
    seed: int,
    progress: Progress | None = None,
    *,
    vocabulary: int | None = None,
    max_position: int | None = None,
    problems: Problems | None = None,
    faults: Faults | None = None,
) -> Prepared:
    """Reads and renders the data, and holds a part of it out.

    Args:
        seed: chooses the held-out rows.
        progress: told the number of rows read so far, after each block.
        vocabulary: ids that the model knows, if it is known; no row may hold another.
        max_position: the model's context, if it is known; no row may be longer.
        problems: takes what is wrong with single rows; where it keeps them, they are left out and the others prepared.
        faults: committed on purpose on what is trained on, or on what is held out; which rows that is, they do not change.

    Raises:
        ConfigError: ``max_length`` is beyond the model's context.
        DataError: the data cannot be read or rendered, or nothing is left to train on.
        ModelError: the tokenizer gives ids that the model does not know.
    """
    limit = _longest(settings.max_length, max_position)
    chat = chat_format(tokenizer, settings.template)
    faults = faults or Faults()
    read = partial(_read, _Source(settings, chat, limit, vocabulary, progress), problems=problems or Problems())
    data = read(settings.data, settings.split)
    again = partial(read, problems=Problems(kept=True))  # what is wrong with these rows is noted already
    taught = again(settings.data, settings.split, commit=faults.of_training) if faults.of_training else data
    if not len(taught.store):
        raise DataError(
            f"{settings.data}: nothing to train on: none of {data.count['rows']:,} rows holds a token to learn within "
            f"{limit:,} tokens; see max_length, long and train_on"
        )
    report = _report(settings, taught, chat) | {
        "max_length": limit,
        "context": settings.max_length is None and limit == max_position,
    }
    if settings.eval_data is None:
        source = settings.data, settings.split
        held = _choose(data.keys, settings.eval_fraction, seed)
        copies = held & np.isin(data.pieces, data.pieces[~held])
        train, held_out = data.store.part(~held), data.store.part(held & ~copies)
    else:
        source = settings.eval_data, settings.eval_split
        other = read(*source)
        copies = np.isin(other.keys, data.keys) | np.isin(other.pieces, data.pieces)
        train, held_out = data.store, other.store.part(~copies)
        if not len(held_out):
            raise DataError(
                f"{settings.eval_data}: nothing to measure by: all {int(copies.sum()):,} usable rows also stand in the "
                "training data"
            )
    if faults.of_training:
        train = taught.store.part(np.isin(taught.store.rows, train.rows))
    if faults.of_asking and len(held_out):
        asked = again(*source, commit=faults.of_asking).store
        held_out = asked.part(np.isin(asked.rows, held_out.rows))
    report |= {
        "train_rows": len(train),
        "held_out_rows": len(held_out),
        "held_out_whole": len(np.unique(held_out.rows)),
        "held_out_copies": int(copies.sum()),
    }
    return Prepared(train, held_out, DataReport(**report), taught.lengths)


def _longest(wanted: int | None, context: int | None) -> int:
    """The longest example that a run admits."""
    if wanted is None:
        return LONGEST if context is None else min(LONGEST, context)
    if context is not None and wanted > context:
        raise ConfigError(
            f"max_length: found {wanted}, expected at most {context}, the model's context (max_position_embeddings); "
            f"run with --max-length {context}"
        )
    return wanted


@dataclass(frozen=True)
class _Source:
    """How data are read: the same for what is trained on and what is held out."""

    settings: DataSettings
    chat: ChatFormat
    limit: int
    vocabulary: int | None
    progress: Progress | None


def _read(of: _Source, source: str, split: str, problems: Problems, commit: Collection[Fault] = ()) -> _Read:
    """Reads one data set to its end; ``commit`` are faults committed on its rows."""
    settings, chat, limit, known = of.settings, of.chat, of.limit, problems.count
    count, forms, ignored = Counter[str](), Counter[str](), Counter[str]()
    keys, pieces, nothing, lengths = array("Q"), array("Q"), array("q"), LengthsWriter()
    concerned: dict[str, list[int]] = {"bos_held": [], "blank_answers": [], "specials_inside": []}
    begins = chat.tokenizer.bos_token_id if chat.bos else None
    revision = settings.data_revision if source == settings.data else None
    with TokenWriter() as writer:
        examples = examples_in(source, split, revision, problems)
        while block := list(islice(examples, settings.read_ahead)):
            marked = list(_mark(block, chat, settings.system_prompt, source, problems, commit))
            for rendered in tokens_of(marked, chat, settings.train_on):
                rendered = on_row(rendered, commit, chat.tokenizer, begins)
                _check_ids(rendered, of.vocabulary, chat, source)
                kept = fit(rendered, limit, settings.long, begins, count)
                whole = _key(rendered.tokens)
                for piece in kept:
                    writer.append(piece)
                    keys.append(_key(piece.tokens) if settings.long == "truncate" else whole)
                    pieces.append(_key(piece.tokens))
                    count["ended"] += sum(turn.ended for turn in piece.turns)
                count["answers"] += len(rendered.turns)
                count["usable"] += bool(kept)
                count["targets"] += int(rendered.trained.sum())
                lengths.append(rendered)
                if not kept and not (settings.long == "drop" and len(rendered.tokens) > limit):
                    nothing.append(rendered.row)
            count["rows"] += len(block)
            count["blank_answers"] += sum(item.blank for item in marked)
            chats = {item.row for item in block if item.messages}  # in these the template writes it
            concerned["bos_held"] += [item.row for item in marked if item.bos_held > (item.row in chats)]
            concerned["blank_answers"] += [item.row for item in marked if item.blank]
            concerned["specials_inside"] += [item.row for item in block if _holds_specials(item, chat)]
            forms.update(item.form for item in block)
            ignored.update(name for item in block for name in item.ignored)
            if of.progress:
                of.progress(count["rows"])
        measured = lengths.lengths()
        # Where every row is refused there is nothing to go on with, and nothing else to say of them.
        problems.check(stopped=problems.kept and problems.count > known and not len(measured.tokens))
        count["answers"] -= count["lost_answers"]
        store = writer.store()
    count.update({name: len(concerned[name]) for name in ("bos_held", "specials_inside")})
    distinct = np.array(keys, dtype=np.uint64)
    count["duplicates"] = count.pop("usable", 0) - len(np.unique(distinct))
    return _Read(
        store,
        distinct,
        np.array(pieces, dtype=np.uint64),
        count,
        forms,
        ignored,
        measured,
        tuple(nothing),
        {name: tuple(rows) for name, rows in concerned.items()},
    )


def _mark(
    examples: list[Example],
    chat: ChatFormat,
    system_prompt: str | None,
    source: str,
    problems: Problems,
    commit: Collection[Fault],
) -> Iterator[Marked]:
    for example in examples:
        try:
            marked = mark(example, chat, system_prompt)
            yield without_template(marked, example, chat) if "no-template" in commit else marked
        except DataError as error:
            problems.add(f"{source}: row {example.row}", str(error))


def _check_ids(rendered: Rendered, vocabulary: int | None, chat: ChatFormat, source: str) -> None:
    """Refuses a row with an id for which the model has no vector."""
    if vocabulary is None or not (beyond := np.flatnonzero(rendered.tokens >= vocabulary)).size:
        return
    number = int(rendered.tokens[beyond[0]])
    raise ModelError(
        f"{source}: row {rendered.row}: the tokenizer gives {chat.tokenizer.convert_ids_to_tokens(number)!r} the id "
        f"{number}, but the model knows {vocabulary:,} ids, from 0; use the tokenizer that was published with the model"
    )


def _key(tokens: NDArray[np.int32]) -> int:
    """Tells token sequences apart: 64 bits, so that two of a million rows share one by chance once in 37 million sets."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")


def _holds_specials(example: Example, chat: ChatFormat) -> bool:
    """Whether a message holds the text of a special token, which the tokenizer then reads as that token."""
    return any(special in message.content for message in example.messages for special in chat.special_texts)


def _choose(keys: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """The rows to hold out: those whose seeded hash is among the smallest, at least one and never all of them."""
    distinct = np.unique(keys)
    if fraction == 0 or len(distinct) < 2:
        return np.zeros(len(keys), dtype=np.bool_)
    number = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    order = np.argsort(_mix(distinct ^ _mix(np.array([seed % 2**64], dtype=np.uint64))), kind="stable")
    return np.isin(keys, distinct[order[:number]])


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): a permutation of 64-bit numbers without visible pattern."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _report(settings: DataSettings, data: _Read, chat: ChatFormat) -> dict[str, Any]:
    """The fields of the report that the split does not decide."""
    median, most = np.percentile(data.lengths.tokens, (50, 95)).astype(int).tolist()
    sources = (settings.data, settings.split), (settings.eval_data or "", settings.eval_split)
    return {
        "source": settings.data,
        "template": chat.name,
        "long": settings.long,
        "train_on": settings.train_on,
        "forms": dict(data.forms.most_common()),
        "ignored": tuple(name for name, number in data.ignored.items() if number == data.count["rows"]),
        "lengths": (median, most, int(data.lengths.tokens.max())),
        "tokens": int(data.lengths.tokens.sum()),
        "nothing_to_learn": data.nothing,
        "held_out_source": settings.eval_data or "",
        "left_out": tuple(dict.fromkeys(name for source in sources for name in left_out(*source))),
        "concerned": data.concerned,
        **data.count,
    }
