"""A run's folder: what is kept, what is refused, and what is never lost."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny
from tokens import pieces

from lamina import cli
from lamina.adapter import LoRA
from lamina.data.examples import DataSettings
from lamina.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    OutOfMemoryError,
    TrainingError,
    memory_told,
)
from lamina.evaluation import Evaluating
from lamina.job import Job, Watching
from lamina.jobfile import Head
from lamina.model.architecture import read_config
from lamina.model.weights import ModelSettings
from lamina.opened import card_of, neutral_of, open_run
from lamina.report.chapters.cost import PARTS
from lamina.report.record import read_metrics
from lamina.run import fine_tune, resume
from lamina.training.loop import Training
from lamina.training.plan import LIBRARIES, WRITER
from lamina.training.resume import locked

pytestmark = pytest.mark.usefixtures("no_page", "untimed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = pieces()
    write_tiny(folder / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": f"the cat {n}", "completion": "sat on a mat " * (n % 4 + 1)} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def job(place: Path, out: Path, base: str = "base", **sections: Any) -> Job:
    """A job of four steps; keyword arguments replace whole sections."""
    return Job(
        **{
            "head": Head(out=str(out)),
            "model": ModelSettings(model=str(place / base), dtype="fp32", device="cpu"),
            "data": DataSettings(data=str(place / "rows.jsonl"), eval_fraction=0.25),
            "adapter": LoRA(rank=2),
            "train": Training(steps=4, batch_size=3),
            "watch": Watching(eval_every=1),
            "evaluate": Evaluating(eval_samples=0, neutral=None),
            **sections,
        }
    )


def test_a_refused_run_leaves_nothing(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter.targets: 'c_attn' matches no linear"):
        fine_tune(job(place, tmp_path / "run", adapter=LoRA(targets=("c_attn",))))
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(
        ConfigError, match="train.checkpoint_layers: found 99, expected at most 2, the layers of the model"
    ):
        fine_tune(job(place, tmp_path / "mine", train=Training(steps=1, checkpoint_layers=99)))
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--rank", "33"],
            "adapter.rank: found 33, expected at most 16, the smaller side of model.layers.0.self_attn.k_proj "
            "(14 of 14 matrices are too small)",
        ),
        (
            ["--optimizer", "paged-adamw"],
            "train.optimizer: found paged-adamw on cpu, but pages live in CUDA's unified memory; expected adamw or adamw8bit",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_what_the_config_alone_refuses_is_refused_before_anything_is_read(
    command: str,
    flags: list[str],
    told: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((place / "base" / "config.json").read_bytes())  # no weights and no tokenizer
    named = ["--model", str(base), "--data", str(tmp_path / "none.jsonl"), "--device", "cpu"]
    assert cli.main([command, *named, "--out", str(tmp_path / "run"), *flags]) == 2
    assert capsys.readouterr() == ("", f"lamina: {told}\n")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_not_touched(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with locked(run), pytest.raises(CheckpointError, match="is not empty"):
        fine_tune(job(place, run))
    assert (run / ".lock").exists()


@pytest.mark.slow
def test_early_stopping_ends_the_run_and_resuming_does_not_go_on(place: Path, tmp_path: Path) -> None:
    """At a rate this small the first evaluation is the best: rounding decides between equals, and the first one stays."""
    training = Training(steps=50, batch_size=3, learning_rate=1e-30, schedule="constant", warmup=0.0)
    fine_tune(job(place, tmp_path / "run", train=training, watch=Watching(eval_every=1, patience=2)))
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert steps == [1, 2, 3]
    before = load_file(tmp_path / "run/state/state.safetensors")
    resume(tmp_path / "run")
    after = load_file(tmp_path / "run/state/state.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(read_metrics(tmp_path / "run")) == 3 + 4  # steps, and evaluations with the base's


def test_patience_needs_something_held_out(place: Path, tmp_path: Path) -> None:
    data = DataSettings(data=str(place / "rows.jsonl"), eval_fraction=0.0)
    with pytest.raises(ConfigError, match="watch.patience: counts evaluations, but nothing is held out"):
        fine_tune(job(place, tmp_path / "run", data=data, watch=Watching(patience=1)))


def test_a_damaged_base_is_named_before_the_first_step(place: Path, tmp_path: Path) -> None:
    weights = load_file(place / "base" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (place / "base").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    model = ModelSettings(model=str(broken), dtype="fp32", device="cpu")
    with pytest.raises(
        TrainingError, match=r"base itself is damaged, with non-finite numbers in model.layers.1.mlp.up_proj"
    ):
        fine_tune(job(place, tmp_path / "run", model=model))


@pytest.mark.parametrize("rate", [1e39, 1e18])
def test_nothing_non_finite_is_saved(rate: float, place: Path, tmp_path: Path) -> None:
    """At 1e39 the update overflows; at 1e18 it does not, but what the adapter then computes does."""
    training = Training(steps=4, batch_size=3, learning_rate=rate, warmup=0.0)
    with pytest.raises(TrainingError, match="start a new run, in another --out, with a lower learning rate"):
        fine_tune(job(place, tmp_path / "run", train=training, watch=Watching(eval_every=1, save_every=1)))
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file
    assert all(record["eval_loss"] < 100 for record in read_metrics(tmp_path / "run") if "eval_loss" in record)


def test_what_a_run_was_computed_from_is_pinned(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes((place / "rows.jsonl").read_bytes())
    run = tmp_path / "run"
    fine_tune(job(place, run, data=DataSettings(data=str(data), eval_fraction=0.25)))
    card_of(open_run(run))

    text = (run / "job.toml").read_text()
    (run / "job.toml").write_text(text.replace("batch_size = 3", "batch_size = 4"))
    with pytest.raises(CheckpointError, match="the settings are not those this run was trained with"):
        resume(run)
    (run / "job.toml").write_text(text)

    (run / "metrics.jsonl").rename(run / "elsewhere")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: cannot be read .*; the run's record is lost"):
        resume(run)

    rows = data.read_text().splitlines()
    data.write_text("\n".join(row.replace("sat", "was") for row in rows))
    with pytest.raises(CheckpointError, match="the held-out rows are not those this run was trained with"):
        card_of(open_run(run))


def test_a_seed_is_no_less_than_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "demo", "--seed", "-5"]) == 2
    assert "--seed: found '-5', expected an integer ≥ 0" in capsys.readouterr().err


def test_the_end_of_the_memory_is_told_in_one_line() -> None:
    with (
        pytest.raises(OutOfMemoryError, match="^out of memory; buy some$"),
        memory_told("buy some"),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), memory_told("buy some"):
        torch.ones(2, 3) @ torch.ones(2, 3)


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.slow
def test_memory_that_runs_out_under_way_is_told_with_what_resuming_takes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.under_way.train", out_of_memory)
        with pytest.raises(OutOfMemoryError) as caught:
            fine_tune(job(place, run))
    told = f"out of memory (training); what was saved is untouched; go on with: lamina train --resume {run} --checkpoint-layers 2"
    assert str(caught.value) == told
    command = told.partition("with: lamina ")[2].split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.under_way.train", out_of_memory)
        assert cli.main(command) == 2
    less = f"free some memory, and go on with: lamina train --resume {run}"
    assert capsys.readouterr().err == f"lamina: out of memory (training); what was saved is untouched; {less}\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.run.measured", out_of_memory)  # its steps are done: recomputation would not help
        assert cli.main(["train", "--resume", str(run), "--checkpoint-layers", "0"]) == 2
    assert capsys.readouterr().err == f"lamina: out of memory (card); what was saved is untouched; {less}\n"
    assert cli.main(["train", "--resume", str(run)]) == 0


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("lamina.run.prepare_data", r"\(data\); free some memory$"),
        ("lamina.run.attach", r"\(load\); free some memory, or keep the base in fewer bits: --base nf4$"),
        ("lamina.under_way.rehearse", r"\(training\); lower --micro-batch-tokens or --max-length, or raise"),
        (
            "lamina.under_way.score",
            r"\(base evaluation\); lower --micro-batch-tokens or --max-length \(the result stays",
        ),
    ],
)
def test_memory_that_runs_out_before_a_run_began_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, told: str
) -> None:
    monkeypatch.setattr(broken, out_of_memory)
    with pytest.raises(OutOfMemoryError, match=f"^out of memory {told}"):
        fine_tune(job(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_that_does_not_fit_names_what_resuming_takes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    texts = [{"text": f"{n} " + "the cat sat on a mat " * 18} for n in range(8)]
    rows.write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    fine_tune(job(place, run, data=DataSettings(data=str(rows), eval_fraction=0.25)))
    once = json.loads((run / "card.json").read_text())["memory"]["planned"]["total_bytes"]
    resumed = ["train", "--resume", str(run), "--memory-gib", f"{(once - 1000) / 2**30:.9f}"]
    assert cli.main(resumed) == 2
    told = capsys.readouterr().err
    way = f"lamina train --resume {run} --checkpoint-layers none"
    assert f"what would fit: {way} (" in told
    assert f"to try it all the same: lamina train --resume {run} --memory-gib " in told
    assert cli.main([*resumed, *way.split()[4:]]) == 0
    assert cli.main(["train", "--resume", str(run), "--memory-gib", "0.001"]) == 2
    assert "what would fit: nothing that a resumed run may change; to try" in capsys.readouterr().err


def test_what_is_stored_quantised_is_not_quantised_anew_where_it_does_not_fit(place: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    stored = load_file(base / "model.safetensors")
    for name in [name for name in stored if name.endswith("proj.weight")]:
        stored[name] = stored[name].to(torch.int8)
        stored[name.replace("weight", "SCB")] = torch.ones(len(stored[name]))
    save_file(stored, base / "model.safetensors")
    with pytest.raises(TrainingError, match="what would fit: no setting alone, but a smaller base"):
        fine_tune(
            job(
                tmp_path,
                tmp_path / "run",
                data=DataSettings(data=str(place / "rows.jsonl")),
                train=Training(memory_gib=(LIBRARIES["cpu"] + WRITER + 1000) / 2**30),  # what the process itself takes
            )
        )


def test_an_adapter_without_effect_is_refused(place: Path, tmp_path: Path) -> None:
    """B is not zero, but so small that no logit moves."""
    run = tmp_path / "run"
    fine_tune(job(place, run, train=Training(steps=1, batch_size=3, learning_rate=1e-30, warmup=0.0)))
    with pytest.raises(AdapterError, match="adapter: changes no logit of the base; train it anew"):
        open_run(run)


@pytest.mark.parametrize(
    ("stored", "rate", "warned"),
    [
        (torch.bfloat16, "1e-6", True),
        (torch.bfloat16, "1e-2", False),
        (torch.float16, "1e-6", True),
        (torch.float32, "1e-6", False),
    ],
)
@pytest.mark.slow
def test_an_update_too_small_for_the_base_is_told_before_the_run(
    stored: torch.dtype, rate: str, warned: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the dtype in which the base is stored, for a merge is written in it, whatever the run computes in."""
    tokenizer = pieces()
    base = write_tiny(tmp_path / "base", stored, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    settings = [
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--rank",
        "2",
        "--steps",
        "4",
        "--eval-samples",
        "0",
        "--learning-rate",
        rate,
    ]
    files = ["--model", str(base), "--data", str(place / "rows.jsonl"), "--out", str(tmp_path / "run")]
    assert cli.main(["train", *files, *settings]) == 0
    assert ("doctor: warning update-too-small: these 4 steps at this rate" in capsys.readouterr().out) == warned
    told = {finding["rule"] for finding in json.loads((tmp_path / "run" / "check.json").read_text())["findings"]}
    assert ("update-too-small" in told) == warned


@pytest.mark.parametrize(
    "neutral", [*(pytest.param(it, marks=pytest.mark.slow) for it in ("lamina:neutral.txt", None)), "own"]
)
def test_the_card_of_a_run(neutral: str | None, place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "own.txt").write_text("the cat sat on a mat and saw that it was good; " * 20, encoding="utf-8")
    settings = Evaluating(neutral=str(tmp_path / "own.txt") if neutral == "own" else neutral, eval_max_new_tokens=4)
    fine_tune(job(place, run, evaluate=settings))
    card = json.loads((run / "card.json").read_text(encoding="utf-8"))
    evaluations = [record["eval_loss"] for record in read_metrics(run) if "eval_loss" in record]
    for side, loss in (("base", evaluations[0]), ("adapter", evaluations[-1])):
        # Two orders of summing some tens of losses in float64.
        assert card[side]["held_out"]["loss"] == pytest.approx(loss, rel=1e-13)
        assert (card[side]["neutral"] is None) == (neutral is None)
    assert (card["kl"]["neutral"] is None) == (card["dose"]["neutral"] is None) == (neutral is None)
    assert card["kl"]["answers"]["mean"] > 0
    assert len(card["adapter"]["answers"]["rows"]) == 3, "all that is held out"
    assert len(card["learnt"]["rows"]) == 3
    assert card["dose"]["scales"][0] == 0 and len(card["dose"]["task"]) == 7
    assert card["seconds"].keys() == PARTS.keys(), "all that the page has a name for"
    # The steps are a part of the training, which also opens the record and meets the heaviest micro-batch.
    assert card["seconds"]["training"] > card["training_seconds"] > 0
    again = card_of(open_run(run)).as_json()
    assert {key: card[key] for key in again} == again, (
        "what the run's evaluations had computed is what is computed anew"
    )


def test_neutral_text_that_is_not_there_is_told_before_the_run(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.txt: cannot be read .*; check neutral"):
        fine_tune(job(place, tmp_path / "run", evaluate=Evaluating(neutral=str(tmp_path / "none.txt"))))
    assert not (tmp_path / "run").exists()


def test_neutral_text_beyond_the_models_vocabulary_is_left_out(place: Path, tmp_path: Path) -> None:
    """A tokenizer may know more tokens than the model has vectors for; the data never hold them, a text might."""
    architecture, text = read_config(place / "base"), tmp_path / "text.txt"
    settings = job(place, tmp_path / "run", evaluate=Evaluating(neutral=str(text)))
    text.write_text("the cat sat on a mat. " * 40, encoding="utf-8")
    rows = neutral_of(settings, pieces(), architecture)
    assert len(rows) > 1
    known = max(int(row.tokens.max()) for row in rows)
    assert neutral_of(settings, pieces(), replace(architecture, vocabulary=known + 1)) != []
    assert neutral_of(settings, pieces(), replace(architecture, vocabulary=known)) == []
    assert neutral_of(job(place, tmp_path / "run", evaluate=Evaluating(neutral=None)), pieces(), architecture) == []


@pytest.mark.slow
def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fine_tune(job(place, run))
    before = json.loads((run / "card.json").read_text(encoding="utf-8"))
    resume(run)
    after = json.loads((run / "card.json").read_text(encoding="utf-8"))
    for part in ("data", "load", "training", "evaluations", "base_evaluation"):
        assert after["seconds"][part] >= before["seconds"][part] > 0, part
    assert after["seconds"]["data"] > before["seconds"]["data"]
    assert after["adapter"] == before["adapter"]
    assert after["base"] == before["base"], (
        "the base's scores are not kept in the state; computed anew they are the same"
    )
