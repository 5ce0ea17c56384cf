"""One run: starts the arms' processes in turn, and keeps their reports as they come, so that a run that was cut off goes on."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
BEHIND = 0.95
"""A form of a tool that in the first round is slower than this share of the tool's fastest takes no part in the others."""
ROUNDED = ("int8", "fp8")
"""Bases whose products round the activations too."""
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Failed(RuntimeError):
    """An arm's process that ended with an error; the message is the end of its log."""


class Bench:
    """Arms over one model, in a folder of its own under ``build/bench/runs``.

    Args:
        larger: so many times the usual rows a step.
        sites: folders of the arms' packages, where no environments are to be made.
        until: the moment, in Unix time, from which on nothing more is measured.
    """

    def __init__(
        self,
        files: workload.Files,
        run: str,
        device: str = "cpu",
        larger: int = 1,
        sites: Path | None = None,
        until: float | None = None,
    ) -> None:
        self.files, self.device, self.folder = files, device, BUILD / "bench" / "runs" / run
        self.larger, self.sites, self.until = larger, sites, until
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reports: results.Reports = {}
        self.pythons: dict[str, Path | None] = {"": Path(sys.executable)}

    def able(self, arms: list[Arm]) -> list[Arm]:
        """The arms whose environments are there, or can be made."""
        for name in dict.fromkeys(arm.environment for arm in arms):
            if self.sites:
                self.pythons[name] = self.pythons[""]
            elif name not in self.pythons:
                self.pythons[name] = environments.python(name, BUILD)
        return [arm for arm in arms if self.pythons[arm.environment]]

    def over(self) -> bool:
        """Whether the time is up."""
        return self.until is not None and time.time() > self.until

    def batch(self, workload: str) -> int:
        """Rows of a step."""
        return texts.BATCH[workload] * self.larger

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
        common |= {"batch": self.batch(arm.workload), "threads": machine.cores(), "learning_rate": RATE, "clip": CLIP}
        common |= {"rows": str(self.files.rows(arm.workload)), "first": 0, "device": self.device, "precision": "bf16"}
        common |= {"result": str(paths["result"]), "spawned": time.time()}
        paths["job"].write_text(json.dumps(common | job))
        command = [self.pythons[arm.environment], HERE / "arms" / f"{arm.program}.py", paths["job"]]
        setting = os.environ | QUIET | {"OMP_NUM_THREADS": str(machine.cores())}
        if self.sites:
            setting["PYTHONPATH"] = environments.beside(self.sites, arm.environment)
        with paths["log"].open("w") as log:
            done = subprocess.run(command, env=setting, stdout=log, stderr=log, check=False)
        if done.returncode:
            lines = paths["log"].read_text(errors="replace").splitlines()
            raise Failed(f"{arm.label}: ended with status {done.returncode}: {' / '.join(lines[-3:])}")
        report = json.loads(paths["result"].read_text())
        kept.write_text(json.dumps(report))
        return report

    def gate(self, arms: list[Arm], precision: str = "fp32", at_once: int = 1) -> dict[Arm, list[str]]:
        """What keeps each arm's row from being written: two fp32 steps of two rows each, whole and answers only.

        Args:
            at_once: so many arms' processes at one time; nothing is timed here.
        """
        print(f"gates: two steps of two rows of {self.files.name} in {precision}, beside {REFERENCE}", flush=True)
        distinct = {_alike(arm): arm for arm in arms if not arm.bound}
        with ThreadPoolExecutor(at_once) as pool:
            runs = {key: pool.submit(self._gated, arm, precision) for key, arm in distinct.items()}
        reports, found = {}, {}
        for key, run in runs.items():
            try:
                reports[key] = run.result()
            except Failed as failed:
                print(f"  {failed}", flush=True)
                found[key] = ["alive: its process fails"]
        references = {
            arm.base: reports[key] for key, arm in distinct.items() if arm.tool == REFERENCE and key in reports
        }
        for key, report in reports.items():
            arm = distinct[key]
            reference = references.get(arm.base) or references.get("bf16")
            if reference is None:
                found[key] = [f"fp32: no gate of {REFERENCE} to compare with"]
                continue
            # int8 rounds the activations, in bitsandbytes in another way: only the first step's loss can be near, and is not asked.
            rounded = arm.base in ROUNDED
            found[key] = faults(
                arm.name, report, reference, not (arm.own_weights or rounded), approximate=rounded or arm.own_weights
            )
            print(f"  {arm.name}: {'; '.join(found[key]) or 'passed'}", flush=True)
        return {arm: found[_alike(arm)] for arm in arms if not arm.bound}

    def _gated(self, arm: Arm, precision: str) -> dict[str, Any]:
        """The report of an arm's two steps, with the file of its gradients."""
        gradients = self.folder / f"{arm.name}-{arm.workload}-gate.safetensors"
        job = {"rows": str(self.files.rows("gate")), "batch": 2, "warmup": 0, "steps": 2, "gradients": str(gradients)}
        report = self.process(arm, f"gate-{precision}", **job, precision=precision, settings=_of_two_rows(arm))
        return report | {"gradients": gradients}

    def rounds(self, arms: list[Arm], extent: Extent, all_on: bool = False) -> list[Arm]:
        """The arms in turn, round after round; every round goes on with the next rows, after the first only with each tool's fastest
        forms, or with all (``all_on``). Returns those that went on."""
        on = arms
        for round_ in range(extent.rounds):
            for arm in on:
                warmup, steps = extent.of(arm, round_)
                if not steps:
                    continue
                if self.over():
                    print(f"round {round_ + 1}  {arm.label:28} left out: the time is up", flush=True)
                    continue
                batch, rows = self.batch(arm.workload), self.files.rows(arm.workload)
                first = round_ * extent.steps * batch
                profile = not arm.bound and round_ == 0 and not (arm.slow and self.device == "cuda")
                try:
                    report = self.process(arm, f"{round_}", first=first, warmup=warmup, steps=steps, profile=profile)
                except Failed as failed:
                    print(failed, flush=True)
                    continue
                about = f"{texts.about(arm.workload, self.files.folder)}, {texts.rows_a_step(batch)}, {arm.workload}"
                report |= {"counted": report["steps"][warmup:], "round": round_, "warmup": warmup}
                report |= {"workload": f"{self.files.name}, {about}"}
                report["miscounted"] = miscounted(report, texts.counts(rows, first, batch))
                self.reports.setdefault(arm, []).append(report)
                numbers = f"{results.speed(report):7.1f} tok/s  {report['peak'] / 2**30:5.2f} GiB"
                print(
                    f"round {round_ + 1}  {arm.label:28} {numbers}  others {results.noise(report):4.0%} of the cores",
                    flush=True,
                )
            if not round_ and not all_on:
                on = self._fastest()
        return on

    def _fastest(self) -> list[Arm]:
        """Of each tool, on each workload and over each form of the base, the form that was fastest in the first round, and any near it."""
        speeds = {arm: results.speed(reports[0]) for arm, reports in self.reports.items()}
        best: dict[tuple[str, ...], float] = {}
        for arm, speed in speeds.items():
            best[arm.contest] = max(speed, best.get(arm.contest, 0.0))
        return [arm for arm, speed in speeds.items() if speed >= BEHIND * best[arm.contest]]

    def to_a_loss(self, arms: list[Arm], extent: Extent) -> None:
        """Seconds from the start of an arm's process to a held-out loss: halfway between the reference's after its last two steps.

        All arms train the same, so all that race get there in the same step; what differs is how long they take to start and to
        compute. Slow arms do not race.

        Args:
            arms: those that race, if they were measured.
        """
        racers = [
            arm for arm in arms if arm in self.reports and arm.workload == "whole" and not (arm.bound or arm.slow)
        ]
        reference = next((arm for arm in self.reports if arm.name == REFERENCE and arm.workload == "whole"), None)
        if reference is None or not extent.loss_rounds or self.over():
            return
        held = {"held_out": str(self.files.rows("held_out")), "warmup": 0}
        losses = self.process(reference, "reference", **held, steps=extent.loss_steps)["held_out"]
        until = sum(losses[-2:]) / 2
        print(f"held-out loss to reach: {until:.4f} (the reference's: {' '.join(f'{loss:.4f}' for loss in losses)})")
        for round_ in range(extent.loss_rounds):
            for arm in racers:
                if round_ >= len(self.reports[arm]) or self.over():
                    continue
                job = held | {"steps": 2 * extent.loss_steps, "until": until}
                report = self.process(arm, f"to-loss-{round_}", **job)
                reached = report["held_out"][-1] <= until
                seconds = report["steps"][-1]["since_start"] if reached else None
                self.reports[arm][round_] |= {"seconds_to_loss": seconds, "until": until}
                told = f"{seconds:6.1f} s" if reached else "not reached"
                print(f"to the loss  {arm.label:28} {told}, {len(report['steps'])} steps", flush=True)


def _of_two_rows(arm: Arm) -> dict[str, Any]:
    """An arm's settings where a step has two rows."""
    return arm.settings | ({"micro": min(2, arm.settings["micro"])} if "micro" in arm.settings else {})


def _alike(arm: Arm) -> tuple[str, str]:
    """What arms have in common that have one gate."""
    return arm.program, str(_of_two_rows(arm))


def miscounted(report: dict[str, Any], expected: Iterator[tuple[int, int]]) -> str:
    """The first step whose (real, supervised) tokens are not those of its rows."""
    for number, (step, rows) in enumerate(zip(report["steps"], expected, strict=False), 1):
        if (step["tokens"], step["supervised"]) != rows:
            return f"counts: step {number} had {step['tokens']} tokens, {step['supervised']} of them targets, its rows have {rows}"
    return ""
