"""The main job on real input: real rows, the real tokenizer, a real checkpoint, from training to the merged model."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared_data
from tiny import write_tiny

from lamina import cli
from lamina.report.record import read_metrics

pytestmark = pytest.mark.slow


def train(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs `lamina train` and returns the run's metrics."""
    assert cli.main(["train", "--dtype", "fp32", "--device", "cpu", "--out", str(out), *arguments]) == 0
    return read_metrics(out)


def merged_in_transformers(run: Path, prompts: list[str], new_tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Merges a run, and compares the greedy text of Lamina and of transformers on the merged folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = run / "merged"
    assert cli.main(["merge", str(run), "--out", str(out)]) == 0
    proof = json.loads((out / "lamina_merge.json").read_text())
    assert proof["survived"] == pytest.approx(1, abs=1e-3)  # fp32 weights: next to nothing is rounded away
    assert proof["difference"]["kl"] < 1e-6
    assert proof["difference"]["agreement"] == 1

    file = run / "prompts.txt"
    file.write_text("\n".join(prompts))
    capsys.readouterr()
    limit = ["--max-new-tokens", str(new_tokens)]
    assert cli.main(["generate", str(out), "--prompts", str(file), "--json", *limit]) == 0
    ours = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    for prompt, answer in zip(prompts, ours, strict=True):
        chat = f"<s>[INST] {prompt} [/INST]".replace("<s>", tokenizer.bos_token)
        ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
        given = model.generate(ids, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)[0, ids.shape[1] :]
        assert tokenizer.decode(given, skip_special_tokens=True).strip() == answer


def test_the_reference_dataset_on_a_small_llama_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, data = shared_data("llama2-tokenizer"), shared_data("guanaco-llama2-1k")
    size = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_key_value_heads": 4}
    base = write_tiny(tmp_path / "base", vocab_size=32000, max_position_embeddings=2048, **size)  # 15 M parameters
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / file, base / file)

    run = tmp_path / "run"
    limits = ["--steps", "40", "--max-length", "160", "--eval-fraction", "0.02", "--eval-samples", "0", "--rank", "16"]
    metrics = train(run, "--model", str(base), "--data", str(data), *limits)
    said = capsys.readouterr().out
    assert "format llama2-text (already rendered; 1,000 rows)" in said
    assert "beginning of text: kept once (1,000 rows held it already)" in said
    losses = [record["loss"] for record in metrics if "loss" in record]
    evaluations = [record["eval_loss"] for record in metrics if "eval_loss" in record]
    assert sum(losses[-5:]) / 5 < math.log(32000) - 1.5  # a model that knows nothing has ln 32000 = 10.37 at best
    assert evaluations[-1] < evaluations[0] - 1.5
    merged_in_transformers(run, ["What is a large language model?", "¿Qué es la vida?"], 24, capsys)


def test_a_real_checkpoint_learns_a_real_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = shared_data("tinystories-656k-hf"), shared_data("gsm8k")
    rows = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    run = tmp_path / "run"
    limits = ["--steps", "40", "--max-length", "384", "--eval-samples", "4", "--eval-max-new-tokens", "16"]
    metrics = train(run, "--model", str(base), "--data", str(tmp_path / "rows.jsonl"), *limits)
    evaluations = [record["eval_loss"] for record in metrics if "eval_loss" in record]
    assert evaluations[-1] < evaluations[0] / 2
    card = json.loads((run / "card.json").read_text())
    assert card["adapter"]["held_out"]["loss"] == pytest.approx(evaluations[-1], rel=1e-6)
    assert card["base"]["held_out"]["loss"] == pytest.approx(evaluations[0], rel=1e-6)
    merged_in_transformers(run, ["Tom has 3 cats and 2 dogs. How many pets has he?", "Hello"], 32, capsys)
