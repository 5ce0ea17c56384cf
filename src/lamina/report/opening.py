"""What a run says before its first step: the data as the model sees it, what is trained, at which rate."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from lamina import cuda, native
from lamina.adapter import adapted
from lamina.data.prepare import Prepared
from lamina.data.render import show
from lamina.model.decoder import Decoder
from lamina.model.quantised import APPROXIMATE, quantised_of
from lamina.report.console import duration
from lamina.training.loop import Training


def data_lines(data: Prepared, tokenizer: Any) -> Iterator[str]:
    """The account of the data, and two rows with what is learnt from them."""
    yield from data.report.lines()
    yield "two rows as the model sees them, what it learns to write in [[ ]]:"
    for index in range(min(2, len(data.train))):
        rendered = data.train[index]
        yield f"  row {rendered.row}: {marked(show(rendered, tokenizer))}"


def marked(tokens: list[tuple[str, bool]], longest: int = 90) -> str:
    """A row in one line, its trained parts in [[ ]], the middle of long parts left out."""
    parts = []
    for trained, group in itertools.groupby(tokens, key=lambda token: token[1]):
        text = "".join(piece for piece, _ in group).replace("\n", "⏎")
        if len(text) > longest:
            text = f"{text[: longest // 2]} … {text[-longest // 2 :]}"
        parts.append(f"[[{text}]]" if trained else text)
    return "".join(parts)


def training_lines(model: Decoder, name: str, training: Training, steps: int, every: int | None) -> Iterator[str]:
    """What is frozen, what is trained and saved, and how long and how fast it learns."""
    modules = adapted(model)
    trained = sum(module.a.numel() + module.b.numel() for module in modules.values())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    quantised = quantised_of(model)
    frozen += sum(module.out_features * module.in_features for module in quantised)
    form = f" in {quantised[0].form.kind}" if quantised else ""
    form += (
        " (approximate: what is multiplied is rounded too)"
        if quantised and quantised[0].form.kind in APPROXIMATE
        else ""
    )
    weights = model.vocabulary
    where = weights.device.type, weights.dtype
    place = where[0] + native.about(*where) + cuda.about(*where)
    yield (
        f"base: {name}, {frozen:,} frozen parameters{form}, {str(weights.dtype).removeprefix('torch.')} on {place}; "
        f"adapter: {trained:,} parameters in {len(modules)} matrices; saved are A and B only, {4 * trained / 1e6:,.1f} MB"
    )
    rule = "" if training.learning_rate else f", the rule of thumb for LoRA at width {model.architecture.width}"
    often = "after every step" if every == 1 else f"every {every} steps"
    watched = f"evaluated before the first step, {often} and at the end" if every else "nothing held out to evaluate on"
    yield (
        f"training: {steps:,} steps of {training.batch_size} examples; learning rate {training.rate(model):.2e} "
        f"({training.schedule}{rule}); {watched}"
    )


def pace_line(planned: float, measured: float) -> str:
    """The plan's seconds of training beside those that its steps took."""
    share = f"{measured / planned:.0%} of the plan"
    return f"time: planned {_seconds(planned)} of training, measured {_seconds(measured)} in its steps ({share})"


def time_line(seconds: Mapping[str, float]) -> str:
    """Where the time of a run went, parts of less than a tenth of a second left out."""
    parts = [f"{name.replace('_', ' ')} {_seconds(spent)}" for name, spent in seconds.items() if spent >= 0.1]
    return f"time: {_seconds(sum(seconds.values()))}" + (f", of it {', '.join(parts)}" if parts else "")


def _seconds(spent: float) -> str:
    return f"{spent:.1f} s" if spent < 60 else duration(spent)
