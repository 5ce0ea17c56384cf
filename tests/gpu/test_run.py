"""The commands of a run on a GPU: plan, training over every form of the base, resuming, merging, explaining, answering."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny
from tokens import pieces

from lamina import cli
from lamina.report.record import read_metrics
from lamina.training.loop import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROWS = [("the cat", "sat on a mat"), ("Hello", "world!"), ("two and two?", "Four."), ("was it", "good; saw that")]
SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    tokenizer = pieces()
    write_tiny(folder / "base", torch.float16, std=0.06, vocab_size=len(tokenizer), **SIZE)
    tokenizer.save_pretrained(folder / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"{question} {n}"}, {"role": "assistant", "content": answer}]}
        for n in range(4)
        for question, answer in ROWS
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def train(place: Path, out: Path, *arguments: str) -> list[float]:
    """The losses of ``lamina train`` on the GPU, step by step."""
    job = ["--model", str(place / "base"), "--data", str(place / "train.jsonl"), "--rank", "4", "--device", "cuda"]
    job += ["--batch-size", "4", "--learning-rate", "3e-3", "--eval-samples", "2", "--eval-max-new-tokens", "4"]
    assert cli.main(["train", *job, "--out", str(out), *arguments]) == 0
    return [record["loss"] for record in read_metrics(out) if "loss" in record]


@pytest.mark.parametrize("base", ["bf16", "nf4", "int8", "fp8"])
def test_a_run_learns_merges_explains_and_answers(place: Path, tmp_path: Path, base: str) -> None:
    run, form = tmp_path / "run", [] if base == "bf16" else ["--base", base]
    losses = train(place, run, "--steps", "12", *form)
    assert losses[-1] < losses[0]
    assert (run / "report.html").exists()
    assert cli.main(["merge", str(run), "--out", str(tmp_path / "merged"), "--device", "cuda"]) == 0
    proof = json.loads((tmp_path / "merged" / "lamina_merge.json").read_text())
    assert proof["difference"]["kl"] < 1e-2
    assert cli.main(["explain", str(run), "--device", "cuda"]) == 0
    (tmp_path / "prompts.txt").write_text("Hello\nthe cat\n", encoding="utf-8")
    assert cli.main(["generate", str(run), "--prompts", str(tmp_path / "prompts.txt"), "--device", "cuda"]) == 0


@pytest.mark.parametrize(
    "settings",
    [
        ["--checkpoint-layers", "2", "--offload-checkpoints"],
        ["--optimizer", "adamw8bit"],
        ["--optimizer", "paged-adamw"],
        ["--dropout", "0.1", "--dtype", "fp32"],
    ],
    ids=" ".join,
)
def test_settings_that_a_gpu_has(place: Path, tmp_path: Path, settings: list[str]) -> None:
    losses = train(place, tmp_path / "run", "--steps", "8", *settings)
    assert losses[-1] < losses[0]


def test_a_killed_run_goes_on_where_it_was(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bf16 the sums of attention's gradients come in any order, so the losses are near and not the same."""
    whole = train(place, tmp_path / "whole", "--steps", "8", "--save-every", "4")
    step = Step.__init__

    def killed(made: Step, number: int, *rest: Any) -> None:
        step(made, number, *rest)
        if number == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__init__", killed)
        with pytest.raises(AssertionError):
            train(place, tmp_path / "cut", "--steps", "8", "--save-every", "4")
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    losses = [record["loss"] for record in read_metrics(tmp_path / "cut") if "loss" in record]
    assert losses == pytest.approx(whole, rel=1e-2)
