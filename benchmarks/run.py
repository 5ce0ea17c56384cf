"""Speed and memory of Lamina beside other tools, in one run: ``make bench``, ``make bench QUICK=1``.

Every arm trains the same rows in the same steps from the same adapter, in a process of its own, and the arms take turns:
A B C A B C ... What a machine does meanwhile then falls on all of them, and ratios within a run mean something where
absolute times do not. After the first round only each tool's fastest form goes on. An arm's row is written only if its gates
(gates.py) pass.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import catalogue
import machine
import results
import rows
import workload
from bench import BUILD, Bench

NOISE = results.NOISE
AT_ONCE = 6
"""Gates at one time on a GPU."""


def compare(options: argparse.Namespace) -> None:
    """Runs gates and rounds, prints the table, appends the rows."""
    name = "tiny" if options.tiny else options.model
    large = name in workload.ON_GPU or options.as_on_gpu
    extent = catalogue.SMOKE if options.tiny else catalogue.QUICK if options.quick else catalogue.FULL
    if large and not options.tiny:
        extent = catalogue.GPU
    if options.rounds:
        extent = replace(extent, rounds=options.rounds)
    every = catalogue.ON_GPU if large else catalogue.ARMS
    arms = catalogue.chosen(options.only, options.workload, options.quick, every)
    if catalogue.REFERENCE not in {arm.name for arm in arms} and not options.no_gates:
        sys.exit(
            f"--only {options.only}: the gates compare with {catalogue.REFERENCE}; name it too, or give --no-gates"
        )
    device = "cuda" if name in workload.ON_GPU else "cpu"
    until = time.time() + 60 * options.minutes if options.minutes else None
    date, commit, run = results.stamp()
    if options.resume:
        run, now, commit = options.resume, commit, options.resume.partition("-")[2]
        if now != commit:
            sys.exit(f"--resume {run}: found the sources of {now}, expected those that it was begun with, {commit}")
    how = {"device": device, "larger": rows.LARGER if large else 1, "sites": options.sites, "until": until}
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn")
    ) as apart:  # the GPU's memory goes back with the process
        ask = partial(apart.submit, workload.prepare, BUILD / "bench")
        on = workload.GATES if device == "cuda" else name
        beside = ask(workload.MODELS[on]).result()
        wanted = ask(workload.MODELS[name])  # written while the gates are asked
        bench = Bench(beside, run, **how)
        arms = bench.able(arms)
        print(f"run {run}, to go on with if it is cut off: --resume {run}\nrounds: {asdict(extent)}", flush=True)
        found = {} if options.no_gates else bench.gate(arms, at_once=AT_ONCE if device == "cuda" else 1)
        bench.files = files = wanted.result()
    if files.about.startswith("random"):
        print("guanaco-llama2-1k, gsm8k and the Llama-2 tokenizer are not in ../shared/data: rows are random tokens")
    bench.to_a_loss(bench.rounds(arms, extent, all_on=bool(options.only)), extent)
    if not bench.reports:
        sys.exit("nothing was measured")
    fixed = {"date": date, "commit": commit, "run": run, "machine": machine.machine(device)}
    made = results.rows_of(bench.reports, found, fixed)
    results.show(made)
    if options.tiny or options.no_gates:
        print("\nnothing is written: a tiny model, or no gates")
    else:
        results.append(results.FOLDER / f"{'gpu' if device == 'cuda' else 'cpu'}.csv", made, results.FIELDS)


def refuse_without_gpu(name: str) -> None:
    """Ends the program where a model is meant for a GPU and there is none."""
    if name in workload.ON_GPU:
        import torch

        if not torch.cuda.is_available():
            sys.exit(
                f"--model {name}: found no CUDA device, expected one with room for its weights; on a CPU: 15m, 134m, 1.1b"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=("compare", "profile", "gates"), default="compare")
    parser.add_argument("--quick", action="store_true", help="fewer arms, rounds and steps, at most ten minutes")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries the benchmark itself, writes nothing")
    parser.add_argument("--model", choices=workload.MODELS, default="134m", help="7b and above need a GPU")
    parser.add_argument("--workload", help="whole, answers, templated, dense, long, with commas between, or all")
    parser.add_argument("--only", help="arms to run, by name, with commas between")
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with a run that was cut off; its name is printed at the start"
    )
    parser.add_argument("--rounds", type=int, help="fewer rounds, or more, than a run of this kind has")
    parser.add_argument(
        "--minutes", type=float, help="start no measurement later than this; what was measured until then is written"
    )
    parser.add_argument(
        "--sites", type=Path, metavar="FOLDER", help="make no environments: peers' packages lie in FOLDER/NAME"
    )
    parser.add_argument(
        "--as-on-gpu", action="store_true", help="the arms and rows of a GPU on this device, to try them"
    )
    parser.add_argument("--base", default="bf16", help="of a profile: bf16, int8, fp8, nf4, with commas between")
    parser.add_argument("--no-gates", action="store_true", help="skip the gates; nothing is written then")
    options = parser.parse_args()
    options.workload = options.workload or ("whole" if options.quick else "all")
    if options.mode == "profile":
        name = "tiny" if options.tiny else options.model
        refuse_without_gpu(name)
        if name in workload.ON_GPU:
            import gpu_profile

            gpu_profile.main(rows.write(BUILD / "bench" / "rows"), workload.MODELS[name], options.base.split(","))
        else:
            import step_profile

            step_profile.main(workload.prepare(BUILD / "bench", workload.MODELS[name]))
    elif options.mode == "gates":
        import proof

        proof.main(options.tiny)
    else:
        name = "tiny" if options.tiny else options.model
        refuse_without_gpu(name)
        print(machine.machine("cuda" if name in workload.ON_GPU else "cpu"), flush=True)
        compare(options)


if __name__ == "__main__":
    main()
