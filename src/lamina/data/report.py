"""What was found in the data and what was made of it, in numbers and in plain sentences."""

from dataclasses import dataclass, field

LISTED = 5
"""Files that are named."""


@dataclass(frozen=True)
class DataReport:
    """The account of one data set: how it was read, which tokens count in its loss, and what was lost on the way.

    But for the split itself all is counted over the rows that were read, a share that is held out of them included.

    Args:
        forms: rows by the form they were found in.
        template: the chat template that wrote the messages.
        ignored: columns that no row's form reads.
        bos_held: rows whose text held the token that begins it already; it was kept once.
        lengths: tokens of a row before anything was cut: median, 95th percentile, longest.
        tokens, targets: of all rows, before anything was cut.
        answers, ended: answers (or plain texts) that the cuts left, and how many of them end in a trained end token.
        blank_answers: answers without text, which are not learnt.
        specials_inside: rows with a message that holds the text of a special token.
        long: what became of the rows longer than ``max_length``, which is the model's context where ``context``.
        lost_tokens, lost_targets: what that cost; ``cut_answers`` lost their end, ``lost_answers`` all of their text.
        nothing_to_learn: numbers of the rows that hold no target (or none after the cut): never trained on.
        duplicates: rows that repeat an earlier one; copies stand on the same side of the split.
        concerned: numbers of the rows that a count is about, by its name: bos_held, blank_answers, specials_inside.
        train_rows, held_out_rows: examples on either side of the split: rows, or pieces of rows that were cut.
        held_out_whole: rows that the held-out examples are, or are pieces of.
        held_out_copies: held-out rows left out because they also stand in training.
        left_out: data files in the folders that are read neither for this split nor for another.
    """

    source: str
    template: str
    long: str
    max_length: int
    train_on: str
    rows: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    bos_held: int = 0
    lengths: tuple[int, int, int] = (0, 0, 0)
    tokens: int = 0
    targets: int = 0
    answers: int = 0
    ended: int = 0
    blank_answers: int = 0
    specials_inside: int = 0
    long_rows: int = 0
    lost_tokens: int = 0
    lost_targets: int = 0
    cut_answers: int = 0
    lost_answers: int = 0
    nothing_to_learn: tuple[int, ...] = ()
    duplicates: int = 0
    train_rows: int = 0
    held_out_rows: int = 0
    held_out_whole: int = 0
    held_out_copies: int = 0
    held_out_source: str = ""
    left_out: tuple[str, ...] = ()
    context: bool = False
    concerned: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def learnt(self) -> float:
        """The share of the tokens that are learnt, of what the cuts left."""
        left = self.tokens - self.lost_tokens
        return (self.targets - self.lost_targets) / left if left else 0.0

    @property
    def distinct(self) -> int:
        """Rows that can be learnt from, copies counted once: what a share is held out of."""
        dropped = self.long_rows if self.long == "drop" else 0
        return self.rows - len(self.nothing_to_learn) - dropped - self.duplicates

    def lines(self) -> list[str]:
        """The account in sentences, the most important first; nothing is said of what did not happen, nor judged: that is the
        doctor's affair."""
        forms = ", ".join(f"{name} ({_rows(number)})" for name, number in self.forms.items())
        said = [f"data: {self.source}, format {forms.replace('llama2-text (', 'llama2-text (already rendered; ')}"]
        if self.left_out:
            more = f" and {len(self.left_out) - LISTED:,} more" if len(self.left_out) > LISTED else ""
            why = "no split in the name, or .txt beside data"
            said.append(f"files not read: {', '.join(self.left_out[:LISTED])}{more} ({why})")
        if any(name not in ("text", "llama2-text") for name in self.forms):
            said.append(f"chat template: {self.template}")
        if self.bos_held:
            said.append(f"beginning of text: kept once ({_rows(self.bos_held)} held it already)")
        median, most, longest = self.lengths
        said.append(
            f"tokens: {self.tokens:,}, of which {self.targets:,} count ({self._what()}); "
            f"a row has {median:,} (median), {most:,} (95th percentile), {longest:,} (longest)"
        )
        texts = "texts" if set(self.forms) == {"text"} else "answers"
        said.append(f"end token trained in {self.ended:,} of {self.answers:,} {texts}")
        context = ", the model's context" if self.context else ""
        longer = f"longer than {self.max_length:,} tokens{context}"
        if self.long_rows:
            done = {"drop": "left out", "truncate": "cut at the end", "split": "cut into pieces"}[self.long]
            said.append(
                f"{longer}: {_rows(self.long_rows)} {done}; lost {self.lost_tokens:,} tokens, "
                f"{self.lost_targets:,} of them to be learnt; {self.cut_answers:,} {texts} cut, {self.lost_answers:,} lost"
            )
        else:
            said.append(f"{longer}: no row")
        if self.ignored:
            said.append(f"columns not used: {', '.join(self.ignored)}")
        if self.duplicates:
            said.append(f"repeated: {_rows(self.duplicates)}, kept on the same side of the split")
        held = f"{_rows(self.held_out_rows, 'example')} held out" + (
            f" from {self.held_out_source}" if self.held_out_source else ""
        )
        copies = f"; {_rows(self.held_out_copies)} left out that also stand in training" if self.held_out_copies else ""
        train = f"{_rows(self.train_rows, 'example')} to train on"
        said.append(f"split: {train}, {held}{copies}")
        return said

    def _what(self) -> str:
        everything = self.train_on == "everything" or set(self.forms) == {"text"}
        return "everything" if everything else "answers and their end tokens"


def _rows(number: int, name: str = "row") -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"
