"""The examination: gathers the case, lets the rules judge it, and turns what is refused elsewhere into findings.

``diagnose`` is for a run, which has read everything by itself: nothing is read twice. ``check`` reads what a run would read,
up to the weights, and goes on after everything that a run would end at.
"""

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lamina.adapter import LoRA
from lamina.data.examples import examples_in
from lamina.data.lengths import Cut, Lengths
from lamina.data.prepare import Prepared
from lamina.data.problems import ENOUGH, Problems
from lamina.data.templates import chat_format
from lamina.doctor import rules
from lamina.doctor.case import Case, count
from lamina.doctor.finding import Diagnosis, Finding
from lamina.errors import ConfigError, DataError, Error, ModelError
from lamina.job import Job, base_folder, prepare_data, shipped, shipped_path
from lamina.job import check as refuse
from lamina.model.architecture import read_config
from lamina.model.tokenizer import load_tokenizer
from lamina.model.weights import DTYPES, pick_device, used_tensors
from lamina.planning import Planned, plan_run
from lamina.policies import dense_dtype
from lamina.training.plan import ranks_of

LIMITS = (512, 1024, 2048, 4096)
"""Lengths at which the table says what would be lost, beside the chosen one."""

FILES = 3
"""Files of broken rows that are named."""

ALIKE = 3
"""Problems that differ only in a value, so many of which are told one by one."""
VALUE = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d+""")
_ADVICE = "; choose another with --template"


def diagnose(job: Job, base: Path, tokenizer: Any, data: Prepared, planned: Planned) -> Diagnosis:
    """The diagnosis of a run that is about to begin, from what it has read."""
    architecture = read_config(base)
    ranks = ranks_of(architecture, job.adapter)
    case = Case(
        job,
        architecture,
        chat_format(tokenizer, job.data.template),
        data.report,
        data.lengths,
        count(data, tokenizer),
        ranks,
        planned,
        dense_dtype(used_tensors(base, architecture), ranks, DTYPES[job.model.dtype]),
    )
    return Diagnosis.of(rules.findings(case), table(data.lengths, data.report.max_length))


def table(lengths: Lengths, chosen: int) -> Iterator[Cut]:
    """What cutting the rows at the chosen length and at the usual ones would lose; only lengths that some row reaches."""
    if len(lengths.tokens):
        longest = int(lengths.tokens.max())
        yield from (lengths.cut_at(limit) for limit in sorted({chosen, *LIMITS}) if limit < longest or limit == chosen)


@dataclass(frozen=True)
class Checkup:
    """What ``check`` found, and the data and tokenizer that it read, where it could."""

    diagnosis: Diagnosis
    data: Prepared | None
    tokenizer: Any | None


def check(job: Job) -> Checkup:
    """Examines a job: its settings, its base's config and tokenizer, its data and the memory plan; no weights."""
    at = _Examination(job)
    at.base()
    at.settings()
    at.read()
    at.plan()
    chosen = at.case.report.max_length
    found = Diagnosis.of([*at.refused, *rules.findings(at.case)], table(at.case.lengths, chosen))
    return Checkup(found, at.data, at.tokenizer)


@dataclass
class _Examination:
    """A case as it is gathered, and what was refused on the way."""

    job: Job
    refused: list[Finding] = field(default_factory=list)
    folder: Path | None = None
    tokenizer: Any | None = None
    data: Prepared | None = None

    def __post_init__(self) -> None:
        self.case = Case(self.job)

    def refuse(self, rule: str, error: Error | str, mend: str = "") -> None:
        """Notes what a run would end at; where ``mend`` is not given, it is the last part of the message."""
        found, _, advice = str(error).rpartition("; ")
        if mend or not found:
            found, advice = str(error), mend or "see what was expected"
        self.refused.append(Finding(rule, "error", found, "the run would be refused", advice))

    def know(self, **parts: Any) -> None:
        """Adds parts to the case."""
        self.case = replace(self.case, **parts)

    def base(self) -> None:
        """The base's folder, its config, its tokenizer."""
        try:
            self.folder = base_folder(self.job.model, weights=False)
            self.know(architecture=read_config(self.folder))
        except Error as error:
            self.refuse("base", error)
        if self.folder:
            try:
                self.tokenizer = load_tokenizer(self.folder)
                self.know(chat=chat_format(self.tokenizer, self.job.data.template))
            except DataError as error:
                self.refuse("template", error)
                self.job = replace(self.job, data=replace(self.job.data, template=None))
                self.know(chat=chat_format(self.tokenizer))
            except ModelError as error:
                self.refuse("tokenizer", error)

    def settings(self) -> None:
        """What the settings alone, or with the base's config, make impossible."""
        try:
            pick_device(self.job.model.device)
        except ConfigError as error:
            self.refuse("device", error)
            self.job = replace(self.job, model=replace(self.job.model, device="auto"))
        if self.folder and (architecture := self.case.architecture):
            try:
                self.know(ranks=ranks_of(architecture, self.job.adapter))
            except ConfigError as error:
                self.refuse(
                    "targets", error, "--targets all-linear, or some of the names above; --rank within what fits"
                )
            try:
                optimizer_apart = replace(self.job.train, optimizer="adamw")  # it has a rule of its own
                refuse(replace(self.job, adapter=LoRA(rank=1), train=optimizer_apart), self.folder)
            except ConfigError as error:
                self.refuse("checkpoint-layers", error, "--checkpoint-layers none, which lets the plan choose")
                self.job = replace(self.job, train=replace(self.job.train, checkpoint_layers=None))
        job = self.job
        if job.watch.patience and job.data.eval_fraction == 0 and job.data.eval_data is None:
            self.refuse(
                "patience",
                "patience counts evaluations, but nothing is held out",
                "--eval-fraction 0.05, or --patience none",
            )
        if job.head.out and (out := Path(job.head.out)).exists() and not (out.is_dir() and not any(out.iterdir())):
            self.refuse("out", f"{out} is there already, and not an empty folder", "another --out, or none")
        self.neutral()
        self.know(job=self.job)

    def neutral(self) -> None:
        """The text on which forgetting is measured: whether it is there."""
        name = self.job.evaluate.neutral
        try:
            if name is None or shipped_path(name).is_file():
                return
        except ConfigError as error:
            self.refuse("neutral", error, "check --neutral")
        else:
            self.refuse(
                "neutral",
                f"{name}: no such file; its perplexity would be missed at the end of the run",
                "check --neutral",
            )

    def read(self) -> None:
        """The data, with what is wrong in single rows left out."""
        problems = Problems(kept=True)
        try:
            data = shipped(self.job.data)
            if self.folder and self.tokenizer and self.case.architecture:
                self.data = self._prepared(self.folder, problems)
            else:  # their form can be examined all the same
                deque(examples_in(data.data, data.split, data.data_revision, problems), maxlen=0)
        except ModelError as error:
            self.refuse("tokenizer", error)
        except (ConfigError, DataError) as error:
            if not problems.ended:  # by these rows, which are told by themselves
                self.refuse("data", error)
        self.refused += _refused_rows(problems)
        if self.data:
            report, lengths, counts = self.data.report, self.data.lengths, count(self.data, self.tokenizer)
            self.know(job=self.job, report=report, lengths=lengths, counts=counts)

    def _prepared(self, folder: Path, problems: Problems) -> Prepared:
        try:
            return prepare_data(self.job, folder, self.tokenizer, problems)
        except ConfigError as error:
            self.refuse("max-length", error)
            self.job = replace(self.job, data=replace(self.job.data, max_length=None))
            return prepare_data(self.job, folder, self.tokenizer, problems)

    def plan(self) -> None:
        """The memory, and in which dtype a merge would be written; of the weights only their headers are read."""
        if self.folder and self.data and (architecture := self.case.architecture) and (ranks := self.case.ranks):
            try:
                stored = used_tensors(self.folder, architecture)
                self.know(merged=dense_dtype(stored, ranks, DTYPES[self.job.model.dtype]))
                self.know(planned=plan_run(self.job, self.folder, self.data, timed=False))
            except Error as error:
                self.refuse("weights", error)


def _refused_rows(problems: Problems) -> Iterator[Finding]:
    """One finding for each kind of problem that single rows have."""
    stopped = "at least " if problems.count >= ENOUGH else ""
    for problem, places in _kinds(problems.places):
        numbers = (re.search(r"\d+$", place) for place in places)
        template = problem.startswith(("the template ", "template "))
        yield Finding(
            "template-refuses-rows" if template else "broken-rows",
            "error",
            f"{stopped}{len(places):,} of the rows of {_files(places)}: {problem}",
            "the run would be refused: a row that is left out in silence is one that nobody misses",
            "choose another --template, or mend the rows"
            if template
            else problems.hints or "mend or remove these rows",
            tuple(int(number[0]) for number in numbers if number),
        )


def _files(places: Sequence[str]) -> str:
    """The files, or the data sets, that the places lie in: the first of them, and the number of the others."""
    names = list(dict.fromkeys(place.rpartition(":")[0] for place in places))
    return ", ".join(names[:FILES]) + (f" and {len(names) - FILES:,} more" if len(names) > FILES else "")


def _kinds(places: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Sequence[str]]]:
    """Each problem and where it is; many that differ only in a value (the text of the row) are one."""
    alike: dict[str, list[str]] = {}
    for problem in places:
        alike.setdefault(VALUE.sub("…", problem), []).append(problem)
    for some in alike.values():
        if len(some) <= ALIKE:
            yield from ((problem.removesuffix(_ADVICE), places[problem]) for problem in some)
        else:
            first = f"{some[0].removesuffix(_ADVICE)} (and {len(some) - 1:,} others like it)"
            yield first, [place for problem in some for place in places[problem]]
