"""The long gates: what must hold of Lamina before any of its speeds is worth a line (``run.py gates``, some minutes).

The gates before a run (gates.py) look at two steps of every arm. These look longer, at Lamina beside transformers + PEFT, 15 M:

* *fp32*: every gradient within 1e-5 relative, the losses of 50 steps within 1e-4;
* *bf16*: the error of the whole gradient to the fp32 truth at most 1.2 times that of PEFT's mixed precision, whose A and B are fp32 too;
  the mean loss of the last 20 of 200 steps within 0.5 % of PEFT's;
* *int8*: its products equal those of the same integers in float64; held-out loss after 50 steps within 0.5 % of the dense base's, the mean
  over three parts of the data;
* *isolation*: other tokens in one packed example leave every loss of the others as it was, to the bit;
* *poison*: with all fresh memory filled with NaN, a step is the same to the bit.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import machine
import results
import torch
import workload
from bench import BUILD, Bench
from catalogue import Arm
from gates import gradient_distances

sys.path.insert(0, str(Path(__file__).parent / "arms"))

FIELDS = "date commit run model gate what found limit passed machine versions".split()
LAMINA, INT8 = Arm("lamina", "lamina_arm"), Arm("lamina-int8", "lamina_arm", {"base": "int8"})
PLAIN = Arm("peft-plain", "peft_loop", {"adapter": "fp32"}, environment="peft")
MIXED = Arm("peft-mixed", "peft_loop", {"adapter": "fp32", "autocast": True}, environment="peft")
TRAINED = {"warmup": 0, "batch": 4}
PARTS = (0, 80, 160)
"""The first rows of three runs over other parts of the data."""


class Finding(NamedTuple):
    """A number that a gate bounds."""

    gate: str
    what: str
    found: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.found <= self.limit


def main(tiny: bool) -> None:
    """Runs the gates, prints them, and appends them to ``results/gates.csv``; of a tiny model a few steps, and nothing is written."""
    name, (date, commit, run) = "tiny" if tiny else "15m", results.stamp()
    files = workload.prepare(BUILD / "bench", workload.MODELS[name])
    bench = Bench(files, f"gates-{run}")
    if len(bench.able([LAMINA, PLAIN])) < 2:
        sys.exit("the gates compare with transformers + PEFT")
    found = []
    for gate in (poison, isolation, emulation):
        found += list(gate(files))
    for gate in (fp32, bf16, int8):
        found += list(gate(bench, 10 if tiny else 1))
    rows = [
        {"date": date, "commit": commit, "run": run, "model": files.name, "gate": f.gate, "what": f.what}
        | {"found": f"{f.found:.3g}", "limit": f"{f.limit:g}", "passed": f.passed, "machine": machine.machine()}
        | {"versions": f"torch {torch.__version__}"}
        for f in found
    ]
    for row in rows:
        print(
            f"{row['gate']:10} {row['what']:58} {row['found']:>9}  at most {row['limit']:7} {'' if row['passed'] else 'FAILED'}"
        )
    if tiny:
        print("nothing is written: a tiny model")
    else:
        results.append(results.FOLDER / "gates.csv", rows, FIELDS)
    if not all(f.passed for f in found):
        sys.exit(1)


def losses(report: dict[str, Any]) -> list[float]:
    return [step["loss"] for step in report["steps"]]


def fp32(bench: Bench, shorter: int) -> Iterator[Finding]:
    """50 steps beside PEFT."""
    reports, gradients = [], [bench.folder / f"{arm.name}-fp32.safetensors" for arm in (LAMINA, PLAIN)]
    for arm, kept in zip((LAMINA, PLAIN), gradients, strict=True):
        job = TRAINED | {"steps": 50 // shorter, "precision": "fp32", "gradients": str(kept)}
        reports.append(bench.process(arm, "fp32", **job))
    yield Finding(
        "fp32", "gradients of the first step, worst matrix", max(gradient_distances(*gradients).values()), 1e-5
    )
    distances = [abs(a / b - 1) for a, b in zip(*map(losses, reports), strict=True)]
    yield Finding("fp32", f"losses of {len(distances)} steps, worst step", max(distances), 1e-4)


def bf16(bench: Bench, shorter: int) -> Iterator[Finding]:
    """The first gradient beside the fp32 truth, which ``fp32`` left, and 200 steps beside PEFT."""
    truth, reports, errors = bench.folder / f"{PLAIN.name}-fp32.safetensors", [], []
    for arm in (LAMINA, MIXED):
        kept = bench.folder / f"{arm.name}-bf16.safetensors"
        reports.append(bench.process(arm, "bf16", **TRAINED, steps=200 // shorter, gradients=str(kept)))
        errors.append(whole_distance(kept, truth))
    yield Finding("bf16", f"error of the gradient ({errors[0]:.2e}) by PEFT's", errors[0] / errors[1], 1.2)
    last = [sum(losses(report)[-20:]) / 20 for report in reports]
    yield Finding("bf16", f"mean loss of the last 20 of {200 // shorter} steps", abs(last[0] / last[1] - 1), 0.005)


def int8(bench: Bench, shorter: int) -> Iterator[Finding]:
    """Held-out loss over an int8 base beside the dense one's."""
    ends: dict[Arm, float] = {}
    for arm in (LAMINA, INT8):
        job = TRAINED | {"steps": 50 // shorter, "held_out": str(bench.files.rows("held_out"))}
        reports = [bench.process(arm, f"held-out-{first}", **job, first=first) for first in PARTS]
        ends[arm] = sum(report["held_out"][-1] for report in reports) / len(reports)
    yield Finding(
        "int8", f"held-out loss after {50 // shorter} steps, mean of three", abs(ends[INT8] / ends[LAMINA] - 1), 0.005
    )


def whole_distance(ours: Path, theirs: Path) -> float:
    """|g - g'| / |g'| over all matrices together."""
    from safetensors.torch import load_file

    a, b = load_file(ours), load_file(theirs)
    apart, norm = (sum(float(x.double().square().sum()) for x in xs) for xs in ([a[n] - b[n] for n in b], b.values()))
    return float((apart / norm) ** 0.5)


def prepared(files: workload.Files, dtype: str, base: str | None = None) -> tuple[Any, list[Any]]:
    """The model with its adapter, and four rows."""
    from common import read_rows
    from lamina_arm import rendered

    from lamina.adapter_files import load_adapter
    from lamina.model.weights import load_model

    model = load_model(files.model, dtype, "cpu", base=base)
    load_adapter(model, files.adapter)
    return model, [rendered(row, number) for number, row in enumerate(read_rows(str(files.whole))[:4])]


def isolation(files: workload.Files) -> Iterator[Finding]:
    """Losses of three packed rows, while the tokens of the fourth change."""
    import numpy as np

    from lamina.data.pack import pack
    from lamina.ops.attention import Packed
    from lamina.ops.loss import token_scores

    for dtype in ("fp32", "bf16"):
        model, rows = prepared(files, dtype)
        seen = []
        for changed in (False, True):
            if changed:
                rows[1] = type(rows[1])(np.flip(rows[1].tokens).copy(), rows[1].trained, rows[1].row)
            (batch,) = pack(rows, 1 << 20)
            with torch.no_grad():
                hidden = model(batch.tokens, batch.position, Packed(batch.lengths))
                scores = token_scores(hidden, model.vocabulary, batch.targets)[0].split(list(batch.lengths))
            seen.append(dict(zip(batch.rows, scores, strict=True)))
        apart = {row: float((seen[0][row] - seen[1][row]).abs().max()) for row in seen[0]}
        if not apart.pop(1):
            raise AssertionError("the changed row has the losses it had: nothing was tried")
        yield Finding("isolation", f"losses of the other rows, {dtype}", max(apart.values()), 0.0)


def poison(files: workload.Files) -> Iterator[Finding]:
    """A step in memory that is filled with NaN wherever nothing was written yet."""
    from lamina.adapter import adapted
    from lamina.training.loop import Training, start, train

    for dtype in ("fp32", "bf16"):
        ends = []
        for poisoned in (False, True):
            model, rows = prepared(files, dtype)
            training = Training(steps=2, batch_size=4, learning_rate=1e-3)
            torch.use_deterministic_algorithms(poisoned, warn_only=True)  # it fills torch.empty
            if poisoned and not torch.empty(4).isnan().all():
                raise AssertionError("fresh memory is not filled with NaN: nothing was tried")
            list(train(model, rows, training, start(model, training), seed=0))
            torch.use_deterministic_algorithms(False)
            ends.append(torch.cat([p.detach().flatten() for m in adapted(model).values() for p in (m.a, m.b)]))
        apart = float((ends[0] - ends[1]).abs().max())
        yield Finding("poison", f"adapter after two steps, {dtype}", float("inf") if math.isnan(apart) else apart, 0.0)


def emulation(files: workload.Files) -> Iterator[Finding]:
    """The integer products beside the same integers multiplied in float64, worst linear; two roundings to fp32 lie between."""
    from lamina.model.quantised import quantised_of
    from lamina.ops.int8 import quantise_rows

    model, _ = prepared(files, "fp32", base="int8")
    torch.manual_seed(0)
    worst = 0.0
    for leaf in quantised_of(model):
        x = torch.randn(64, leaf.form.inputs)
        codes = torch.empty(x.shape, dtype=torch.int8)
        scale = quantise_rows(x, None, torch.empty_like(x), codes)
        slow = scale.double().view(-1, 1) * (codes.double() @ leaf.form.codes.double().t()) * leaf.form.scale.double()
        worst = max(worst, float((leaf.form.multiply(x) - slow).norm() / slow.norm()))
    yield Finding("int8", "products beside the same integers in float64", worst, 3 * 2.0**-24)
