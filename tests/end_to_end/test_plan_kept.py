"""What a run promises of its plan: the heaviest comes first, the choice is kept, and what was planned stands beside what came."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny
from tokens import pieces

from lamina.adapter import LoRA
from lamina.data.examples import DataSettings
from lamina.data.pack import Batch
from lamina.evaluation import Evaluating
from lamina.job import Job, Watching, prepare_data, read_job
from lamina.jobfile import Head
from lamina.model.storage import StoredForm
from lamina.model.tokenizer import load_tokenizer
from lamina.model.weights import ModelSettings
from lamina.planning import plan_run
from lamina.run import fine_tune, resume
from lamina.training import loop
from lamina.training.calibrate import Pace
from lamina.training.loop import Step, Training
from lamina.training.plan import Plan
from lamina.training.setup import Setup

pytestmark = pytest.mark.usefixtures("no_page")
PACE = Pace(layer=2.0**-10, rest=2.0**-9)
"""Of a machine that is thought up: no test depends on the time of this one."""


@dataclass
class Heard:
    """All that a run tells, with the micro-batches that it computes forward and backward, in their order."""

    events: list[tuple[str, Any]] = field(default_factory=list)
    interrupted_at: int | None = None

    def line(self, text: str) -> None:
        self.events.append(("line", text))

    def start(self, steps: int, done: int) -> None: ...

    def step(self, step: Step) -> None:
        self.events.append(("step", step.step))
        if step.step == self.interrupted_at:
            raise KeyboardInterrupt

    def evaluation(self, step: int, loss: float) -> None:
        self.events.append(("evaluation", step))

    @property
    def batches(self) -> list[Batch]:
        return [batch for kind, batch in self.events if kind == "batch"]

    def said(self, beginning: str) -> str:
        """The one line that begins so."""
        (found,) = [text for kind, text in self.events if kind == "line" and text.startswith(beginning)]
        return found

    def before_the_first_step(self) -> list[str]:
        """What the run does from its rehearsal to its first step, in words."""
        words = {"batch": "micro-batch", "line": "it fits", "evaluation": "evaluation"}
        told = [(kind, what) for kind, what in self.events if kind != "line" or what.endswith("computed once: it fits")]
        first = [kind for kind, _ in told].index("step")
        return [words[kind] for kind, _ in told[:first]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Four steps over nine rows; the heaviest is the second."""
    place = tmp_path_factory.mktemp("kept")
    tokenizer = pieces()
    write_tiny(place / "base", vocab_size=len(tokenizer), num_hidden_layers=3)
    tokenizer.save_pretrained(place / "base")
    rows = [{"prompt": f"the cat {n}", "completion": "sat on a mat " * (n % 4 + 1)} for n in range(12)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return Job(
        head=Head(out=str(place / "free"), seed=31),
        model=ModelSettings(model=str(place / "base"), dtype="fp32", device="cpu"),
        data=DataSettings(data=str(place / "rows.jsonl"), eval_fraction=0.25),
        adapter=LoRA(rank=2, dropout=0.1),
        train=Training(steps=4, batch_size=2),
        watch=Watching(eval_every=4, save_every=1, samples=0),
        evaluate=Evaluating(eval_samples=0, neutral=None),
    )


@pytest.fixture(scope="module", autouse=True)
def heard() -> Iterator[list[Heard]]:
    """Who listens; the last hears the micro-batches. The time is planned at ``PACE``."""
    listening: list[Heard] = []
    backward = loop.backward

    def computed(model: Any, batch: Batch, training: Training) -> Any:
        listening[-1].events.append(("batch", batch))
        return backward(model, batch, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "backward", computed)
        patch.setattr("lamina.planning.calibrate", lambda *_: PACE)
        yield listening


def ran(job: Job, name: str, listening: list[Heard]) -> tuple[Path, Heard]:
    """Runs the job in a folder of its own."""
    listening.append(Heard())
    out = Path(job.head.out or "").parent / name
    return fine_tune(replace(job, head=replace(job.head, out=str(out))), listening[-1]).folder, listening[-1]


@pytest.fixture(scope="module")
def free(job: Job, heard: list[Heard]) -> tuple[Path, Heard]:
    """The run with all the memory that it could want."""
    return ran(job, "free", heard)


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def card(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "card.json").read_text(encoding="utf-8"))
    return found


def test_the_heaviest_micro_batch_is_computed_before_all_else(free: tuple[Path, Heard]) -> None:
    _, heard = free
    assert heard.before_the_first_step() == ["micro-batch", "it fits", "evaluation", "micro-batch"]
    rehearsed, *computed = heard.batches
    assert len(computed) == 4
    sizes = [len(batch.tokens) for batch in computed]
    assert len(rehearsed.tokens) == max(sizes) == sizes[1] > sizes[0]
    assert heard.said("the heaviest micro-batch of the run").startswith(
        f"the heaviest micro-batch of the run ({len(rehearsed.tokens)} tokens) "
    )


def test_the_plan_stands_beside_the_measured_peak_and_time(free: tuple[Path, Heard]) -> None:
    run, heard = free
    size = r"[\d.,]+ [GM]iB"
    assert re.fullmatch(
        rf"memory: planned {size}, measured {size} at its peak \(\d+% of the plan\)", heard.said("memory: planned")
    )
    found = card(run)
    planned = found["memory"]["planned"]
    assert planned["total_bytes"] == sum(planned["items"].values()) > 0
    assert planned["fits"] and planned["heaviest_micro_batch"]["tokens"] == len(heard.batches[0].tokens)
    assert found["memory"]["measured_bytes"] >= 0
    assert found["time"] == {"planned_seconds": planned["seconds"], "measured_seconds": found["training_seconds"]}
    share = f"{found['training_seconds'] / planned['seconds']:.0%} of the plan"
    assert heard.said("time: planned") == (
        f"time: planned {planned['seconds']:.1f} s of training, measured {found['training_seconds']:.1f} s in its steps "
        f"({share})"
    )


def test_the_time_is_the_pace_of_all_tokens_and_of_those_that_are_learnt(job: Job, free: tuple[Path, Heard]) -> None:
    run, _ = free
    found, base = card(run), Path(job.model.model)
    share = prepare_data(job, base, load_tokenizer(base)).report.learnt
    assert 0.1 < share < 0.9
    expected = PACE.seconds(found["tokens"], round(found["tokens"] * share), layers=3)
    assert found["memory"]["planned"]["seconds"] == expected


def test_of_a_run_that_stops_early_the_time_of_its_steps_is_planned(job: Job, heard: list[Heard]) -> None:
    """At a rate this small the first evaluation is the best."""
    train = Training(steps=50, batch_size=2, learning_rate=1e-30, warmup=0.0)
    stopping = replace(job, train=train, watch=Watching(eval_every=1, patience=1, samples=0))
    found = card(ran(stopping, "stopped", heard)[0])
    planned = found["memory"]["planned"]
    assert found["steps"] == 2 and found["tokens"] < planned["tokens"] / 20
    assert found["time"]["planned_seconds"] == planned["seconds"] * found["tokens"] / planned["tokens"]


def test_a_checkpoint_that_is_stored_quantised_is_timed_in_its_form(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the settings do not name: they leave the base as it is stored."""
    timed: list[Setup] = []
    monkeypatch.setattr("lamina.planning.form_of_folder", lambda *_: StoredForm("nf4", False))
    monkeypatch.setattr("lamina.planning.calibrate", lambda setup, *_: timed.append(setup) or PACE)
    base = Path(job.model.model)
    plan_run(job, base, prepare_data(job, base, load_tokenizer(base)))
    assert job.model.form is None
    assert [(setup.base, setup.double) for setup in timed] == [("nf4", False)]


def test_what_was_chosen_is_in_the_runs_job_and_the_result_is_the_same(
    job: Job, free: tuple[Path, Heard], heard: list[Heard]
) -> None:
    """Between what the run needs when it computes nothing twice and when it does all layers: then it does some."""
    base = Path(job.model.model)
    data = prepare_data(job, base, load_tokenizer(base))

    def plan(**settings: Any) -> Plan:
        return plan_run(replace(job, train=replace(job.train, **settings)), base, data).plan

    between = (plan(checkpoint_layers=0).total + plan(checkpoint_layers=3).total) / 2
    tight = replace(job, train=replace(job.train, memory_gib=between / 2**30))
    runs = [free[0], ran(tight, "tight", heard)[0]]
    kept = [read_job(run).train for run in runs]
    assert (kept[0].micro_batch_tokens, kept[0].checkpoint_layers) == (4096, 0)
    assert kept[1].micro_batch_tokens == 4096 and kept[1].checkpoint_layers in (1, 2)
    for run, train in zip(runs, kept, strict=True):
        planned = card(run)["memory"]["planned"]
        assert planned["micro_batch_tokens"] == train.micro_batch_tokens
        assert planned["checkpoint_layers"] == train.checkpoint_layers
    assert adapter(runs[0]) == adapter(runs[1])


def test_a_resumed_run_meets_its_heaviest_micro_batch_first_and_is_the_same_run(
    job: Job, free: tuple[Path, Heard], heard: list[Heard]
) -> None:
    """With dropout, of which the rehearsal draws numbers too, and with other layers computed twice."""
    run = Path(job.head.out or "").parent / "resumed"
    heard.append(Heard(interrupted_at=3))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(replace(job, head=replace(job.head, out=str(run))), heard[-1])
    heard.append(Heard())
    resume(run, {"checkpoint_layers": 1}, heard[-1])
    assert heard[-1].said("resuming").endswith("after step 2 of 4")
    assert heard[-1].before_the_first_step() == ["micro-batch", "it fits", "micro-batch"]
    rehearsed, *computed = heard[-1].batches
    assert rehearsed.tokens.equal(free[1].batches[0].tokens) and len(computed) == 2
    assert len(rehearsed.tokens) > max(len(batch.tokens) for batch in computed)
    assert adapter(run) == adapter(free[0])
    assert read_job(run).train.checkpoint_layers == 1
    assert card(run)["tokens"] == card(free[0])["tokens"]
    assert card(free[0])["time"] and card(run)["time"] is None, "its measured seconds are another process's too"
    assert not any(kind == "line" and told.startswith("time: planned") for kind, told in heard[-1].events)

    heard.append(Heard())
    resume(run, show=heard[-1])
    assert not heard[-1].batches, "a run that is complete has nothing left to rehearse"
