"""Faults of other trainers that a job reproduces on purpose, or merely declares: each is told."""

from collections.abc import Iterator
from typing import NamedTuple

from lamina.doctor.case import Case
from lamina.doctor.finding import Finding, Grade, counted


class _Fault(NamedTuple):
    grade: Grade
    found: str
    why: str
    mend: str


_LEAVE = "leave {!r} out of commit under [faults]; --commit '' commits none"
_ELSEWHERE = "Lamina cannot commit it; in the trainer that the job was taken from, "
_FAULTS = {
    "masked-end": _Fault(
        "error",
        "the padding token is the end token, and a language-model collator masks both",
        "the model learns to stop only from end tokens with a loss; without them it writes until the limit",
        _LEAVE,
    ),
    "double-start": _Fault(
        "error",
        "the text holds the start token, and the tokenizer adds another",
        "the base has never seen two; it answers worse, and the prompts in use have one",
        _LEAVE,
    ),
    "by-length": _Fault(
        "warning",
        "batches are ordered by length",
        "the loss of a step reflects the length of its rows, which hides what was learnt",
        _LEAVE,
    ),
    "no-template": _Fault(
        "warning",
        "held-out prompts are asked without the chat template",
        "the model is asked in another form than it was taught, and answers worse than it could",
        _LEAVE,
    ),
    "half-precision": _Fault(
        "warning",
        "fp16 compute under bf16 training",
        "only four of five 7B runs finish with fp16 compute (Dettmers et al. 2023, arXiv:2305.14314), and two precisions round twice",
        _ELSEWHERE + "set bnb_4bit_compute_dtype to bfloat16",
    ),
    "unused-checkpointing": _Fault(
        "warning",
        "a checkpointing flag is set and never passed to the trainer",
        "the memory it was to save is not saved, and nothing says so",
        _ELSEWHERE + "pass gradient_checkpointing to the training arguments; here --checkpoint-layers, or the plan",
    ),
    "other-merge-base": _Fault(
        "warning",
        "the adapter is merged onto an fp16 base that training never saw",
        "it was learnt over the 4-bit base, whose errors it has learnt to balance; beside other weights it is another model",
        _ELSEWHERE + "merge onto the base as it was trained on; here `lamina merge RUN`, whose default that is",
    ),
    "unknown-task": _Fault(
        "warning",
        "a task type that does not exist was accepted in silence",
        "what reads the adapter by its task type finds none, and loads another class, or none",
        _ELSEWHERE + "write task_type CAUSAL_LM; here it is always written",
    ),
}


def faults(case: Case) -> Iterator[Finding]:
    """Every fault that the job names, with what it did to the rows; the rules about these leave it out."""
    for name in dict.fromkeys(case.job.faults.commit):
        fault = _FAULTS[name]
        said, rows = _done(name, case) if case.report.rows else ("", ())
        yield Finding(name, fault.grade, said + fault.found, fault.why, fault.mend.format(name), rows)


def _done(name: str, case: Case) -> tuple[str, tuple[int, ...]]:
    """What a fault did, as the tokens tell it, and in which rows; nothing, where it does nothing to the rows."""
    report, rows = case.report, case.counts.double_start_rows
    if name == "masked-end":
        return f"end token trained in {report.ended:,} of {report.answers:,} answers: ", ()
    if name == "double-start":
        return f"{len(rows):,} of {counted(report.rows, 'row')} hold a second start token: ", rows
    return "", ()


RULES = (faults,)
