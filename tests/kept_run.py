"""The folder of a run, written by hand: every file that its page reads, in the form in which a run writes it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lamina.report.ledger import LedgerFile
from lamina.understand.ledger import COLUMNS, Place, Row

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def write_kept(folder: Path, text: str = "plain words", steps: int = 60, layers: int = 3, rank: int = 8) -> Path:
    """Writes all files; ``text`` stands wherever data, model or doctor put text of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.toml").write_text(f"version = 1\nname = {json.dumps(clean(text))}\n", encoding="utf-8")
    lines = [{"step": 0, "eval_loss": 3.0, "eval_tokens": 900}]
    for n in range(1, steps + 1):
        lines.append(step(n, steps))
        if n % max(1, steps // 5) == 0:
            lines.append({"step": n, "eval_loss": 0.5 + 2.5 * math.exp(-n / 15), "eval_tokens": 900})
    write_lines(folder / "metrics.jsonl", lines)
    dump(folder / "card.json", card(text, steps))
    dump(folder / "explanation.json", explanation(layers, rank))
    dump(folder / "check.json", {"findings": [finding(text, grade) for grade in ("error", "warning", "note")]})
    samples = [answer(text, row) | {"step": n} for n in range(0, steps + 1, max(1, steps // 5)) for row in (1, 2)]
    write_lines(folder / "samples.jsonl", samples)
    write_ledger(folder, steps, layers)
    return folder


def step(n: int, steps: int) -> dict[str, Any]:
    return {
        "step": n,
        "loss": 0.6 + 2.4 * math.exp(-n / 12) + 0.2 * math.sin(7 * n),
        "tokens": 700,
        "supervised_tokens": 400,
        "learning_rate": 2e-4 * (1 + math.cos(math.pi * n / steps)) / 2,
        "grad_norm": 1 + 0.5 * math.cos(n),
        "seconds": 0.2,
        "memory_bytes": 1 << 29,
    }


def answer(text: str, row: int) -> dict[str, Any]:
    return {"row": row, "prompt": text, "reference": text, "answer": text, "stopped": row % 2 == 0}


def side(text: str, loss: float) -> dict[str, Any]:
    measures = {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.5}
    spans = {
        "loss": [loss - 0.1, loss + 0.1],
        "perplexity": [math.exp(loss - 0.1), math.exp(loss + 0.1)],
        "accuracy": None,
    }
    given = {"exact_match": 0.25, "stop_rate": 0.75, "mean_tokens": 12.5}
    return {
        "held_out": measures | {"tokens": 900, "intervals": spans},
        "answers": given
        | {"intervals": {"stop_rate": [0.6, 0.9]}, "rows": [answer(text, row) for row in range(1, 13)]},
        "neutral": measures | {"tokens": 5000, "intervals": {}},
    }


def card(text: str, steps: int) -> dict[str, Any]:
    token = {"text": text, "trained": True, "before": 4.0, "after": 1.0}
    kinds = [{"text": text, "count": 7, "before": 3.0, "after": 0.5}]
    tokens = [token | {"after": after} for after in (0.2, 3.2, 3.9, 5.5)] + [
        {"text": text, "trained": False, "before": None, "after": None}
    ]
    plan = {"weights": 60 << 20, "adapters": 4 << 20, "optimiser": 8 << 20, "activations": 120 << 20, "buffers": 0}
    planned = {"total_bytes": sum(plan.values()), "items": plan, "moment": "loss", "device": "cpu", "seconds": 11.0}
    return {
        "job": clean(text),
        "model": text,
        "revision": None,
        "adapter_parameters": 108_544,
        "steps": steps,
        "tokens": 700 * steps,
        "supervised_tokens": 400 * steps,
        "training_seconds": 0.2 * steps,
        "versions": {"lamina": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "memory": {"planned": planned, "measured_bytes": 170 << 20},
        "time": {"planned_seconds": 11.0, "measured_seconds": 0.2 * steps},
        "base": side(text, 3.0),
        "adapter": side(text, 0.6),
        "difference": {
            "held_out.loss": [-2.4, -2.6, -2.2],
            "answers.stop_rate": [0.5, 0.3, 0.7],
            "neutral.loss": [0.02, -0.01, 0.05],
        },
        "kl": {"answers": {"mean": 2.1, "interval": [1.9, 2.3], "tokens": 900}, "neutral": None},
        "learnt": {"rows": [{"row": 1, "tokens": tokens}], "most": kinds, "least": [kinds[0] | {"after": 3.5}]},
        "dose": {
            "scales": [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5],
            "task": [3.0, 1.8, 1.0, 0.7, 0.6, 0.62, 0.7],
            "neutral": [2.0, 2.0, 2.01, 2.05, 2.1, 2.2, 2.4],
            "knee": 0.75,
            "rows": 40,
        },
        "seconds": {
            "data": 1.0,
            "load": 0.5,
            "base_evaluation": 0.7,
            "training": 0.2 * steps,
            "evaluations": 3.0,
            "card": 2.0,
        },
        "ledger_notes": [text],
    }


def finding(text: str, grade: str) -> dict[str, Any]:
    return {
        "rule": "masked-end-token",
        "grade": grade,
        "found": text,
        "why": text,
        "mend": text,
        "rows": list(range(20)),
    }


def explanation(layers: int, rank: int) -> dict[str, Any]:
    values = [2.0 ** (-n / 2) for n in range(rank)]
    matrices, cells = [], []
    for layer in range(layers):
        for n, module in enumerate(MODULES):
            norm = (1 + layer) * (1 + 0.3 * n)
            place = {"layer": f"model.layers.{layer}", "module": module.rpartition(".")[2]}
            cells.append({**place, "norm": norm, "relative": norm / 100, "effective_rank": 1 + n + layer / layers})
            matrices.append(
                {
                    **place,
                    "name": f"model.layers.{layer}.{module}",
                    "rank": rank,
                    "norm": norm,
                    "effective_rank": 1 + n + layer / layers,
                    "singular_values": [norm * value for value in values],
                    "relation": {"relative": norm / 100, "intruders": 0},
                }
            )
    ranks = [1 << n for n in range(rank.bit_length()) if 1 << n < rank]
    modules = {module.rpartition(".")[2]: 1 / 7 for module in MODULES}
    return {
        "adapter": "run/adapter",
        "base": "base",
        "rank": rank,
        "changes_nothing": False,
        "norm": 10.0,
        "shares": {"module": modules, "layer": {f"model.layers.{n}": 1 / layers for n in range(layers)}},
        "energy": [{"rank": r, "share": 1 - 2.0**-r} for r in [*ranks, rank]],
        "map": cells,
        "ranks": {
            "base_loss": 3.0,
            "adapter_loss": 0.6,
            "truncated": [{"rank": r, "loss": 0.6 + 1 / r**2} for r in ranks],
            "enough": None,
            "rows": 12,
            "held_out_rows": 40,
        },
        "not_measured": None,
        "matrices": matrices,
    }


def write_ledger(folder: Path, steps: int, layers: int) -> None:
    """One row per step and matrix; the first matrix never moves."""
    places = [Place(layer, module) for layer in range(layers) for module in MODULES]
    moved = np.array([0.0] + [1 + 0.1 * n for n in range(1, len(places))])
    file = LedgerFile(folder, tuple(places), [])
    for step in range(1, steps + 1):
        values = np.zeros((len(COLUMNS), len(places)), dtype=np.float32)
        values[COLUMNS.index("update_norm")] = norms = moved * (1 - math.exp(-step / 20))
        values[COLUMNS.index("relative")] = norms / 100
        file.add(Row(step, values))
    file.save()


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def clean(text: str) -> str:
    """The text as a file in UTF-8 can hold it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def plain(text: str) -> str:
    """With spaces that may break."""
    return text.replace("\u00a0", " ")
