"""The rows that are trained, as token ids with their targets: real texts where they are at hand, random ones of like lengths where not.

| workload | rows | targets | rows a step |
|---|---|---|---|
| ``whole`` | guanaco-llama2-1k, cut at 512 tokens | every token | 4 |
| ``answers`` | the same | the answers | 4 |
| ``templated`` | GSM8K behind Alpaca's template, the rows of at most 160 tokens: short, all beginning alike | the answers | 16 |
| ``dense`` | guanaco's tokens, one text after another, in rows of 512: no padding for anyone | every token | 4 |
| ``long`` | the same in one row of 2,048 | every token | 1 |

``gate`` holds two whole rows and two with targets in the answers only, for the gates' two steps of two rows; ``held_out`` eight whole rows
that no workload trains on.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
ROWS, LONGEST, SHORT, LONG, IGNORED, SEED, VERSION = 256, 512, 160, 2048, -100, 1, 4
HELD_OUT = 8
BATCH = {"whole": 4, "answers": 4, "templated": 16, "dense": 4, "long": 1}
"""Rows an optimiser step, by workload; a large model's step has ``LARGER`` times as many, or it would not fill a GPU."""
LARGER = 8
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:\n"
)

Row = tuple[np.ndarray, np.ndarray]  # tokens, and which of them are targets


def real() -> bool:
    """Whether the real texts and the tokenizer are at hand."""
    return all((DATA / name).is_dir() for name in ("guanaco-llama2-1k", "llama2-tokenizer", "gsm8k"))


def made_of_real(folder: Path) -> bool:
    """Whether the files in ``folder`` were made from the real texts, which need not be at hand any more."""
    stamp = folder / "made.json"
    return stamp.exists() and bool(json.loads(stamp.read_text(encoding="utf-8"))["real"])


def about(workload: str, folder: Path) -> str:
    """Which rows the files in ``folder`` hold, in words."""
    texts = {
        "templated": f"{ROWS} rows of gsm8k in a template, at most {SHORT} tokens",
        "dense": f"guanaco-llama2-1k in rows of {LONGEST}",
        "long": f"guanaco-llama2-1k in rows of {LONG}",
    }
    text = texts.get(workload, f"guanaco-llama2-1k[:{ROWS}] cut at {LONGEST}")
    return text if made_of_real(folder) else f"random tokens in the place of {text}"


def rows_a_step(rows: int) -> str:
    """How many rows a step has, in words."""
    return f"{rows} row{'s' if rows > 1 else ''} a step"


def write(folder: Path) -> Path:
    """Writes all files of rows, once; files of the real texts are kept where the texts are not at hand."""
    stamp, expected = folder / "made.json", {"real": real() or made_of_real(folder), "version": VERSION}
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == expected:
        return folder
    expected["real"] = real()
    folder.mkdir(parents=True, exist_ok=True)
    chat, short = (_chat(), _templated()) if real() else (_random(377, LONGEST, 0.3), _random(140, SHORT, 0.5))
    rows = list(itertools.islice(chat, ROWS + 64 + HELD_OUT))
    held, rows = rows[-HELD_OUT:], rows[:-HELD_OUT]
    whole = [_row(tokens, np.arange(len(tokens)) > 0) for tokens, _ in rows]
    answers = [_row(*row) for row in rows if row[1].any()]  # some answers lie beyond the cut
    files = {
        "whole": whole[:ROWS],
        "answers": answers[:ROWS],
        "templated": [_row(*row) for row in itertools.islice(short, ROWS)],
        "dense": dense(LONGEST, 128),
        "long": dense(LONG, 32),
        "gate": [whole[0], answers[1], whole[2], answers[3]],
        "held_out": [_row(tokens, np.arange(len(tokens)) > 0) for tokens, _ in held],
    }
    for name, chosen in files.items():
        write_rows(folder / f"{name}.jsonl", chosen)
    stamp.write_text(json.dumps(expected), encoding="utf-8")
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def counts(path: Path, first: int, batch: int) -> Iterator[tuple[int, int]]:
    """Tokens and targets of each step's rows, ``batch`` of them, from the row ``first``; without end."""
    with path.open(encoding="utf-8") as lines:
        known = [
            (len(row["input_ids"]), sum(x != IGNORED for x in row["labels"][1:])) for row in map(json.loads, lines)
        ]
    for start in itertools.count(first, batch):
        step = [known[index % len(known)] for index in range(start, start + batch)]
        yield sum(tokens for tokens, _ in step), sum(targets for _, targets in step)


def dense(length: int, count: int) -> list[dict[str, Any]]:
    """Rows of one length, all targets: texts one after another, again from the first where they end."""
    texts = _chat(cut=None) if real() else _random(377, LONGEST, 0.3)
    tokens = np.concatenate([tokens for tokens, _ in texts])
    tokens = np.resize(tokens, length * count).reshape(count, length)
    return [_row(row, np.arange(length) > 0) for row in tokens]


def _row(tokens: np.ndarray, trained: np.ndarray) -> dict[str, Any]:
    return {"input_ids": tokens.tolist(), "labels": np.where(trained, tokens, IGNORED).tolist()}


def _chat(cut: int | None = LONGEST) -> Iterator[Row]:
    from lamina import load_tokenizer, read_examples, render

    tokenizer = load_tokenizer(DATA / "llama2-tokenizer")
    for example in read_examples(DATA / "guanaco-llama2-1k"):
        row = render(example, tokenizer)
        yield row.tokens[:cut], row.trained[:cut]


def _templated() -> Iterator[Row]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DATA / "llama2-tokenizer" / "tokenizer.json"))
    with (DATA / "gsm8k" / "train.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            example = json.loads(line)
            prompt = tokenizer.encode(TEMPLATE.format(question=example["question"])).ids
            answer = [*tokenizer.encode(example["answer"], add_special_tokens=False).ids, 2]
            tokens = np.array(prompt + answer, np.int32)
            if len(tokens) <= SHORT:
                yield tokens, np.arange(len(tokens)) >= len(prompt)


def _random(median: int, longest: int, prompt: float) -> Iterator[Row]:
    """Random tokens in rows of lengths like the real ones: log-normal; of guanaco's a good third are cut."""
    random = np.random.default_rng(SEED)
    for _ in range(ROWS + 64 + HELD_OUT):
        length = int(np.clip(random.lognormal(np.log(median), 0.7), 16, longest))
        tokens = random.integers(3, 32_000, length)
        yield tokens, np.arange(length) >= max(1, round(prompt * length))
