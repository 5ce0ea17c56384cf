"""Training over a quantised base: the reference jobs, the losses beside those of a dense base, and the memory of loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import shared_data
from tiny import write_tiny

from lamina import cli
from lamina.report.record import read_metrics

# The smallest width whose rows are whole blocks in every matrix, with Llama-2's vocabulary.
SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 4}
SIZE |= {"vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": True}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def llama_2(place: Path) -> Path:
    """A small checkpoint of Llama-2's architecture with its real tokenizer."""
    tokenizer = shared_data("llama2-tokenizer")
    base = write_tiny(place, torch.float16, std=0.06, **SIZE)
    for file in TOKENIZER:
        shutil.copyfile(tokenizer / file, base / file)
    return base


def train(out: Path, *arguments: str) -> list[float]:
    """The losses of `lamina train`, step by step."""
    assert cli.main(["train", *arguments, "--device", "cpu", "--eval-samples", "0", "--out", str(out)]) == 0
    return [record["loss"] for record in read_metrics(out) if "loss" in record]


def rows(job: str, place: Path) -> str:
    """Data of the kind that the job wants: the real file, or rows of its form."""
    if job == "miniguanaco":
        return str(shared_data("guanaco-llama2-1k"))
    if job == "guanaco-7b":
        questions = (shared_data("oasst1-qlora-eval") / "oa_questions.jsonl").read_text(encoding="utf-8").splitlines()
        made = [{"text": f"### Human: {question[:200]}### Assistant: Yes."} for question in questions[:64]]
    else:
        text = "Write a sentence that contradicts the input. Answer in JSON."
        answer = json.dumps({"contradiction": "Nobody mends the nets."})
        made = [{"instruction": text, "input": f"{n} people mend nets.", "output": answer} for n in range(64)]
    path = place / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["miniguanaco", "kdnuggets", "guanaco-7b"])
def test_the_reference_jobs_run_as_they_are_with_nf4(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = llama_2(tmp_path / "base"), tmp_path / "run"
    changes = ["--model", str(base), "--data", rows(job, tmp_path), "--steps", "9", "--max-length", "96"]
    losses = train(run, job, *changes, "--learning-rate", "3e-3")
    assert sum(losses[-3:]) < sum(losses[:3])
    assert "frozen parameters in nf4" in capsys.readouterr().out
    assert cli.main(["merge", str(run), "--out", str(tmp_path / "merged"), "--device", "cpu"]) == 0
    proof = json.loads((tmp_path / "merged" / "lamina_merge.json").read_text())
    # The most likely of 32,000 tokens is a near tie in a model that has learnt next to nothing; the distributions are not.
    assert proof["policy"] == "dequantised" and proof["difference"]["kl"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_losses_track_those_of_a_dense_base(form: str, tmp_path: Path) -> None:
    """Two in a hundred, step by step, on a real checkpoint and a real data set."""
    base, data = shared_data("tinystories-656k-hf"), shared_data("gsm8k")
    few = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    (tmp_path / "rows.jsonl").write_text("\n".join(few), encoding="utf-8")
    job = ["--model", str(base), "--data", str(tmp_path / "rows.jsonl"), "--steps", "40", "--max-length", "384"]
    dense = train(tmp_path / "dense", *job)
    quantised = train(tmp_path / "quantised", *job, "--base", form)
    assert dense[-1] < dense[0] / 2
    assert max(abs(one / other - 1) for one, other in zip(quantised, dense, strict=True)) < 0.02
