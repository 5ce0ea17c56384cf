"""The page at the end of a run: it is there, it is bounded, and whatever goes wrong with it costs nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny
from tokens import pieces

from lamina import cli, explain
from lamina.adapter import LoRA, adapted
from lamina.data.examples import DataSettings
from lamina.evaluation import Evaluating, evaluate
from lamina.explaining import explain_trained
from lamina.job import Job, Watching
from lamina.jobfile import Head
from lamina.model.weights import ModelSettings
from lamina.opened import held_out_of, open_run
from lamina.reporting import write_page
from lamina.run import Silent, fine_tune
from lamina.training.loop import Training
from lamina.understand.budget import some

ROW = "<script>alert(1)</script>{{7*7}}"


class Told(Silent):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def job(place: Path, out: Path, **sections: Any) -> Job:
    """A job of a few steps on rows that hold markup."""
    if not (place / "base").exists():
        tokenizer = pieces()
        write_tiny(place / "base", vocab_size=len(tokenizer))
        tokenizer.save_pretrained(place / "base")
        rows = [{"prompt": f"the cat {n} {ROW}", "completion": "sat on a mat " * (n % 4 + 1)} for n in range(12)]
        (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    made: dict[str, Any] = {
        "head": Head(out=str(out)),
        "model": ModelSettings(model=str(place / "base"), dtype="fp32", device="cpu"),
        "data": DataSettings(data=str(place / "rows.jsonl"), eval_fraction=0.25),
        "adapter": LoRA(rank=3),
        "train": Training(steps=3, batch_size=3),
        "watch": Watching(eval_every=1),
        "evaluate": Evaluating(eval_samples=2, eval_max_new_tokens=4),
    }
    return Job(**made | sections)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    return fine_tune(job(place, place / "run")).folder


def test_a_run_ends_with_its_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<h2" in page and page.count("<svg") >= 9
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{7*7}}" in page and "<script" not in page
    assert cli.main(["report", str(run), "--out", str(run.parent / "again.html")]) == 0
    assert (run.parent / "again.html").read_text(encoding="utf-8") == page


def test_the_explanation_is_that_of_the_command_but_for_its_bounds(run: Path) -> None:
    found = json.loads((run / "explanation.json").read_text(encoding="utf-8"))
    whole = json.loads(json.dumps(explain(run).as_json()))
    assert found["ranks"].pop("rows") <= found["ranks"].pop("held_out_rows") == 3
    for own, other in zip(found["matrices"], whole["matrices"], strict=True):
        assert own["singular_values"] == other["singular_values"]
        assert own["relation"] == pytest.approx(other["relation"], rel=1e-5)


def test_the_model_is_afterwards_as_it_was_and_the_rows_are_bounded(run: Path) -> None:
    opened = open_run(run)
    held_out = held_out_of(opened).held_out
    before = {path: (m.a, m.b, m.scale) for path, m in adapted(opened.model).items()}
    loss = evaluate(opened.model, held_out, 4096).loss
    all_rows = explain_trained(opened.model, run, opened.base, held_out, 4096, tokens=10**9)
    assert all_rows.ranks == explain(run).ranks
    assert all_rows.ranks is not None and (all_rows.ranks.rows, all_rows.ranks.held_out) == (3, 3)
    few = explain_trained(opened.model, run, opened.base, held_out, 4096, tokens=1)
    assert few.ranks is not None and few.ranks.rows == 1
    (place,) = some(held_out.lengths, 1)
    assert few.ranks.adapter == evaluate(opened.model, [held_out[int(place)]], 4096).loss
    assert evaluate(opened.model, held_out, 4096).loss == loss
    for path, module in adapted(opened.model).items():
        assert module.a is before[path][0] and module.b is before[path][1] and module.scale == before[path][2]


def test_a_bound_on_tokens_takes_the_rows_that_fit_it(run: Path) -> None:
    lengths = held_out_of(open_run(run)).held_out.lengths
    two = int(lengths[some(lengths, int(lengths.sum()) - 1)].sum())
    ranks = explain(run, tokens=two).ranks
    assert ranks is not None and (ranks.rows, ranks.held_out) == (2, 3)
    assert explain(run, tokens=two - 1).ranks != ranks
    ranks = explain(run, tokens=1).ranks
    assert ranks is not None and (ranks.rows, ranks.held_out) == (1, 3)
    assert explain(run, tokens=10**9).ranks == explain(run).ranks


def test_a_large_base_is_not_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.explaining.COMPARED", 1)
    opened = open_run(run)
    found = explain_trained(opened.model, run, opened.base, held_out_of(opened).held_out, 4096, tokens=1)
    assert found.base is None and all(update.relation is None for update in found.updates)


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_written_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lamina.reporting.write_json", refuse)
    told = Told()
    result = fine_tune(job(tmp_path, tmp_path / "run"), told)
    assert (result.folder / "card.json").is_file() and not (result.folder / "explanation.json").exists()
    assert told.lines[-3:-1] == [  # the last one is where the time went
        "the run is complete, but for explanation.json (OSError: [Errno 28] No space left on device); again: "
        f"lamina explain {result.folder}",
        f"what it learnt, what it forgot and what it cost, on one page: {result.folder / 'report.html'}",
    ]
    monkeypatch.setattr("lamina.reporting.report", refuse)
    write_page(result.folder, told.line)
    assert told.lines[-1].startswith("the run is complete, but for report.html (OSError: [Errno 28] No space left")


@pytest.mark.usefixtures("undrawn")
def test_a_run_over_a_quantised_base_without_held_out_rows(tmp_path: Path) -> None:
    made = job(tmp_path, tmp_path / "run")
    model = ModelSettings(model=made.model.model, dtype="fp32", device="cpu", base="nf4")
    data = DataSettings(data=made.data.data, eval_fraction=0.0)
    torch.manual_seed(0)
    folder = fine_tune(job(tmp_path, tmp_path / "run", model=model, data=data)).folder
    found = json.loads((folder / "explanation.json").read_text(encoding="utf-8"))
    assert found["ranks"] is None and found["not_measured"] == "the run held out no rows"
    assert all(matrix["relation"]["relative"] > 0 for matrix in found["matrices"])
    assert "Nothing was held out" in (folder / "report.html").read_text(encoding="utf-8")
