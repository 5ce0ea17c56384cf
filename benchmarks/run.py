"""Speed and memory of Lamina beside other tools, in one run: ``make bench``, ``make bench QUICK=1``.

Every arm trains the same rows in the same steps from the same adapter, in a process of its own, and the arms take turns:
A B C A B C ... What a machine does meanwhile then falls on all of them, and ratios within a run mean something where
absolute times do not. An arm's row is written only if its gates (gates.py) pass.
"""

import argparse
import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
import workload
from gates import REFERENCE, faults

HERE = Path(__file__).parent
BUILD = machine.ROOT / "build"
RESULTS = HERE / "results" / "cpu.csv"
BATCH, RATE, CLIP = 4, 2e-4, 1.0
NOISE = 0.1
"""Share of the processors that others may take while an arm is measured; the median over its rounds."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One tool with one choice of settings. ``slow`` arms run fewer steps, ``extra`` ones only in a full run."""

    name: str
    program: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: str = "whole"
    slow: bool = False
    extra: bool = False

    @property
    def base(self) -> str:
        """The form of the base; arms are compared with those of the same form."""
        return self.settings.get("base", "bf16")

    @property
    def tool(self) -> str:
        """The name without the form of the base."""
        return self.name.removesuffix(f"-{self.base}")

    @property
    def label(self) -> str:
        return self.name if self.rows == "whole" else f"{self.name}, {self.rows}"


BEST = {"adapter": "bf16", "bf16": False, "gradient_checkpointing": False}
ARMS = (
    Arm("lamina", "lamina_arm"),
    Arm("peft", "peft_loop", {"adapter": "bf16"}),
    Arm("trl-best", "trl_sft", BEST),
    Arm("trl-padding-free", "trl_sft", BEST | {"padding_free": True, "max_length": None}),
    Arm("peft-mixed", "peft_loop", {"adapter": "fp32", "autocast": True}, extra=True),
    Arm("trl-mixed", "trl_sft", {"gradient_checkpointing": False}, extra=True),
    Arm("trl-default", "trl_sft", slow=True),
    Arm("lamina", "lamina_arm", rows="answers"),
    Arm("peft", "peft_loop", {"adapter": "bf16"}, rows="answers"),
    Arm("trl-best", "trl_sft", BEST, rows="answers"),
    Arm("lamina-nf4", "lamina_arm", {"base": "nf4"}),
    Arm("peft-nf4", "peft_loop", {"adapter": "bf16", "base": "nf4"}),
    Arm("lamina-int8", "lamina_arm", {"base": "int8"}),
    Arm("peft-int8", "peft_loop", {"adapter": "bf16", "base": "int8"}, extra=True),
)


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    rounds: int
    warmup: int
    steps: int
    slow_rounds: int
    slow_steps: int
    answer_rounds: int

    def of(self, arm: Arm, round_: int) -> tuple[int, int]:
        """Warm-up and counted steps of an arm in a round; (0, 0) where it does not take part."""
        if arm.slow:
            return (1, self.slow_steps) if round_ < self.slow_rounds else (0, 0)
        if arm.rows == "answers" and round_ >= self.answer_rounds:
            return 0, 0
        return self.warmup, self.steps


FULL = Extent(rounds=5, warmup=2, steps=10, slow_rounds=3, slow_steps=3, answer_rounds=5)
QUICK = Extent(rounds=2, warmup=1, steps=4, slow_rounds=1, slow_steps=1, answer_rounds=1)
SMOKE = Extent(rounds=1, warmup=1, steps=1, slow_rounds=1, slow_steps=1, answer_rounds=1)


class Bench:
    """One run: starts the arms' processes and keeps their reports."""

    def __init__(self, files: workload.Files, python: Path, folder: Path) -> None:
        self.files, self.python, self.folder = files, python, folder
        self.reports: dict[Arm, list[dict[str, Any]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def process(self, arm: Arm, **job: Any) -> dict[str, Any]:
        """Runs one process of an arm and returns its report."""
        files = [self.folder / name for name in ("job.json", "result.json", "log.txt")]
        common = {"model": str(self.files.model), "adapter": str(self.files.adapter), "settings": arm.settings}
        common |= {"batch": BATCH, "threads": machine.cores(), "learning_rate": RATE, "clip": CLIP}
        files[0].write_text(json.dumps(common | {"result": str(files[1]), "precision": "bf16"} | job))
        program = HERE / "arms" / f"{arm.program}.py"
        python = Path(sys.executable) if arm.program == "lamina_arm" else self.python
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(machine.cores())}
        with files[2].open("w") as log:
            done = subprocess.run(
                [python, program, files[0]], env=os.environ | quiet, stdout=log, stderr=log, check=False
            )
        if done.returncode:
            last = "\n".join(files[2].read_text(errors="replace").splitlines()[-8:])
            raise SystemExit(f"{arm.label}: ended with status {done.returncode}:\n{last}")
        return json.loads(files[1].read_text())

    def gate(self, arms: list[Arm]) -> dict[Arm, list[str]]:
        """What keeps each arm's row from being written: two fp32 steps of two rows each, whole and answers only."""
        print(f"gates: two steps of two rows in fp32, beside {REFERENCE}", flush=True)
        distinct = {(arm.program, str(arm.settings)): arm for arm in arms}
        reports = {}
        for key, arm in distinct.items():
            gradients = self.folder / f"{arm.name}.safetensors"
            job = {"rows": str(self.files.gate), "first": 0, "batch": 2, "warmup": 0, "steps": 2}
            report = self.process(arm, **job, precision="fp32", gradients=str(gradients))
            reports[key] = report | {"gradients": gradients}
        references = {arm.base: reports[key] for key, arm in distinct.items() if arm.tool == REFERENCE}
        found = {}
        for key, arm in distinct.items():
            # int8 rounds the activations, in bitsandbytes in another way: only the first step's loss can be near, and is not asked.
            exact = arm.program != "peft_loop" and arm.base != "int8"
            reference = references.get(arm.base, references["bf16"])
            found[key] = faults(arm.name, reports[key], reference, exact, approximate=arm.base == "int8")
            print(f"  {arm.name}: {'; '.join(found[key]) or 'passed'}", flush=True)
        return {arm: found[arm.program, str(arm.settings)] for arm in arms}

    def rounds(self, arms: list[Arm], extent: Extent) -> None:
        """The arms in turn, round after round."""
        for round_ in range(extent.rounds):
            first = round_ * extent.steps * BATCH
            for arm in arms:
                warmup, steps = extent.of(arm, round_)
                if not steps:
                    continue
                rows = str(getattr(self.files, arm.rows))
                report = self.process(arm, rows=rows, first=first, warmup=warmup, steps=steps)
                report["counted"] = report["steps"][warmup:]
                report["round"] = round_
                self.reports.setdefault(arm, []).append(report)
                numbers = f"{speed(report):7.1f} tok/s  {report['peak'] / 2**30:5.2f} GiB"
                print(
                    f"round {round_ + 1}  {arm.label:24} {numbers}  others {noise(report):4.0%} of the cores",
                    flush=True,
                )


def speed(report: dict[str, Any], what: str = "tokens") -> float:
    """Tokens per second over the counted steps."""
    return sum(s[what] for s in report["counted"]) / sum(s["seconds"] for s in report["counted"])


def noise(report: dict[str, Any]) -> float:
    """The share of the processors that others took during the counted steps."""
    counted = report["counted"]
    return sum(s["others"] for s in counted) / sum(s["seconds"] for s in counted) / machine.cores()


def rows_of(bench: Bench, found: dict[Arm, list[str]], extent: Extent) -> list[dict[str, Any]]:
    """A row for each arm: medians over the rounds; the ratio is Lamina's speed by the arm's, paired by round."""
    fixed = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"), "commit": machine.commit()}
    rows = []
    for arm, reports in bench.reports.items():
        same = (arm.rows, arm.base)
        own = next((rs for a, rs in bench.reports.items() if a.tool == "lamina" and (a.rows, a.base) == same), [])
        lamina = {report["round"]: speed(report) for report in own}
        ratios = [lamina[r["round"]] / speed(r) for r in reports if r["round"] in lamina]
        rates = [speed(report) for report in reports]
        loud = max(statistics.median(map(noise, group)) for group in (reports, own) if group)
        rows.append(
            fixed
            | {
                "workload": f"{bench.files.model.parent.name}, {bench.files.about}, {BATCH} rows a step, {arm.rows}",
                "arm": arm.name,
                "settings": json.dumps(arm.settings),
                "tok_s": round(statistics.median(rates), 1),
                "tok_s_min": round(min(rates), 1),
                "tok_s_max": round(max(rates), 1),
                "supervised_tok_s": round(statistics.median(speed(r, "supervised") for r in reports), 1),
                "peak_gib": round(max(r["peak"] for r in reports) / 2**30, 2),
                "lamina_is_times_faster": round(statistics.median(ratios), 2) if ratios else "",
                "loss": round(statistics.mean(s["loss"] for r in reports for s in r["counted"]), 4),
                "rounds": len(reports),
                "warmup": extent.of(arm, 0)[0],
                "steps": extent.of(arm, 0)[1],
                "versions": " ".join(
                    f"{k} {v}"
                    for k, v in reports[0].items()
                    if k in ("torch", "transformers", "peft", "trl", "bitsandbytes")
                ),
                "machine": machine.machine(),
                "threads": reports[0]["threads"],
                "others": round(loud, 3),
                "faults": "; ".join([*found.get(arm, []), *silent(reports), *loudness(loud)]),
            }
        )
    return rows


def silent(reports: list[dict[str, Any]]) -> list[str]:
    """What the measured runs add to the gate "alive"."""
    return [f"alive: {len(r['silent'])} matrices without a gradient in bf16" for r in reports if r["silent"]][:1]


def loudness(share: float) -> list[str]:
    """The gate "quiet", of an arm and of Lamina beside it."""
    return [f"quiet: others took {share:.0%} of the processors, more than {NOISE:.0%}"] if share > NOISE else []


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    print(
        f"\n{rows[0]['machine']}\n{rows[0]['workload'].rsplit(',', 1)[0]}, commit {rows[0]['commit']}, medians of rounds\n"
    )
    print(f"{'':26}{'tok/s':>8}{'min':>8}{'max':>8}{'superv./s':>11}{'peak GiB':>10}{'Lamina is':>11}{'loss':>9}")
    for row in rows:
        ratio = f"{row['lamina_is_times_faster']} ×" if row["lamina_is_times_faster"] != "" else "–"
        name, refused = (
            f"{row['arm']}, {row['workload'].rsplit(', ', 1)[1]}",
            row["faults"] and "NOT WRITTEN: " + row["faults"],
        )
        numbers = (
            f"{row['tok_s']:8}{row['tok_s_min']:8}{row['tok_s_max']:8}{row['supervised_tok_s']:11}{row['peak_gib']:10}"
        )
        print(f"{name:26}{numbers}{ratio:>11}{row['loss']:9}  {refused}")


def append(rows: list[dict[str, Any]]) -> None:
    """Appends the rows that passed to the results."""
    passed = [{k: v for k, v in row.items() if k != "faults"} for row in rows if not row["faults"]]
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, passed[0] if passed else [])
        if new:
            writer.writeheader()
        writer.writerows(passed)
    print(f"\n{len(passed)} rows appended to {RESULTS.relative_to(machine.ROOT)}")


def compare(options: argparse.Namespace) -> None:
    """Runs gates and rounds, prints the table, appends the rows."""
    extent = SMOKE if options.tiny else QUICK if options.quick else FULL
    names = options.only.split(",") if options.only else [arm.name for arm in ARMS]
    if REFERENCE not in names and not options.no_gates:
        sys.exit(f"--only {options.only}: the gates compare with {REFERENCE}; name it too, or give --no-gates")
    short = options.quick and not options.only
    arms = [arm for arm in ARMS if arm.name in names and not (arm.extra and short)]
    files = workload.prepare(BUILD / "bench", workload.TINY if options.tiny else workload.Shape())
    if files.about.startswith("synthetic"):
        print("guanaco-llama2-1k and the Llama-2 tokenizer are not in ../shared/data: rows are synthetic")
    bench = Bench(files, machine.peers(BUILD), BUILD / "bench" / "run")
    found = {} if options.no_gates else bench.gate(arms)
    print(f"rounds: {asdict(extent)}", flush=True)
    bench.rounds(arms, extent)
    rows = rows_of(bench, found, extent)
    show(rows)
    if options.tiny or options.no_gates:
        print("\nnothing is written: a tiny model, or no gates")
    else:
        append(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=("compare", "profile"), default="compare")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps, at most ten minutes")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries the benchmark itself, writes nothing")
    parser.add_argument("--only", help="arms to run, by name, with commas between")
    parser.add_argument("--no-gates", action="store_true", help="skip the gates; nothing is written then")
    options = parser.parse_args()
    if options.mode == "profile":
        import step_profile

        step_profile.main(workload.prepare(BUILD / "bench", workload.TINY if options.tiny else workload.Shape()))
    else:
        compare(options)


if __name__ == "__main__":
    main()
