"""The page of a run: ``report.html``, from what its folder holds.

At the end of a run everything else is saved already. So whatever goes wrong with the page costs the page, and is told.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lamina.data.store import TokenStore
from lamina.errors import ConfigError, Error
from lamina.explaining import explain_trained
from lamina.jobfile import Head
from lamina.model.decoder import Decoder
from lamina.report.chapters.adapter import adapter, growth
from lamina.report.chapters.card import before_after, samples, tokens
from lamina.report.chapters.cost import cost, findings, job
from lamina.report.chapters.curves import curves
from lamina.report.chapters.glossary import glossary
from lamina.report.chapters.outcome import outcome
from lamina.report.chapters.words import lasting
from lamina.report.kept import Kept, read_kept
from lamina.report.page import Page
from lamina.report.record import read_metrics, write_json

NAME = "report.html"
_CHAPTERS = (outcome, curves, before_after, tokens, adapter, growth, samples, cost, findings, job, glossary)


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page of a run from what is in its folder; what is absent is said to be.

    Args:
        out: the file; ``report.html`` in the run's folder if None.

    Returns:
        Where the page is.

    Raises:
        CheckpointError: the folder is not a run's, or one of its files is damaged.
        ConfigError: ``out`` is a folder, or in one that does not exist.
    """
    run = Path(run)
    target = run / NAME if out is None else Path(out)
    if target.is_dir():
        raise ConfigError(f"{target}: found a folder, expected the name of a file for the page; name another --out")
    if not target.parent.is_dir() and out is not None:
        raise ConfigError(f"{target}: found no folder {target.parent}; make it, or name another --out")
    page_of(read_kept(run)).write(target)
    return target


def write_explanation(
    model: Decoder, run: Path, base: Path, held_out: TokenStore, portion: int, say: Callable[[str], None]
) -> None:
    """Explains the adapter that a run has just saved into ``explanation.json``, or says in a line why not."""
    with _told(say, "explanation.json", f"lamina explain {run}"):
        tokens = sum(record["tokens"] for record in read_metrics(run) if "loss" in record)
        write_json(run / "explanation.json", explain_trained(model, run, base, held_out, portion, tokens).as_json())


def write_page(run: Path, say: Callable[[str], None]) -> None:
    """Writes the page of a run that ends and says where it is, or in a line why there is none."""
    with _told(say, NAME, f"lamina report {run}"):
        say(f"what it learnt, what it forgot and what it cost, on one page: {report(run)}")


@contextlib.contextmanager
def _told(say: Callable[[str], None], what: str, again: str) -> Iterator[None]:
    """What fails here is told and no more: the run is complete. A drawing can fail in as many ways as its library has."""
    try:
        yield
    except (Error, OSError, ArithmeticError, ValueError, RuntimeError, ImportError) as error:
        why = " ".join(str(error).split())
        say(f"the run is complete, but for {what} ({type(error).__name__}{f': {why}' if why else ''}); again: {again}")


def page_of(kept: Kept) -> Page:
    """The page, chapter by chapter."""
    card = kept.card
    name = card.job if card and card.job != Head.name else kept.folder.resolve().name
    facts = []
    if card is not None:
        facts = [
            ("base", card.model),
            ("steps", f"{card.steps:,}"),
            ("trained tokens", f"{card.supervised_tokens:,}"),
            ("adapter", f"{card.adapter_parameters:,} numbers"),
            ("training", lasting(card.training_seconds)),
            ("device", card.device),
        ]
    versions = "" if card is None else ", ".join(f"{package} {number}" for package, number in card.versions.items())
    page = Page(
        f"Fine-tuning run: {name}",
        "What a LoRA fine-tune learnt, forgot and cost, and what its update is.",
        facts,
        f"Written by {versions or 'Lamina'}. The page is one file, holds no script and loads nothing.",
    )
    for chapter in _CHAPTERS:
        chapter(page, kept)
    return page
