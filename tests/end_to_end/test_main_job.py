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
from lamina.model.tokenizer import load_tokenizer
from lamina.report.record import read_metrics

pytestmark = pytest.mark.slow


def train(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs `lamina train` and returns the run's metrics."""
    assert cli.main(["train", "--dtype", "fp32", "--device", "cpu", "--out", str(out), *arguments]) == 0
    return read_metrics(out)


def merged_in_transformers(run: Path, prompts: list[str], new_tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Merges a run, and compares the greedy text of Lamina and of transformers on the merged folder."""
    from transformers import AutoModelForCausalLM

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
    # transformers rebuilds the tokenizer of TinyStories and gives other ids than its tokenizer.json does: the ids are ours.
    tokenizer = load_tokenizer(out)
    for prompt, answer in zip(prompts, ours, strict=True):
        chat = f"<s>[INST] {prompt} [/INST]".replace("<s>", tokenizer.bos_token)
        ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
        options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
        given = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        assert tokenizer.decode(given, skip_special_tokens=True).strip() == answer


def test_the_reference_dataset_on_a_small_llama_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, data = shared_data("llama2-tokenizer"), shared_data("guanaco-llama2-1k")
    size = {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 2, "num_key_value_heads": 4}
    size |= {"vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": True}  # 14.7 M parameters
    base = write_tiny(tmp_path / "base", std=0.06, **size)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / file, base / file)

    run = tmp_path / "run"
    limits = ["--steps", "120", "--max-length", "96", "--eval-fraction", "0.02", "--eval-samples", "0"]
    limits += ["--rank", "64", "--alpha", "64", "--learning-rate", "5e-3", "--schedule", "linear"]
    metrics = train(run, "--model", str(base), "--data", str(data), *limits)
    said = capsys.readouterr().out
    assert "format llama2-text (already rendered; 1,000 rows)" in said
    assert "beginning of text: kept once (1,000 rows held it already)" in said
    evaluations = [record["eval_loss"] for record in metrics if "eval_loss" in record]
    # Knowing nothing costs ln 32000 = 10.37 nats a token. A frozen random head of width 384 cannot say how often each
    # token occurs to better than about 9 nats; half a nat below knowing nothing is nothing that chance would give.
    assert evaluations[-1] < math.log(32000) - 0.5
    assert evaluations[-1] < evaluations[0] - 1
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
    assert card["ledger_notes"] == []
    merged_in_transformers(run, ["Tom has 3 cats and 2 dogs. How many pets has he?", "Hello"], 32, capsys)
