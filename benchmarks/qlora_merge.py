"""A merge of Llama-2-7B's size, as a user does it: by the command line, after a run over the base in NF4.

The base is random, so the run's few steps are there to have an adapter and held-out rows. Each policy merges into a folder that is
removed again. Memory is the peak of the process, less that of a process which merges a tiny model; it should be a few tensors.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint
from machine import watched
from workload import DATA, Shape

POLICIES = ("original", "dequantised", "requantised")
RUN = "--base nf4 --rank 16 --steps 3 --batch-size 1 --max-length 64 --eval-fraction 0.003 --neutral none".split()
RUN += "--samples 0 --eval-samples 0 --ledger-every 0 --eval-every 3".split()


def rows_of(build: Path, shape: Shape, tiny: Shape, threads: int) -> Iterator[dict[str, Any]]:
    """A row for the run, and one for each policy: seconds, peak, what the merge's own record says."""
    if not (DATA / "llama2-tokenizer").is_dir():
        sys.exit(f"merge: found no llama2-tokenizer in {DATA}, expected Llama-2's own: a merge is compared on text")
    small = Merges(build / "qlora" / "merge-small", checkpoint.write(build / "qlora", tiny), threads)
    small.train()
    least = {policy: small.merge(policy)["peak"] for policy in POLICIES}
    small.remove()
    large = Merges(build / "qlora" / "merge", checkpoint.write(build / "qlora", shape), threads)
    seconds, peak = large.train()
    card = json.loads((large.run / "card.json").read_text())
    planned, measured = card["memory"]["planned"]["total_bytes"], card["memory"]["measured_bytes"]
    note = f"the whole command, {peak / 2**30:.2f} GiB with its libraries"
    yield {"what": "run of 3 steps", "base": "nf4", "seconds": seconds, "note": note} | {
        "predicted_bytes": planned,
        "measured_bytes": measured,
        "ratio": measured / planned,
    }
    for policy in POLICIES:
        found = large.merge(policy)
        yield {
            "what": f"merge, {policy}",
            "base": "nf4",
            "seconds": found["seconds"],
            "measured_bytes": max(0, found["peak"] - least[policy]),
            "note": found["note"],
        }
    large.remove()


class Merges:
    """A run in a folder of its own, and what its merges take."""

    def __init__(self, place: Path, base: Path, threads: int) -> None:
        self.place, self.base, self.run = place, base, place / "run"
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for file in (DATA / "llama2-tokenizer").glob("*token*"):
            shutil.copyfile(file, base / file.name)

    def train(self) -> tuple[float, int]:
        """Seconds and peak of the run."""
        data = str(DATA / "guanaco-llama2-1k")
        return self._timed("train", "--model", str(self.base), "--data", data, *RUN, "--out", str(self.run))

    def merge(self, policy: str) -> dict[str, Any]:
        """Seconds and peak of a merge, and what its record says."""
        out = self.place / "merged"
        seconds, peak = self._timed("merge", str(self.run), "--policy", policy, "--out", str(out))
        record = json.loads((out / "lamina_merge.json").read_text())
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        after = record["difference"]
        told = f"{size / 1e9:.2f} GB written; {record['survived']:.1%} of the update survived; KL {after['kl']:.1e}, "
        told += f"same token {after['agreement']:.1%} of {after['tokens']}"
        return {"seconds": seconds, "peak": peak, "note": told}

    def remove(self) -> None:
        """Takes the run away."""
        shutil.rmtree(self.place)

    def _timed(self, *arguments: str) -> tuple[float, int]:
        began = time.perf_counter()
        command = [sys.executable, "-m", "lamina", *arguments]
        child = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL)
        status, _, peak = watched(child)
        if status:
            sys.exit(f"merge: `lamina {arguments[0]}` ended with status {status}")
        return time.perf_counter() - began, peak
