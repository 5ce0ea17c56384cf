"""What understanding costs: the ledger's share of a training step, and what follows the last step as a share of a whole run.

``ledger``: one process trains with an entry of the ledger at every second step, so steps with and without take turns on the same
rows. Two measures are taken of it, in processor time and in wall time. *beside*: the least step with an entry by the least without,
which holds whatever the ledger does to the caches of others, and their noise too. *own*: the seconds of the ledger's own code, from
hooks that stand before and behind its own, by the seconds of a step without. The save of the ledger file is measured after the last
step, and divided by the steps between two saves.

``card``: a run from its job to its folder by the run's own code, at the defaults of a job; the card is all that comes after the
training has ended, so it stays measured as it grows. The run's own clock, where its card has one, is written beside it.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint
import machine
import numpy as np
import results
from workload import DATA, Shape

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "costs_cpu.csv"
MODELS = {
    "tiny": Shape(width=64, layers=2, mlp=128, heads=4, vocabulary=32_000, rank=4),
    "15m": Shape(width=192, layers=6, mlp=576, heads=4, vocabulary=32_000, rank=16),
    "134m": Shape(width=768, layers=12, mlp=2048, heads=12, vocabulary=32_000, rank=64),
}
LENGTHS = (512, 377, 290, 160)
"""Tokens of the rows of a step: about the quartiles of guanaco's rows cut at 512."""

FIELDS = ["date", "commit", "versions", "machine", "threads", "what", "model", "settings", "base_cpu_s", "base_wall_s"]
FIELDS += ["cost_cpu_s", "cost_wall_s", "share_cpu", "share_wall", "beside_cpu", "others", "note"]
Instant = tuple[float, float]


def now() -> Instant:
    """Processor and wall seconds."""
    return time.process_time(), time.perf_counter()


def ledger(folder: Path, shape: Shape, rounds: int) -> dict[str, Any]:
    """The ledger's share of a step."""
    from lamina.adapter import LoRA, attach
    from lamina.data.render import Rendered
    from lamina.job import Job, Watching
    from lamina.model.weights import ModelSettings, load_model
    from lamina.observing import Observing
    from lamina.report.record import Record
    from lamina.training.loop import Training, start, train

    random = np.random.default_rng(0)
    rows = [
        Rendered(random.integers(3, shape.vocabulary, length, dtype=np.int32), np.arange(length) > length // 3, row)
        for row, length in enumerate(LENGTHS, 1)
    ]
    model = load_model(folder, "bf16", "cpu")
    attach(model, LoRA(rank=shape.rank))
    training = Training(epochs=1e6, batch_size=len(rows), learning_rate=2e-4, schedule="constant", warmup=0.0)
    job = Job(ModelSettings(model=str(folder)), _data(folder), train=training, watch=Watching(ledger_every=2))
    state = start(model, training)
    marks: list[Instant] = []

    def mark(*_: Any) -> None:
        marks.append(now())

    optimizer = state.optimizer
    optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)
    found: dict[str, list[np.ndarray]] = {"with": [], "without": [], "own": []}
    with tempfile.TemporaryDirectory() as place, Record(Path(place)) as record:
        lengths = np.array(LENGTHS)
        with Observing(Path(place), job, model, state, lengths, record, lambda _: None) as observing:
            optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)
            steps = train(model, rows, training, state, seed=0)
            for _ in range(2 * (rounds + 2)):
                marks.clear()
                began = np.array(now())
                step = next(steps)
                done = np.array(now())
                record.step(step)
                taken = np.array(now())
                observing.step(step)
                end = np.array(now())
                own = sum(np.subtract(marks[i + 1], marks[i]) for i in (0, 2)) + (end - taken)
                if step.step > 4:
                    measured = step.step % 2 == 0
                    found["with" if measured else "without"].append(done - began + (end - taken))
                    if measured:
                        found["own"].append(own)
            began = np.array(now())
            observing.save()
            save = (np.array(now()) - began) / job.watch.save_every
    least = {name: np.min(seconds, axis=0) for name, seconds in found.items()}
    own = least["own"] + save
    return {
        "base": least["without"],
        "cost": own,
        "share": own / least["without"],
        "beside": float(least["with"][0] / least["without"][0] - 1),
        "note": f"a save every {job.watch.save_every} steps is {save[0] / own[0]:.0%} of it; rows of {LENGTHS} tokens",
    }


def card(folder: Path, shape: Shape, steps: int | None) -> dict[str, Any]:
    """What follows the training, as a share of the run."""
    from lamina.adapter import LoRA
    from lamina.job import Job
    from lamina.jobfile import Head
    from lamina.model.weights import ModelSettings
    from lamina.run import Silent, fine_tune
    from lamina.training.loop import Training

    class Clock(Silent):
        closing: Instant = (0.0, 0.0)

        def line(self, text: str) -> None:
            if text.startswith("memory: planned"):  # what a run says when its training has ended
                self.closing = now()

    clock, began = Clock(), np.array(now())
    with tempfile.TemporaryDirectory() as place:
        job = Job(
            ModelSettings(model=str(folder), dtype="bf16", device="cpu"),
            _data(folder),
            LoRA(rank=shape.rank),
            Training(steps=steps),
            head=Head(out=str(Path(place) / "run")),
        )
        result = fine_tune(job, clock)
        end = np.array(now())
        about = json.loads((result.folder / "card.json").read_text(encoding="utf-8"))
    cost, whole = end - np.array(clock.closing), end - began
    seconds = {name: round(value, 2) for name, value in about.get("seconds", {}).items()}
    note = f"{about['steps']} steps, {about['tokens']} tokens; the run's own clock: {json.dumps(seconds) or 'none'}"
    return {"base": whole, "cost": cost, "share": cost / whole, "beside": None, "note": note}


def _data(folder: Path) -> Any:
    """guanaco's rows where they are at hand, else the demo's; they are tokenised by what lies beside the model."""
    from lamina.data.examples import DataSettings

    real = DATA / "guanaco-llama2-1k"
    if real.is_dir():
        return DataSettings(data=str(real), max_length=512)
    return DataSettings(data="lamina:demo/train.jsonl", template="llama2")


def made(build: Path, shape: Shape) -> Path:
    """The checkpoint of a shape, with a tokenizer: Llama 2's where it is at hand, else the demo's."""
    from lamina import jobs

    folder = checkpoint.write(build, shape)
    real = DATA / "llama2-tokenizer"
    for file in (real if real.is_dir() else jobs.path("lamina:demo/base")).iterdir():
        if file.name.startswith(("tokenizer", "special_tokens")):
            shutil.copyfile(file, folder / file.name)
    return folder


def row_of(what: str, model: str, settings: str, found: dict[str, Any], others: float) -> dict[str, Any]:
    """The row of a measurement."""
    import torch

    row = results.origin("torch") | {"threads": torch.get_num_threads()}
    row |= {"what": what, "model": model, "settings": settings, "note": found["note"], "others": round(others, 3)}
    for name, pair in (("base", found["base"]), ("cost", found["cost"])):
        row |= {f"{name}_cpu_s": f"{pair[0]:.5f}", f"{name}_wall_s": f"{pair[1]:.5f}"}
    row |= {f"share_{kind}": f"{value:.4f}" for kind, value in zip(("cpu", "wall"), found["share"], strict=True)}
    return row | {"beside_cpu": "" if found["beside"] is None else f"{found['beside']:.4f}"}


def share_of_others(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """What the work returns, and the share of the processors that other programs took meanwhile (Linux)."""
    sys.path.insert(0, str(HERE / "arms"))
    from common import others

    began, before = time.perf_counter(), others()
    found = work()
    return found, max(0.0, others() - before) / (machine.cores() * (time.perf_counter() - began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ledger", "card"))
    parser.add_argument("--model", choices=tuple(MODELS), default="15m", help="tiny writes no row")
    parser.add_argument(
        "--rounds", type=int, default=20, help="of the ledger: steps with an entry, and as many without"
    )
    parser.add_argument("--steps", type=int, help="of the card's run, instead of one epoch; then no row is written")
    parser.add_argument("--build", type=Path, default=machine.ROOT / "build", help="where the checkpoints are kept")
    given = parser.parse_args()

    from lamina.process import prepare

    prepare()
    shape = MODELS[given.model]
    folder = made(given.build, shape)
    if given.what == "ledger":
        found, others = share_of_others(lambda: ledger(folder, shape, given.rounds))
    else:
        found, others = share_of_others(lambda: card(folder, shape, given.steps))
    print(
        f"{given.what}, {given.model}: {found['cost'][0]:.4f} of {found['base'][0]:.3f} s of processor time ({found['share'][0]:.2%}), "
        f"{found['cost'][1]:.4f} of {found['base'][1]:.3f} s of wall time ({found['share'][1]:.2%})"
        + (
            ""
            if found["beside"] is None
            else f"; steps with it by steps without: {found['beside']:+.2%} of processor time"
        )
        + f"; {found['note']}; other programs took {others:.0%}"
    )
    if given.model != "tiny" and given.steps is None:
        row = row_of(given.what, given.model, f"rank {shape.rank}", found, others)
        results.append(RESULTS, [row], FIELDS)


if __name__ == "__main__":
    main()
