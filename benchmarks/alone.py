"""The sections of docs/benchmarks.md that measure one thing each: generation, start-up, stored forms, the plan of the memory.

Of each file the newest rows are shown: those with the date and the commit of its last one.
"""

import statistics
from collections.abc import Iterator

import results
from markdown import NONE, Row, origin, table

GIB = 2**30


def sections() -> Iterator[str]:
    for heading, name, section in (
        ("Over four and eight bits", "cpu", _forms),
        ("Generation", "generation_cpu", _generation),
        ("From the command to the first step", "startup_cpu", _startup),
        ("Llama-2-7B's shape, loaded and trained in stored forms", "qlora_cpu", _quantised),
        ("The plan beside the peak", "memory_cpu", _memory),
    ):
        yield f"## {heading}\n"
        rows = results.read(results.FOLDER / f"{name}.csv")
        yield from section(rows) if rows else [NONE]


def newest(rows: list[Row]) -> list[Row]:
    """The rows that were written together with the last one."""
    last = rows[-1]
    return [row for row in rows if (row["date"], row["commit"]) == (last["date"], last["commit"])]


def _forms(rows: list[Row]) -> Iterator[str]:
    """The newest run that has Lamina over NF4, by the fastest form of the peer."""
    runs = [row["run"] for row in rows if row["arm"] == "lamina-nf4"]
    if not runs:
        yield NONE
        return
    rows = [row for row in rows if row["run"] == runs[-1]]
    quantised = [row for row in rows if row["arm"].endswith(("nf4", "int8"))]
    yield f"{rows[0]['workload'].split(', ', 1)[1]}; the peers are transformers, PEFT and bitsandbytes. {origin(quantised)}\n"
    columns = ("arm", "tok_s", "tok_s_min", "tok_s_max", "peak_gib", "lamina_is_times_faster")
    lines = [" | ".join(row[column] or "–" for column in columns) for row in quantised]
    yield table("arm | real tok/s | lowest | highest | peak GiB | Lamina over the same form is … × as fast", lines)


def _generation(rows: list[Row]) -> Iterator[str]:
    rows = newest(rows)
    yield f"Greedy answers of {rows[0]['new_tokens']} tokens in bf16 beside transformers' `generate`, in turns. {origin(rows)}\n"
    lines = [
        f"{row['model']} | {row['case']} | {row['lamina_tok_s']} | {row['transformers_tok_s']} | {float(row['ratio']):.2f}"
        for row in rows
    ]
    yield table("model | case | Lamina, new tok/s | transformers | times as fast", lines)


def _startup(rows: list[Row]) -> Iterator[str]:
    by_threads = {row["threads"]: row for row in newest(rows)}
    chosen = [by_threads[threads] for threads in sorted(by_threads, key=int)]
    yield (
        "`lamina train` on 1,000 rows and the 15 M model, everything read before: seconds by the clock, and seconds of processor time, of "
        f"all threads, in all and by part. {origin(chosen)}\n"
    )
    parts = "imports tokenizer data plan load rehearsal evaluation".split()
    lines = [
        " | ".join([row["threads"], *(f"{float(row[name]):.1f}" for name in ("seconds", "cpu_seconds", *parts))])
        for row in chosen
    ]
    yield table(" | ".join(["threads", "seconds", "of processors", *parts]), lines)


def _quantised(rows: list[Row]) -> Iterator[str]:
    run = [row for row in rows if row["what"].startswith(("load", "train", "plain"))]
    if not run:
        yield NONE
        return
    run = newest(run)
    yield f"One row of 512 tokens a step, rank 16 on all linears; bytes above those of a process with a tiny model. {origin(run)}\n"
    lines = []
    for row in run:
        what = f"{row['what']}, {row['base']}"
        seconds, speed = (f"{float(row[name]):.1f}" if row[name] else "–" for name in ("seconds", "tokens_s"))
        measured_bytes = "" if row["what"] == "plain read" else row["measured_bytes"]  # there those of the files
        plan, measured = (
            f"{int(size) / GIB:.2f}" if size else "–" for size in (row["predicted_bytes"], measured_bytes)
        )
        lines.append(f"{what} | {seconds} | {speed} | {plan} | {measured}")
    yield table("what | seconds | tok/s | planned GiB | measured GiB", lines)


def _memory(rows: list[Row]) -> Iterator[str]:
    rows = newest(rows)
    ratios = [float(row["ratio"]) for row in rows]
    within = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    yield (
        f"{len(rows)} configurations, of which {within} measured within 10 % of their plan; the measured peak is {min(ratios):.3f} to "
        f"{max(ratios):.3f} of it, median {statistics.median(ratios):.3f}. {origin(rows)}\n"
    )
    lines = [
        f"{row['configuration'].replace('|', '/')} | {row['planned_mib']} | {row['measured_mib']} | {row['ratio']} | {row['moment']}"
        for row in rows
    ]
    yield table("configuration | planned MiB | measured MiB | ratio | the peak's moment", lines)
