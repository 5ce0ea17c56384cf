"""What `lamina explain` costs for an adapter of Llama-2-7B's shape, without its base.

The adapter has rank 64 on all linears: random, in PEFT's format, bf16, written once under ``build/``. Each measurement is the
command in a process of its own, start-up included: seconds on the clock and of processor time, and the peak of its resident
memory. Processor time is what can be compared where other programs run beside it. ``--tiny`` tries the benchmark and writes nothing.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import machine
import results
import torch
from checkpoint import LLAMA_2_7B
from safetensors.torch import save_file
from workload import SEED, TINY, Shape

RESULTS = Path(__file__).parent / "results" / "explain_cpu.csv"
FIELDS = ["date", "commit", "versions", "machine", "what", "threads", "seconds", "cpu_seconds", "peak_mib", "others"]
RANK = 64


def write(build: Path, shape: Shape, rank: int) -> Path:
    """The folder of the adapter under ``build``; one that is there already is kept."""
    folder = build / f"adapter-{shape.width}x{shape.layers}-r{rank}"
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(SEED), {}
    square, widening, narrowing = (shape.width, shape.width), (shape.mlp, shape.width), (shape.width, shape.mlp)
    linears = {f"self_attn.{name}_proj": square for name in "qkvo"}
    linears |= {"mlp.gate_proj": widening, "mlp.up_proj": widening, "mlp.down_proj": narrowing}
    for layer in range(shape.layers):
        for module, (outputs, inputs) in linears.items():
            name = f"base_model.model.model.layers.{layer}.{module}.lora_{{}}.weight"
            bound = 1 / math.sqrt(inputs)
            tensors[name.format("A")] = (
                torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator).bfloat16()
            )
            tensors[name.format("B")] = torch.empty(outputs, rank).normal_(0, 0.01, generator=generator).bfloat16()
    save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
    names = sorted(module.split(".")[1] for module in linears)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": names}
    (partial / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    partial.rename(folder)
    return folder


def measure(folder: Path, threads: int) -> dict[str, float]:
    """One run of the command."""
    sys.path.insert(0, str(Path(__file__).parent / "arms"))
    from common import others

    command = [sys.executable, "-m", "lamina", "explain", str(folder), "--json"]
    before, began = others(), time.perf_counter()
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL)
    status, used, peak = machine.watched(child)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit("lamina explain failed")
    own = used.ru_utime + used.ru_stime
    busy = max(0.0, others() - before - own) / seconds / machine.cores()
    return {
        "seconds": seconds,
        "cpu_seconds": own,
        "peak_mib": peak / 2**20,
        "others": busy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small adapter: tries the benchmark, writes nothing")
    parser.add_argument("--rounds", type=int, default=2, help="the least processor time of so many counts")
    options = parser.parse_args()
    shape, rank = (TINY, 8) if options.tiny else (LLAMA_2_7B, RANK)
    folder = write(machine.ROOT / "build" / "explain", shape, rank)
    rows = []
    for threads in sorted({1, machine.cores()}):
        found = min((measure(folder, threads) for _ in range(options.rounds)), key=lambda row: row["cpu_seconds"])
        rows.append({"what": f"{shape.layers} layers of width {shape.width}, rank {rank}", "threads": threads, **found})
        print(
            f"{threads} threads: {found['seconds']:.1f} s, {found['cpu_seconds']:.1f} s of processor time, "
            f"peak {found['peak_mib']:.0f} MiB, others {found['others']:.0%}",
            flush=True,
        )
    if not options.tiny:
        rows = [{key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
        results.append(RESULTS, [results.origin("torch") | row for row in rows], FIELDS)


if __name__ == "__main__":
    main()
