"""New tokens a second, Lamina beside transformers' ``generate`` on the same model: greedy, both in bf16, taking turns.

Prompts are the beginnings of guanaco's rows, or of made-up ones where those are not at hand. Each case answers one prompt, or
sixteen of different lengths at once (transformers pads them on the left), with exactly 64 new tokens, so that both do the same. Both
run in one process, with the threads and the memory allocator that Lamina sets up for itself, and transformers at its defaults. The
``adapted`` case has an adapter of rank 16 on all linears, in PEFT's form for transformers, unmerged. ``--tiny`` writes nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import results
import workload

from lamina.process import prepare

sys.path.insert(0, str(Path(__file__).parent / "arms"))
from common import others

RESULTS = results.FOLDER / "generation_cpu.csv"
FIELDS = "date commit versions machine model case prompt_tokens new_tokens lamina_tok_s transformers_tok_s ratio others".split()
CASES = {"one prompt": (1, False), "sixteen prompts": (16, False), "sixteen prompts, adapted": (16, True)}


def prompts_of(rows: Path, count: int) -> list[list[int]]:
    """The first half of so many rows, at most 128 tokens each."""
    with rows.open(encoding="utf-8") as lines:
        tokens = [json.loads(line)["input_ids"] for _, line in zip(range(count), lines, strict=False)]
    return [ids[: min(len(ids) // 2, 128)] for ids in tokens]


def arms(files: workload.Files, prompts: list[list[int]], adapted: bool, new: int) -> dict[str, Callable[[], int]]:
    """Both tools with the model loaded: each answers all prompts and returns the number of tokens it wrote."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lamina.adapter import LoRA, attach
    from lamina.generation import Sampling, generate
    from lamina.model.weights import load_model

    ours = load_model(str(files.model), "bf16", "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.bfloat16).eval()
    if adapted:
        attach(ours, LoRA(rank=16))
        theirs = get_peft_model(theirs, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).bfloat16().eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def lamina() -> int:
        with torch.inference_mode():
            answers = generate(ours.eval(), prompts, Sampling(max_new_tokens=new), frozenset(), 0)
        return sum(len(answer.tokens) for answer in answers)

    def transformers() -> int:
        with torch.inference_mode():
            return (theirs.generate(input_ids=ids, attention_mask=mask, **options).shape[1] - longest) * len(prompts)

    return {"lamina": lamina, "transformers": transformers}


def measure(files: workload.Files, case: str, new: int, rounds: int) -> dict[str, Any]:
    """The medians of so many rounds, each tool once in a round, after one that is not counted."""
    count, adapted = CASES[case]
    prompts = prompts_of(Path(files.whole), count)
    both = arms(files, prompts, adapted, new)
    speeds: dict[str, list[float]] = {name: [] for name in both}
    busy, began, own = others(), time.perf_counter(), time.process_time()
    for turn in range(rounds + 1):
        for name, answer in both.items():
            start = time.perf_counter()
            written = answer()
            if turn:
                speeds[name].append(written / (time.perf_counter() - start))
    took = time.perf_counter() - began
    busy = max(0.0, others() - busy - (time.process_time() - own)) / took / machine.cores()
    ratio = statistics.median(a / b for a, b in zip(*speeds.values(), strict=True))
    found = {f"{name}_tok_s": round(statistics.median(values), 1) for name, values in speeds.items()}
    sizes = {"prompt_tokens": sum(map(len, prompts)), "new_tokens": new}
    return {"model": files.name, "case": case, **sizes, **found, "ratio": round(ratio, 2), "others": round(busy, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries the benchmark itself, writes nothing")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    prepare()
    import torch

    torch.set_num_threads(machine.cores())
    rows = []
    for model in ("tiny",) if options.tiny else ("15m", "134m"):
        files = workload.prepare(machine.ROOT / "build" / "bench", workload.MODELS[model])
        for case in CASES:
            row = measure(files, case, 4 if options.tiny else 64, 1 if options.tiny else options.rounds)
            print(
                f"{row['model']:20}{case:26}{row['lamina_tok_s']:9.1f} tok/s, transformers {row['transformers_tok_s']:8.1f}: "
                f"{row['ratio']:.2f} × (others {row['others']:.0%})",
                flush=True,
            )
            rows.append(row)
    if not options.tiny:
        kept = [row for row in rows if row["others"] <= results.NOISE]
        results.append(RESULTS, [results.origin("torch", "transformers", "peft") | row for row in kept], FIELDS)


if __name__ == "__main__":
    main()
