"""Speed and memory of Lamina beside other tools, in one run: ``make bench``, ``make bench QUICK=1``.

Every arm trains the same rows in the same steps from the same adapter, in a process of its own, and the arms take turns:
A B C A B C ... What a machine does meanwhile then falls on all of them, and ratios within a run mean something where
absolute times do not. An arm's row is written only if its gates (gates.py) pass.
"""

import argparse
import sys
from dataclasses import asdict

import catalogue
import machine
import results
import workload
from bench import BUILD, Bench

NOISE = results.NOISE


def compare(options: argparse.Namespace) -> None:
    """Runs gates and rounds, prints the table, appends the rows."""
    extent = catalogue.SMOKE if options.tiny else catalogue.QUICK if options.quick else catalogue.FULL
    arms = catalogue.chosen(options.only, options.workload, options.quick)
    if catalogue.REFERENCE not in {arm.name for arm in arms} and not options.no_gates:
        sys.exit(
            f"--only {options.only}: the gates compare with {catalogue.REFERENCE}; name it too, or give --no-gates"
        )
    name = "tiny" if options.tiny else options.model
    device = "cuda" if name in workload.ON_GPU else "cpu"
    refuse_without_gpu(name)
    files = workload.prepare(BUILD / "bench", workload.MODELS[name])
    if files.about.startswith("random"):
        print("guanaco-llama2-1k, gsm8k and the Llama-2 tokenizer are not in ../shared/data: rows are random tokens")
    date, commit, run = results.stamp()
    if options.resume:
        run, commit = options.resume, options.resume.partition("-")[2]
    bench = Bench(files, run, device)
    arms = bench.able(arms)
    print(f"run {run}, to go on with if it is cut off: --resume {run}\nrounds: {asdict(extent)}", flush=True)
    found = {} if options.no_gates else bench.gate(arms)
    bench.rounds(arms, extent)
    bench.to_a_loss(arms, extent)
    fixed = {"date": date, "commit": commit, "run": run}
    rows = results.rows_of(bench.reports, found, files.name, fixed)
    results.show(rows)
    if options.tiny or options.no_gates:
        print("\nnothing is written: a tiny model, or no gates")
    else:
        results.append(results.FOLDER / f"{'gpu' if device == 'cuda' else 'cpu'}.csv", rows, results.FIELDS)


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
    parser.add_argument("--no-gates", action="store_true", help="skip the gates; nothing is written then")
    options = parser.parse_args()
    options.workload = options.workload or ("whole" if options.quick else "whole,answers")
    if options.mode == "profile":
        import step_profile

        step_profile.main(workload.prepare(BUILD / "bench", workload.MODELS["tiny" if options.tiny else options.model]))
    elif options.mode == "gates":
        import proof

        proof.main(options.tiny)
    else:
        print(machine.machine(), flush=True)
        compare(options)


if __name__ == "__main__":
    main()
