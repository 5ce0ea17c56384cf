"""One run: starts the arms' processes in turn, and keeps their reports as they come, so that a run that was cut off goes on."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environments
import machine
import results
import rows as texts
import workload
from catalogue import REFERENCE, Arm, Extent
from gates import faults

HERE = Path(__file__).parent
BUILD = machine.ROOT / "build"
RATE, CLIP = 2e-4, 1.0
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Failed(RuntimeError):
    """An arm's process that ended with an error; the message is the end of its log."""


class Bench:
    """Arms over one model, in a folder of its own under ``build/bench/runs``."""

    def __init__(self, files: workload.Files, run: str, device: str = "cpu") -> None:
        self.files, self.device, self.folder = files, device, BUILD / "bench" / "runs" / run
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reports: results.Reports = {}
        self.pythons: dict[str, Path | None] = {"": Path(sys.executable)}

    def able(self, arms: list[Arm]) -> list[Arm]:
        """The arms whose environments are there, or can be made."""
        for name in dict.fromkeys(arm.environment for arm in arms):
            if name not in self.pythons:
                self.pythons[name] = environments.python(name, BUILD)
        return [arm for arm in arms if self.pythons[arm.environment]]

    def process(self, arm: Arm, key: str, **job: Any) -> dict[str, Any]:
        """Runs one process of an arm and returns its report; one that an earlier call has kept under the key is read.

        Raises:
            Failed: it ended with an error.
        """
        kept = self.folder / f"{arm.name}-{arm.workload}-{key}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        paths = {name: kept.with_suffix(f".{name}") for name in ("job", "result", "log")}
        common = {"model": str(self.files.model), "adapter": str(self.files.adapter), "settings": arm.settings}
        common |= {"batch": texts.BATCH[arm.workload], "threads": machine.cores(), "learning_rate": RATE, "clip": CLIP}
        common |= {"rows": str(self.files.rows(arm.workload)), "first": 0, "device": self.device, "precision": "bf16"}
        common |= {"result": str(paths["result"]), "spawned": time.time()}
        paths["job"].write_text(json.dumps(common | job))
        command = [self.pythons[arm.environment], HERE / "arms" / f"{arm.program}.py", paths["job"]]
        setting = os.environ | QUIET | {"OMP_NUM_THREADS": str(machine.cores())}
        with paths["log"].open("w") as log:
            done = subprocess.run(command, env=setting, stdout=log, stderr=log, check=False)
        if done.returncode:
            lines = paths["log"].read_text(errors="replace").splitlines()
            raise Failed(f"{arm.label}: ended with status {done.returncode}: {' / '.join(lines[-3:])}")
        report = json.loads(paths["result"].read_text())
        kept.write_text(json.dumps(report))
        return report

    def gate(self, arms: list[Arm], precision: str = "fp32") -> dict[Arm, list[str]]:
        """What keeps each arm's row from being written: two fp32 steps of two rows each, whole and answers only."""
        print(f"gates: two steps of two rows in {precision}, beside {REFERENCE}", flush=True)
        distinct = {(arm.program, str(arm.settings)): arm for arm in arms if not arm.bound}
        reports, found = {}, {}
        for key, arm in distinct.items():
            gradients = self.folder / f"{arm.name}-gate.safetensors"
            job = {
                "rows": str(self.files.rows("gate")),
                "batch": 2,
                "warmup": 0,
                "steps": 2,
                "gradients": str(gradients),
            }
            settings = arm.settings | ({"micro": min(2, arm.settings["micro"])} if "micro" in arm.settings else {})
            try:
                report = self.process(arm, f"gate-{precision}", **job, precision=precision, settings=settings)
            except Failed as failed:
                print(f"  {failed}", flush=True)
                found[key] = ["alive: its process fails"]
            else:
                reports[key] = report | {"gradients": gradients}
        references = {
            arm.base: reports[key] for key, arm in distinct.items() if arm.tool == REFERENCE and key in reports
        }
        for key, report in reports.items():
            arm = distinct[key]
            # int8 rounds the activations, in bitsandbytes in another way: only the first step's loss can be near, and is not asked.
            exact = not arm.own_weights and arm.base != "int8"
            reference = references.get(arm.base, references["bf16"])
            found[key] = faults(arm.name, report, reference, exact, approximate=arm.base == "int8" or arm.own_weights)
            print(f"  {arm.name}: {'; '.join(found[key]) or 'passed'}", flush=True)
        return {arm: found[arm.program, str(arm.settings)] for arm in arms if not arm.bound}

    def rounds(self, arms: list[Arm], extent: Extent) -> None:
        """The arms in turn, round after round; every round goes on with the next rows."""
        for round_ in range(extent.rounds):
            for arm in arms:
                warmup, steps = extent.of(arm, round_)
                if not steps:
                    continue
                first = round_ * extent.steps * texts.BATCH[arm.workload]
                profile = not arm.bound and round_ == 0
                try:
                    report = self.process(arm, f"{round_}", first=first, warmup=warmup, steps=steps, profile=profile)
                except Failed as failed:
                    print(failed, flush=True)
                    continue
                report |= {"counted": report["steps"][warmup:], "round": round_, "warmup": warmup}
                report["miscounted"] = miscounted(
                    report, texts.counts(self.files.rows(arm.workload), first, arm.workload)
                )
                self.reports.setdefault(arm, []).append(report)
                numbers = f"{results.speed(report):7.1f} tok/s  {report['peak'] / 2**30:5.2f} GiB"
                print(
                    f"round {round_ + 1}  {arm.label:28} {numbers}  others {results.noise(report):4.0%} of the cores",
                    flush=True,
                )

    def to_a_loss(self, arms: list[Arm], extent: Extent) -> None:
        """Seconds from the start of an arm's process to a held-out loss: halfway between the reference's after its last two steps.

        All arms train the same, so all get there in the same step; what differs is how long they take to start and to compute.
        """
        racers = [arm for arm in arms if arm.workload == "whole" and not arm.bound and arm in self.reports]
        reference = next((arm for arm in racers if arm.name == REFERENCE), None)
        if reference is None:
            return
        held = {"held_out": str(self.files.rows("held_out")), "warmup": 0}
        losses = self.process(reference, "reference", **held, steps=extent.loss_steps)["held_out"]
        until = sum(losses[-2:]) / 2
        print(f"held-out loss to reach: {until:.4f} (the reference's: {' '.join(f'{loss:.4f}' for loss in losses)})")
        for round_ in range(extent.loss_rounds):
            for arm in racers:
                if round_ >= len(self.reports[arm]):
                    continue
                job = held | {"steps": 2 * extent.loss_steps, "until": until}
                report = self.process(arm, f"to-loss-{round_}", **job)
                reached = report["held_out"][-1] <= until
                seconds = report["steps"][-1]["since_start"] if reached else None
                self.reports[arm][round_] |= {"seconds_to_loss": seconds, "until": until}
                told = f"{seconds:6.1f} s" if reached else "not reached"
                print(f"to the loss  {arm.label:28} {told}, {len(report['steps'])} steps", flush=True)


def miscounted(report: dict[str, Any], expected: Iterator[tuple[int, int]]) -> str:
    """The first step whose (real, supervised) tokens are not those of its rows."""
    for number, (step, rows) in enumerate(zip(report["steps"], expected, strict=False), 1):
        if (step["tokens"], step["supervised"]) != rows:
            return f"counts: step {number} had {step['tokens']} tokens, {step['supervised']} of them targets, its rows have {rows}"
    return ""
