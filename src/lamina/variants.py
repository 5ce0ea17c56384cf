"""The variants of a reference job that a replay runs: faithful, mended, and the mended job with one fault each.

Which faults a job has is read off its two files, ``NAME.toml`` and ``NAME-faithful.toml``: a setting in which they differ, or a name
under ``[faults]``. What a setting of 7B means at another width is kept, and not its number: a learning rate stays as far from the
rule of thumb as it was, a length that was half of the mended job's is half of it again, and alpha goes with the rank.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lamina import jobfile, jobs
from lamina.data.examples import Example, read_examples
from lamina.data.faults import COMMITTED, MEANS, Fault, Faults
from lamina.errors import ConfigError
from lamina.job import SECTIONS, Job, base_folder, prepare_data, shipped
from lamina.jobfile import Head
from lamina.model.architecture import read_config
from lamina.model.tokenizer import load_tokenizer
from lamina.section import nearest
from lamina.settings import Layer, build
from lamina.training.optimizer import rule_of_thumb

LETTERS = {"A": "miniguanaco", "B": "kdnuggets", "C": "origin"}
_REFERENCE = rule_of_thumb(4096, "llama")  # the learning rate that Llama-2-7B should have
_SCALED = "demo/replay.toml"
_LOW = 3  # times under the mended rate, from which on a rate is a fault and not a taste

Kind = Literal["trained", "asked", "merged", "told"]


@dataclass(frozen=True)
class Variant:
    """A row of a replay.

    Attributes:
        kind: trained by itself; or the mended job's adapter asked or merged in another way; or only told about.
        job: what is trained, or how the mended adapter is asked.
        reason: why it is only told about.
    """

    name: str
    what: str
    kind: Kind = "trained"
    job: Job | None = None
    reason: str = ""


def pair(letter: str, flags: Layer) -> tuple[Job, Job]:
    """A reference job mended and faithful, on the model and data that the flags name, or else on the demo's.

    Raises:
        ConfigError: no such letter; whatever is wrong in the flags.
    """
    if letter not in LETTERS:
        raise ConfigError(f"found job {letter!r}, which is unknown{nearest(letter, LETTERS)}")
    names = LETTERS[letter], f"{LETTERS[letter]}-faithful"
    plain = [Job.of(jobfile.load(name, SECTIONS)) for name in names]
    own = [*([] if "model" in flags.values["model"] else [_demo(flags)]), flags]
    sections = {"": Head, **SECTIONS}
    mended, faithful = (
        Job.of(build(sections, jobfile.read(jobs.path(f"{name}.toml"), sections), *own)) for name in names
    )
    mended = replace(mended, head=replace(mended.head, name=f"replay-{letter}"), faults=Faults())
    data = replace(
        mended.data,
        train_on=faithful.data.train_on,
        long=faithful.data.long,
        max_length=_length(mended.data.max_length, *(job.data.max_length for job in plain)),
    )
    train = faithful.train
    if train.learning_rate is not None and "learning_rate" not in flags.values["train"]:
        train = replace(train, learning_rate=_rate(train.learning_rate, mended))
    adapter, was = faithful.adapter, plain[1].adapter
    if "alpha" not in flags.values["adapter"]:
        adapter = replace(adapter, alpha=was.alpha / was.rank * adapter.rank)
    shared: dict[str, Any] = {
        "head": mended.head,
        "model": mended.model,
        "watch": mended.watch,
        "evaluate": mended.evaluate,
    }
    return mended, replace(faithful, **shared, data=data, train=train, adapter=adapter)


def _demo(flags: Layer) -> Layer:
    """What scales a job down to the demo; a user's own data brings its own held-out rows."""
    layer = jobfile.read(jobs.path(_SCALED), {"": Head, **SECTIONS})
    if "data" not in flags.values["data"]:
        return layer
    data = {name: value for name, value in layer.values["data"].items() if name not in ("data", "eval_data")}
    return replace(layer, values={**layer.values, "data": data})


def _length(mended: int | None, was_mended: int | None, was_faithful: int | None) -> int | None:
    """The faithful job's length, as large a share of the mended one as in the files."""
    if not (mended and was_mended and was_faithful):
        return was_faithful
    return max(8, round(mended * was_faithful / was_mended))


def _rate(rate: float, job: Job) -> float:
    """A learning rate of Llama-2-7B, as far from the rule of thumb at the width of the job's model."""
    architecture = read_config(base_folder(job.model))
    return float(f"{rate / _REFERENCE * rule_of_thumb(architecture.width, architecture.family):.3g}")


def variants(letter: str, mended: Job, faithful: Job) -> Iterator[Variant]:
    """All rows of a replay, the mended job first: others are compared with it, and some use its adapter."""
    written = Job.of(jobfile.load(f"{LETTERS[letter]}-faithful", SECTIONS)).train.learning_rate
    yield Variant("mended", "as it should have been", job=mended)
    seed = replace(mended.head, seed=mended.head.seed + 1)
    yield Variant("other-seed", "mended, with another seed: what chance does", job=replace(mended, head=seed))
    in_use = tuple(
        fault for fault in faithful.faults.commit if fault != "no-template"
    )  # the measure is the same for all
    yield Variant("faithful", "as published, all faults together", job=replace(faithful, faults=Faults(commit=in_use)))
    for fault in faithful.faults.commit:
        if fault in COMMITTED:
            kind: Kind = "asked" if fault == "no-template" else "trained"
            yield Variant(fault, MEANS[fault], kind, replace(mended, faults=Faults(commit=(fault,))))
    yield from _settings(mended, faithful, written)
    for fault in faithful.faults.commit:
        if fault not in COMMITTED:
            yield _declared(fault, mended)
    yield Variant("no-held-out", "nothing held out", "told", reason=_TOLD["no-held-out"])


def _settings(mended: Job, faithful: Job, written: float | None) -> Iterator[Variant]:
    """The faults that are settings, each by itself over the mended job.

    Args:
        written: the learning rate of the original, the number as it stands; what people copy to another model.
    """

    def changed(name: str, what: str, section: str, **values: Any) -> Variant:
        return Variant(name, what, job=replace(mended, **{section: replace(getattr(mended, section), **values)}))

    adapter, data, train = faithful.adapter, faithful.data, faithful.train
    if data.train_on != mended.data.train_on:
        yield changed("loss-on-everything", "the user's words are learnt too", "data", train_on=data.train_on)
    if adapter.targets != mended.adapter.targets:
        yield changed(
            "q-v-only", f"adapted are {' and '.join(adapter.targets)} only", "adapter", targets=adapter.targets
        )
    rate, scale = train.learning_rate, adapter.alpha / adapter.rank
    good = mended.train.learning_rate or _rate(_REFERENCE, mended)
    if rate is not None and rate < good / _LOW:
        for name, low in (("low-rate", rate), ("rate-as-written", written)):
            if low and (name == "low-rate" or low != rate):
                what = f"learning rate {low:.2e}, {good / low:.0f} times too low"
                yield changed(name, what, "train", learning_rate=low)
    if scale != mended.adapter.alpha / mended.adapter.rank:
        yield changed("low-scale", f"scale alpha/rank {scale:g}", "adapter", alpha=scale * mended.adapter.rank)
    if (data.max_length, data.long) != (mended.data.max_length, mended.data.long):
        what = f"rows cut at {data.max_length} tokens in silence"
        yield changed("cut-length", what, "data", max_length=data.max_length, long=data.long)


def _declared(fault: Fault, mended: Job) -> Variant:
    """A fault that no training commits: of the merge, or only told about."""
    if fault == "other-merge-base" and mended.model.base in ("nf4", "fp4"):
        return Variant(fault, MEANS[fault], "merged")
    return Variant(fault, MEANS[fault], "told", reason=_TOLD[fault])


def own_rows(mended: Job, faithful: Job, folder: Path) -> tuple[Job, Job]:
    """Both jobs with the mended one's split of the rows, written into the replay's folder.

    What a split holds out depends on how long rows are cut. So that no variant is trained on what another holds out, the rows of both
    sides are files of their own, unless the job names its held-out rows already.

    Raises:
        ConfigError: nothing is held out.
    """
    if mended.data.eval_data is not None:
        return mended, faithful
    base = base_folder(mended.model)
    data = prepare_data(mended, base, load_tokenizer(base))
    if not len(data.held_out):
        raise ConfigError(
            "a replay measures every variant on the same held-out rows, and nothing is held out; set eval_fraction above 0, or name "
            "eval_data"
        )
    source = shipped(mended.data)
    files = {"data": folder / "train.jsonl", "eval_data": folder / "held_out.jsonl"}
    held, kept = set(data.held_out.rows.tolist()), set(data.train.rows.tolist())
    with files["data"].open("w", encoding="utf-8") as train, files["eval_data"].open("w", encoding="utf-8") as held_out:
        for example in read_examples(source.data, split=source.split, revision=source.data_revision):
            for file, rows in ((train, kept), (held_out, held)):
                if example.row in rows:
                    file.write(json.dumps(_as_row(example), ensure_ascii=False) + "\n")
    named: dict[str, Any] = {name: str(file) for name, file in files.items()} | {"data_revision": None}
    mended, faithful = (replace(job, data=replace(job.data, **named)) for job in (mended, faithful))
    return mended, faithful


def _as_row(example: Example) -> dict[str, Any]:
    """An example as a row that is read as the same example."""
    if not example.messages:
        return {"text": example.text}
    messages = [
        {"role": message.role, "content": message.content} | ({} if message.trained else {"weight": 0})
        for message in example.messages
    ]
    return {"messages": messages}


_TOLD: dict[str, str] = {
    "half-precision": "not committed: Lamina computes in bf16 or fp32; with fp16 one 7B run in five does not finish (Dettmers et al. 2023)",
    "unused-checkpointing": "not committed: a flag that nothing reads changes memory and time, and no number of this table",
    "unknown-task": "not committed: no number depends on the name; here a name that does not exist is refused",
    "other-merge-base": "not committed: the base is kept as plain numbers, and there is no other one to merge into",
    "no-held-out": "not committed: without held-out rows this table could not be made; the original has none of its columns",
}
