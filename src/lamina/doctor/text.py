"""Rules about how rows become tokens: their beginning and end, their template, what of them is learnt."""

import re
from collections.abc import Iterator

from lamina.data.forms import Message
from lamina.data.templates import ChatFormat, chat_format
from lamina.doctor.case import Case
from lamina.doctor.finding import Finding, counted
from lamina.errors import DataError

DIALOGUE = re.compile(
    r"###? ?(Human|Instruction|User|Question|Assistant|Response)\b|<\|im_start\|>|<\|user\|>|<\|start_header_id\|>"
    r"|\[INST\]|(^|\n)(Human|USER|User|Q): .*\n?.*(ASSISTANT|Assistant|A): ",
)
"""How the turns of a dialogue are marked in plain text."""

BYTES = 0.05
"""Share of byte tokens from which on they are worth a word: English has none, an emoji or a rare letter now and then few."""

_PROBE = tuple(Message(role, text) for role, text in (("user", "one"), ("assistant", "two")) * 2)  # type: ignore[arg-type]


def end_token(case: Case) -> Iterator[Finding]:
    """Answers whose end is not learnt."""
    report = case.report
    if report.ended == report.answers or "masked-end" in case.job.faults.commit:
        return
    lengths = case.lengths
    beyond = (lengths.stops > report.max_length) & (report.long == "truncate")
    rows = lengths.rows_of_answers((lengths.ended == 0) | beyond)
    answers = "texts" if set(report.forms) == {"text"} else "answers"
    cut = "cut rows lose theirs: raise --max-length, or --long split" if beyond.any() else ""
    absent = "end every answer with the end token" if (lengths.ended == 0).any() else ""
    if absent and case.chats:
        absent = "choose a template that writes an end token (--template)"
    yield Finding(
        "end-token",
        "warning" if report.ended else "error",
        f"end token trained in {report.ended:,} of {report.answers:,} {answers}",
        "the model learns to stop only from end tokens with a loss; without them it writes until the limit",
        "; ".join(filter(None, (absent, cut))) or "end every answer with the end token",
        rows,
    )


def double_start(case: Case) -> Iterator[Finding]:
    """Rows with a second start token that no end token comes before."""
    if (rows := case.counts.double_start_rows) and "double-start" not in case.job.faults.commit:
        yield Finding(
            "double-start",
            "error",
            f"{_of(case, len(rows))} hold a second start token, with no end token before it",
            "the base has never seen two; it answers worse, and the prompts in use will have one",
            "leave the start token out of the template's or the rows' text: Lamina adds it",
            rows,
        )


def no_start(case: Case) -> Iterator[Finding]:
    """Rows without the token that begins a text, where the tokenizer has one."""
    rows = case.counts.no_start_rows
    if rows and case.chat and case.chat.bos:
        yield Finding(
            "no-start",
            "warning",
            f"{_of(case, len(rows))} begin without the start token {case.chat.bos}",
            "the base was trained with it before every text, and uses it as a place to rest attention on",
            "take the template of the tokenizer: leave --template out",
            rows,
        )


def start_held(case: Case) -> Iterator[Finding]:
    """Rows whose text holds the token that begins it already."""
    rows = case.report.concerned.get("bos_held", ())
    if rows and "double-start" not in case.job.faults.commit:
        yield Finding(
            "start-in-text",
            "note",
            f"the text of {_of(case, len(rows))} holds the start token already; it was kept once",
            "a trainer that tokenises such text with its usual settings adds a second one, in silence",
            "nothing to do here; elsewhere, tokenise without special tokens",
        )


def other_template(case: Case) -> Iterator[Finding]:
    """Rows written in another form than the base was tuned on."""
    if case.chat is None or (own := _own(case.chat)) is None:
        return
    theirs, rendered = _written(own), case.report.forms.get("llama2-text", 0)
    differs = case.chat.name != own.name and _written(case.chat) != theirs
    if case.chats and differs:
        yield _template_finding(
            f"{_of(case, case.chats)} are written by the template {case.chat.name}, the base brings another one",
            "leave --template out, which takes the tokenizer's; or start from the base model that was not tuned to chat",
        )
    if rendered and "[INST]" not in theirs:
        yield _template_finding(
            f"{_of(case, rendered)} are written in Llama-2's form ([INST] …), the base's template is another one",
            "give the rows as messages (role and content), so that the base's own template writes them",
        )


def no_template(case: Case) -> Iterator[Finding]:
    """A template by default, because neither the tokenizer nor the job names one."""
    if case.chat and case.chats and _own(case.chat) is None and case.job.data.template is None:
        family = case.architecture.family if case.architecture else "llama"
        yield Finding(
            "template-by-default",
            "warning" if family.startswith("qwen") else "note",
            f"the tokenizer brings no chat template, so Llama-2's writes {_of(case, case.chats)}",
            "any form can be taught to a base that knows none, but it has to be the one that is used afterwards",
            "name it: --template llama2, alpaca, vicuna, chatml, or a .jinja file",
        )


def _template_finding(found: str, mend: str) -> Finding:
    why = "what a tuned base has learnt hangs on its own form; in another one it has to learn to chat anew"
    return Finding("other-template", "warning", found, why, mend)


def _own(chat: ChatFormat) -> ChatFormat | None:
    """The tokenizer's own template, if it brings one."""
    try:
        own = chat_format(chat.tokenizer)
    except DataError:
        return None
    return own if own.name == "of the tokenizer" else None


def _written(chat: ChatFormat) -> str:
    """A short conversation as the template writes it, white space aside."""
    try:
        return " ".join(chat.one_bos(chat.write(_PROBE))[0].split())
    except DataError:
        return ""


def loss_on_prompts(case: Case) -> Iterator[Finding]:
    """A loss on the user's words too."""
    chats = case.chats + case.report.forms.get("llama2-text", 0)
    if case.job.data.train_on == "everything" and chats:
        yield Finding(
            "loss-on-prompts",
            "warning",
            f"the loss counts every token of {_of(case, chats)}, the prompts' too (train_on = everything)",
            "the model learns to write questions as well as answers, and the loss says less about the answers",
            "--train-on answers",
        )


def dialogue_as_text(case: Case) -> Iterator[Finding]:
    """Plain text that is a dialogue."""
    found = sum(DIALOGUE.search(text) is not None for text in case.counts.texts)
    if case.report.forms.get("text") and found:
        yield Finding(
            "dialogue-as-text",
            "warning",
            f"{found:,} of {len(case.counts.texts):,} sampled plain texts hold the marks of a dialogue",
            "plain text is learnt in full, the user's words too, and only its last turn has an end token",
            "give the rows as messages (role and content) or as a prompt and its completion; then --template writes them",
        )


def unknown_tokens(case: Case) -> Iterator[Finding]:
    """Characters that the tokenizer cannot write at all."""
    if rows := case.counts.unknown_rows:
        token = case.chat.tokenizer.unk_token if case.chat else "unknown"
        yield Finding(
            "unknown-tokens",
            "warning",
            f"{counted(case.counts.unknown, 'character')} or more that the tokenizer does not know became {token}",
            "the model sees that something was there, and not what; it may learn to write it",
            "remove these characters from the rows, or use the tokenizer that was published with the model",
            rows,
        )


def byte_tokens(case: Case) -> Iterator[Finding]:
    """Characters that are written byte by byte."""
    share = case.counts.byte / max(1, case.counts.tokens)
    if share > BYTES:
        yield Finding(
            "byte-tokens",
            "warning",
            f"{share:.0%} of the tokens are single bytes of characters that the tokenizer has no token for",
            "such text takes three times the tokens, and the base has hardly learnt to read or write it",
            "choose a base whose tokenizer knows the script of the data, such as one of the Qwen family",
            case.counts.byte_rows,
        )


def specials_inside(case: Case) -> Iterator[Finding]:
    """Messages that hold the text of a special token."""
    if rows := case.report.concerned.get("specials_inside", ()):
        yield Finding(
            "specials-inside",
            "warning",
            f"messages of {_of(case, len(rows))} hold the text of a special token, which is read as that token",
            "an answer that ends in its middle, or a prompt that can forge turns, is learnt as if it were meant",
            "remove or rewrite such text (</s>, <s>, …) in the data",
            rows,
        )


def _of(case: Case, number: int) -> str:
    return f"{number:,} of {counted(case.report.rows, 'row')}"


RULES = (
    end_token,
    double_start,
    no_start,
    start_held,
    other_template,
    no_template,
    loss_on_prompts,
    dialogue_as_text,
    unknown_tokens,
    byte_tokens,
    specials_inside,
)
