"""The memory plan beside the peak that was measured, over a grid of models, forms, adapters and micro-batches.

Each configuration runs in a process of its own, as ``lamina train`` runs it: a small model first, so that libraries are there;
then the model is loaded, the heaviest micro-batch computed, and some steps are trained. Measured is the peak of the resident
memory above what the process had before the model was loaded. The rows of all steps have the same lengths, but where more
than a few steps are asked for: then lengths are drawn for each, as real data has them, and every micro-batch is of a new size.
``--tiny`` tries the benchmark itself and writes nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine
import results
from workload import Shape

from lamina.process import prepare

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "memory_cpu.csv"
SMALL = Shape(width=64, layers=1, mlp=128, heads=2, vocabulary=256, rank=4)
MODELS = {
    "0.7m": Shape(width=128, layers=2, mlp=384, heads=8, kv_heads=4, vocabulary=2048),
    "13m": Shape(width=256, layers=6, mlp=768, heads=4, vocabulary=16_000),
    "40m": Shape(width=512, layers=6, mlp=1536, heads=8, vocabulary=24_000),
    "134m": Shape(width=768, layers=12, mlp=2048, heads=12, vocabulary=32_000),
}
USUAL: dict[str, Any] = {"model": "40m", "dtype": "bf16", "base": None, "rank": 16, "lengths": [512, 377, 290, 160]}
GRID: list[dict[str, Any]] = [
    *({"base": base} for base in (None, "nf4", "fp4", "int8")),
    *({"base": base, "model": "134m"} for base in (None, "nf4", "int8")),
    *({"base": base, "model": "13m"} for base in (None, "nf4")),
    {"dtype": "fp32"},
    {"dtype": "fp32", "base": "nf4"},
    {"rank": 4},
    {"rank": 128},
    {"rank": 64, "model": "134m"},
    {"rank": 64, "model": "134m", "optimizer": "adamw8bit"},
    {"targets": ["q_proj", "v_proj"]},
    {"layers": "3-5"},
    {"checkpointed": 3},
    {"checkpointed": 6},
    {"checkpointed": 12, "model": "134m"},
    {"checkpointed": 12, "model": "134m", "base": "nf4", "rank": 64},
    {"lengths": [128] * 8},
    {"lengths": [2000, 1500]},
    {"lengths": [2000, 1500], "model": "134m", "checkpointed": 6},
    {"lengths": [512] * 8, "micro_batch_tokens": 1024},
    {"share": 0.2},
    {"dropout": 0.1},
    {"steps": 40, "model": "0.7m"},
    {"steps": 15},
]
FIELDS = [
    "date",
    "commit",
    "versions",
    "machine",
    "configuration",
    "planned_mib",
    "measured_mib",
    "ratio",
    "moment",
    "items",
]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one configuration in this process."""
    import numpy as np

    from lamina.adapter import LoRA, attach
    from lamina.data.render import Rendered
    from lamina.model.weights import DTYPES, load_model
    from lamina.training.available import Meter
    from lamina.training.heaviest import heaviest
    from lamina.training.kept import Portion, Setup
    from lamina.training.loop import Training, rehearse, start, train
    from lamina.training.plan import in_process, plan, ranks_of

    chosen = {name: job[name] for name in ("targets", "layers", "dropout") if name in job}
    lora = LoRA(
        rank=job["rank"], **({**chosen, "targets": tuple(chosen["targets"])} if "targets" in chosen else chosen)
    )
    training = Training(
        steps=job.get("steps", 3),
        batch_size=len(job["lengths"]),
        checkpoint_layers=job.get("checkpointed", 0),
        micro_batch_tokens=job.get("micro_batch_tokens", 4096),
        optimizer=job.get("optimizer", "adamw"),
    )

    def rows(lengths: list[int], vocabulary: int) -> list[Rendered]:
        random, share = np.random.default_rng(0), job.get("share", 1.0)
        return [
            Rendered(random.integers(0, vocabulary, n, dtype=np.int32), np.arange(n) >= max(1, (1 - share) * n), row)
            for row, n in enumerate(lengths)
        ]

    def drawn(lengths: list[int]) -> list[int]:
        shares = np.random.default_rng(1).uniform(0.2, 1.0, (job["steps"], len(lengths)))
        return [int(length) for length in (shares * lengths).flat]

    def run(folder: str, lora: LoRA, lengths: list[int]) -> tuple[Any, Any]:
        model = load_model(folder, job["dtype"], "cpu", base=job["base"])
        attach(model, lora)
        data = rows(lengths, model.architecture.vocabulary)
        found = heaviest(data, np.array(lengths), training, 0, training.portion)
        rehearse(model, found.first, training)
        list(train(model, data, training, start(model, training), 0))
        return model, found

    run(job["small"], LoRA(rank=4), [16] * training.batch_size)
    import torch

    meter = Meter(torch.device("cpu"))
    model, found = run(job["folder"], lora, drawn(job["lengths"]) if "steps" in job else job["lengths"])
    measured = meter.peak()
    setup = in_process(
        Setup(
            model.architecture,
            ranks_of(model.architecture, lora),
            DTYPES[job["dtype"]].itemsize,
            base=job["base"],
            optimizer=training.optimizer,
            dropout=lora.dropout > 0,
        )
    )
    batches = [(found.first, False), *([(found.later, True)] if found.later else [])]
    planned = plan(
        setup, *(Portion(b.lengths, b.supervised, training.checkpoint_layers, later) for b, later in batches)
    )
    return {"planned": planned.total, "measured": measured, "moment": planned.peak.name, "items": planned.items}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tiny", action="store_true", help="one small configuration: tries the benchmark, writes nothing"
    )
    parser.add_argument("--only", help="configurations whose description holds this")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        prepare()
        print(json.dumps(measure(json.loads(options.one))))
        return

    import checkpoint

    build = machine.ROOT / "build" / "memory"
    grid = [{"model": "small"}] if options.tiny else GRID
    models = {"small": SMALL, **MODELS}
    rows = []
    for changes in grid:
        job = USUAL | changes
        name = ", ".join(f"{key} {value}" for key, value in job.items() if value is not None)
        if options.only and options.only not in name:
            continue
        places = {
            "small": str(checkpoint.write(build, SMALL)),
            "folder": str(checkpoint.write(build, models[job["model"]])),
        }
        command = [sys.executable, __file__, "--one", json.dumps(job | places)]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(1 if options.tiny else machine.cores()),
            "PYTHONUNBUFFERED": "1",
        }
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        report = json.loads(done.stdout.splitlines()[-1])
        ratio = report["measured"] / report["planned"]
        print(
            f"{report['planned'] / 2**20:8.1f} MiB planned {report['measured'] / 2**20:8.1f} measured  {ratio:6.3f}  {name}",
            flush=True,
        )
        rows.append((name, report, ratio))
    ratios = [ratio for _, _, ratio in rows]
    off = sum(abs(ratio - 1) > 0.1 for ratio in ratios)
    around = f"{min(ratios):.3f} to {max(ratios):.3f} of the plan, median {statistics.median(ratios):.3f}"
    print(f"{len(rows)} configurations: measured is {around}; {off} beyond 10 %")
    if not options.tiny and not options.only:
        results.append(RESULTS, [results.origin("torch") | row_of(*row) for row in rows], FIELDS)


def row_of(name: str, report: dict[str, Any], ratio: float) -> dict[str, Any]:
    """The row of a configuration."""
    sizes = {f"{key}_mib": round(report[key] / 2**20, 1) for key in ("planned", "measured")}
    items = json.dumps({key: round(value / 2**20, 1) for key, value in report["items"].items()})
    return sizes | {"configuration": name, "ratio": round(ratio, 3), "moment": report["moment"], "items": items}


if __name__ == "__main__":
    main()
