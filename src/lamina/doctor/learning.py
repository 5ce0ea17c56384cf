"""Rules about the adapter and what moves it: targets, scale, rate, schedule, length, capacity.

The yardsticks are those of Schulman et al. 2025, "LoRA Without Regret" (Thinking Machines): all linears, alpha 32, a rate that
depends on the width alone, 15 instead of 10 times full fine-tuning's in runs under 100 steps, small batches, two bits a number.
"""

import math
from collections import Counter
from collections.abc import Iterator

import torch

from lamina.adapter import ALL_LINEAR
from lamina.doctor.case import Case
from lamina.doctor.finding import Finding, counted
from lamina.ops.rounding import NAMES, half_step, surviving
from lamina.training.optimizer import Shape, relative_update, rule_of_thumb
from lamina.training.setup import shapes

ALPHA = 32.0
"""The alpha that the rule of thumb is meant for."""
NEAR = 1.5
"""An alpha within this factor of it makes no difference worth a word."""

FAR, VERY_FAR = 4.0, 10.0
"""Factors to the rule of thumb from which on a rate costs something, and from which on it decides the run: the loss over the rate
is flat within a factor of two or three about its minimum."""

SHORT_RUN = 100
SHORT_RUN_FACTOR = 1.5

FEW_STEPS = 30
"""Steps below which AdamW's second moment, of 1/(1-0.999) steps, knows little, and a schedule has no shape."""
MANY_EPOCHS = 5.0
LARGE_BATCH = 128

BITS = 2.0
"""What a trained number holds, in bits."""
NATS = 1.4
"""Assumed information of a learnt token, in nats: about the loss of Llama-2-7B on chat data."""


def targets(case: Case) -> Iterator[Finding]:
    """An adapter that leaves out the MLP."""
    names = Counter(path.rsplit(".", 1)[1] for path in case.ranks)
    if case.architecture and case.ranks and not any(".mlp." in path for path in case.ranks):
        sizes = {name: math.prod(shape) for name, shape in shapes(case.architecture).items()}
        share = sum(size for name, size in sizes.items() if name.startswith("mlp.")) / sum(sizes.values())
        yield Finding(
            "targets-miss-mlp",
            "warning",
            f"adapted are {', '.join(names)} alone, nothing of the MLP, which holds {share:.0%} of a layer's weights",
            "attention alone learns less at the same number of parameters; q_proj and v_proj are a library's silent default",
            f"--targets {ALL_LINEAR}",
        )


def alpha(case: Case) -> Iterator[Finding]:
    """A scale that the learning rate is not meant for."""
    lora, rate = case.job.adapter, case.job.train.learning_rate
    scale = case.alpha / lora.rank
    far = not ALPHA / NEAR <= case.alpha <= ALPHA * NEAR
    if (rate is None and far) or (far and scale < 0.5):
        yield Finding(
            "alpha",
            "warning",
            f"alpha/rank = {scale:.3g}: alpha {case.alpha:g} at rank {lora.rank}",
            f"the update is multiplied by it, and rates are meant for alpha {ALPHA:g} at any rank: the weights move as they would "
            f"with {case.alpha / ALPHA:.2g} times the rate",
            f"--alpha {ALPHA:g}" + (" --no-rslora" if lora.rslora else ""),
        )


def learning_rate(case: Case) -> Iterator[Finding]:
    """A rate far from the rule of thumb for width, alpha and steps."""
    rate, a = case.job.train.learning_rate, case.architecture
    if rate is None or a is None:
        return
    plain = rule_of_thumb(a.width, a.family)
    short = 0 < case.steps < SHORT_RUN
    wanted = plain * (SHORT_RUN_FACTOR if short else 1) * ALPHA / case.alpha
    factor = max(rate / wanted, wanted / rate)
    if factor < FAR:
        return
    under = rate < wanted
    because = [f"alpha is {case.alpha:g}, not {ALPHA:g}"] if not math.isclose(case.alpha, ALPHA) else []
    because += [f"there are {case.steps} steps"] if short else []
    beside = f"; as {' and '.join(because)}, {_times(rate, wanted)} the rate that would fit" if because else ""
    yield Finding(
        "learning-rate",
        "error" if factor >= VERY_FAR else "warning",
        f"learning rate {rate:.1e}, {_times(rate, plain)} the rule of thumb for width {a.width:,}, {plain:.1e}{beside}",
        "the adapter hardly moves: the answers stay the base's"
        if under
        else "training diverges, or forgets what the base knew",
        f"--learning-rate none, which takes the rule of thumb, with --alpha {ALPHA:g}; or --learning-rate {wanted:.1e}",
    )


def _times(rate: float, wanted: float) -> str:
    """How far a rate is from another in words."""
    factor = max(rate / wanted, wanted / rate)
    return f"{factor:,.0f} times {'under' if rate < wanted else 'over'}" if factor >= 1.5 else "about at"


def update_size(case: Case) -> Iterator[Finding]:
    """An update that merging would round away; W is taken to be about 1/√width, as it is in Llama's family.

    The yardstick is the dtype in which the merge is written. Where that is fp16, or fp32 and the run computes in bf16, it is bf16 all
    the same: many serve such a model in it, and Lamina itself loads it so; what only the other holds is lost then. (What training
    saw of the base, bf16 holds.)
    """
    a, train, own = case.architecture, case.job.train, case.merged
    if a is None or own is None or not case.steps or not case.ranks:
        return
    rate = train.learning_rate or rule_of_thumb(a.width, a.family)
    inputs = {name: shape[1] for name, shape in shapes(a).items()}
    kinds = Counter(
        Shape(case.job.adapter.scale_of(path), rank, inputs[".".join(path.split(".")[3:])], a.width**-0.5)
        for path, rank in case.ranks.items()
    )
    found = _median(
        {relative_update(case.steps, rate, train.schedule, train.warmup, kind): n for kind, n in kinds.items()}
    )
    finer = own == torch.float16 or (own == torch.float32 and case.job.model.dtype == "bf16")
    served = torch.bfloat16 if finer else own
    if found < half_step(served):
        there = NAMES[served]
        rounds = f"rounds at {half_step(own):.1e} and keeps about {surviving(found, own):.0%} of such an update"
        merge = f"a merge into this base is written in {NAMES[own]}, which {rounds}"
        assumed = "weights of about 1/√width"
        if own != served:
            left = f"{surviving(found, served):.0%} of it is left"
            merge += f"; loaded in {there}, which rounds at {half_step(served):.1e}, about {left}"
            assumed += f", which {there} holds"
        yield Finding(
            "update-too-small",
            "warning",
            f"these {case.steps:,} steps at this rate can change a weight by at most about {found:.1e} of itself; {merge} "
            f"(assumed: {assumed})",
            f"in {there}, much of such an update is rounded away, and the error of rounding is about as large as what is left",
            "raise the learning rate, alpha or steps; or use the adapter beside the base, unmerged"
            + ("" if own == served else f"; or serve the merged model in {NAMES[own]}, not in {there}"),
        )


def _median(numbers: dict[float, int]) -> float:
    """The median of numbers that occur so many times."""
    left = sum(numbers.values()) / 2
    for number in sorted(numbers):
        left -= numbers[number]
        if left <= 0:
            return number
    return 0.0


def schedule(case: Case) -> Iterator[Finding]:
    """A schedule and a warm-up that cancel each other."""
    train = case.job.train
    if train.warmup >= 0.5:
        yield Finding(
            "schedule-and-warmup",
            "warning",
            f"the rate rises over {train.warmup:.0%} of the steps, so the {train.schedule} schedule has "
            f"{'no step' if train.warmup == 1 else 'little'} left",
            "the run ends before, or soon after, its full rate is reached",
            "--warmup 0.03",
        )
    elif train.schedule == "constant" and train.warmup:
        yield Finding(
            "schedule-and-warmup",
            "note",
            f"schedule constant with a warm-up of {train.warmup:.0%}: here it is constant after the warm-up",
            "transformers' `constant` ignores the warm-up in silence, so a job that is copied from there had none",
            "--warmup 0 to replay such a job; nothing, if the warm-up is meant",
        )


def steps(case: Case) -> Iterator[Finding]:
    """Too few steps, or too many passes, for these rows."""
    train, rows = case.job.train, case.report.train_rows
    name = "example" if case.report.long == "split" else "row"  # a row may be several examples
    if not rows:
        return
    epochs = case.steps * train.batch_size / rows if train.steps else train.epochs
    if case.steps < FEW_STEPS:
        smaller = max(1, train.batch_size * case.steps // (2 * FEW_STEPS))
        yield Finding(
            "few-steps",
            "warning",
            f"{counted(case.steps, 'step')} of {counted(train.batch_size, 'example')} over {counted(rows, name)}",
            "AdamW and the schedule need some dozens of steps; so few teach little but the form of the answers",
            " or ".join(
                ([f"--batch-size {smaller}"] if smaller < train.batch_size and not train.steps else [])
                + [
                    f"--steps {2 * FEW_STEPS}"
                    if train.steps
                    else f"--epochs {math.ceil(epochs * 2 * FEW_STEPS / case.steps)}"
                ]
            ),
        )
    if epochs > MANY_EPOCHS and train.batch_size < rows and case.job.watch.patience is None:
        three = round(3 * rows / train.batch_size)  # the steps of three passes: no way out where they are too few
        fewer = f"--steps {three}" if train.steps else "--epochs 3"
        yield Finding(
            "many-epochs",
            "warning",
            f"{epochs:,.3g} passes over {counted(rows, name)}",
            "from the third or so on the rows are memorised, and the held-out loss rises",
            (f"{fewer}, or " if three >= FEW_STEPS else "")
            + "--patience 2, which stops when the held-out loss no longer falls",
        )
    if epochs < 1:
        yield Finding(
            "rows-never-seen",
            "note",
            f"the run takes {case.steps * train.batch_size:,} of {counted(rows, name)}",
            "the others are read, and never trained on",
            f"--steps {math.ceil(rows / train.batch_size)} for one pass" if train.steps else "--epochs 1 for one pass",
        )


def batch(case: Case) -> Iterator[Finding]:
    """A large batch."""
    if case.job.train.batch_size > LARGE_BATCH:
        yield Finding(
            "large-batch",
            "note",
            f"{case.job.train.batch_size} examples a step",
            "LoRA loses more than full fine-tuning does by large batches",
            "--batch-size 32 or less; memory does not need it large or small, micro-batches are cut by the plan",
        )


def capacity(case: Case) -> Iterator[Finding]:
    """An adapter that cannot hold what the data says."""
    if case.architecture is None or not case.ranks:
        return
    sides = {name: sum(shape) for name, shape in shapes(case.architecture).items()}
    numbers = sum(rank * sides[".".join(path.split(".")[3:])] for path, rank in case.ranks.items())
    holds, said = BITS * numbers, case.counts.learnt * NATS / math.log(2)
    if said > holds:
        wanted, most = (
            math.ceil(case.job.adapter.rank * said / holds),
            min(map(min, shapes(case.architecture).values())),
        )
        yield Finding(
            "capacity",
            "warning",
            f"the adapter's {numbers:,} numbers hold about {holds / 1e6:,.3g} million bits, the {case.counts.learnt:,} tokens to be "
            f"learnt say about {said / 1e6:,.3g} million (assumed: {BITS:g} bits a number, {NATS:g} nats a token)",
            "beyond its capacity LoRA learns slower than full fine-tuning would",
            f"--rank {min(wanted, most)}, or more --targets"
            + ("; no adapter of this base holds it all" if wanted > most else ""),
        )


RULES = (targets, alpha, learning_rate, update_size, schedule, steps, batch, capacity)
