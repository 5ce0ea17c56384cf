"""Runs side by side: what differs is told, what is missing is a dash, and what cannot be compared is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamina import cli, jobfile
from lamina.adapter import LoRA
from lamina.comparing import DIGITS, Cell, compare
from lamina.data.examples import DataSettings
from lamina.errors import CheckpointError, ConfigError
from lamina.job import Job
from lamina.jobfile import Head
from lamina.model.weights import ModelSettings
from lamina.understand.card import KINDS, Card, Part


def write(folder: Path, rank: int, shift: float, **changes: Any) -> Path:
    """A finished run: 50 held-out rows of 4 tokens, whose losses under the adapter are shifted."""
    folder.mkdir()
    job = Job(
        head=Head(out=str(folder), name=folder.name),
        model=ModelSettings(model="base"),
        data=DataSettings(data="rows.jsonl"),
        adapter=LoRA(rank=rank),
    )
    (folder / "job.toml").write_text(jobfile.dump(job.sections()), encoding="utf-8")
    random = np.random.default_rng(0)
    base = np.stack([random.gamma(4.0, 2.0, 50), random.integers(0, 3, 50), np.full(50, 4)], axis=1).astype(float)
    adapter = base - np.stack([shift + random.normal(0, 0.05, 50), np.zeros(50), np.zeros(50)], axis=1)
    sums = tuple(tuple(map(tuple, side.tolist())) for side in (base, adapter))
    part = Part(KINDS["held_out"].measures(base, adapter), 50, 200, sums)
    card = {"base_fingerprint": "b", "held_out_fingerprint": "h", "steps": 100} | Card({"held_out": part}).as_json()
    (folder / "card.json").write_text(json.dumps(card | changes), encoding="utf-8")
    return folder


def test_what_differs_and_by_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / "a", 4, 2.0), write(tmp_path / "b", 8, 2.4)]
    found = compare(runs)
    assert found.settings == {"adapter.rank": (4, 8)}
    first, second = found.measures["held_out.loss"][2]
    assert first.difference is None and second.difference is not None
    # 0.4 nats a row of 4 tokens; the deviation of a row is 0.05·√2/4 = 0.018, of the mean of 50 rows 0.0025.
    value, low, high = second.difference
    assert low < value < high and value == pytest.approx(-0.1, abs=0.01) and high - low < 0.02
    assert first.interval is not None and first.interval[1] - first.interval[0] > 0.1, "the rows themselves differ much"
    assert second.value is not None and first.value is not None and second.value - first.value == value
    assert found.notes == ()
    assert cli.main(["compare", *map(str, runs)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "adapter.rank 4 8" in text and "held-out perplexity" in text
    assert "answers that end by themselves" not in text, "what no run has is left out"
    assert cli.main(["compare", *map(str, runs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"] == {"adapter.rank": [4, 8]}
    assert told["measures"]["held_out.loss"][1]["difference"] == [value, low, high]
    assert told["measures"]["answers.stop_rate"][1] == {"value": None, "interval": None, "difference": None}


def test_an_interval_has_the_decimals_of_its_value() -> None:
    cell = Cell(0.0651, (0.0601, 0.07), (0.005, 0.0, 0.01))
    assert cell.text(DIGITS) == "0.0651 [0.0601, 0.0700]; +0.0050 [+0.0000, +0.0100]"


def test_tokens_are_not_called_answers_where_whole_rows_are_learnt(tmp_path: Path) -> None:
    answers, everything = write(tmp_path / "a", 4, 2.0), write(tmp_path / "b", 4, 2.0, counted="tokens")
    older = write(tmp_path / "c", 4, 2.0, counted=None)

    def names(*runs: Path) -> set[str]:
        return {name for name, _, _ in compare(runs).measures.values()}

    said = {"held-out loss (nats per answer token)", "answer tokens predicted", "KL to the base, held-out answers"}
    of_all = {"held-out loss (nats per token)", "tokens predicted", "KL to the base, held-out rows"}
    assert said <= names(answers, older)
    assert of_all <= names(answers, everything)
    job = (older / "job.toml").read_text(encoding="utf-8")
    (older / "job.toml").write_text(job.replace('train_on = "answers"', 'train_on = "everything"'), encoding="utf-8")
    assert of_all <= names(answers, older), "an older card does not tell, its job does"


def test_groups_of_other_rows_are_not_paired(tmp_path: Path) -> None:
    """As many groups with other tokens: an older card groups the pieces of rows, and not the rows."""
    runs = [write(tmp_path / "a", 4, 2.0), write(tmp_path / "b", 4, 2.4)]
    card = json.loads((runs[0] / "card.json").read_text(encoding="utf-8"))
    for side in ("base", "adapter"):
        for number, row in enumerate(card[side]["held_out"]["sums"]):
            row[2] += 1 if number % 2 else -1
    (runs[0] / "card.json").write_text(json.dumps(card), encoding="utf-8")
    for pair in (runs, runs[::-1]):
        value, other = (cell.value for cell in compare(pair).measures["held_out.loss"][2])
        assert value is not None and other is not None
        assert compare(pair).measures["held_out.loss"][2][1].difference == (other - value,)


def test_other_rows_are_not_compared(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a", 4, 2.0), write(tmp_path / "b", 4, 2.4, held_out_fingerprint="other")]
    found = compare(runs)
    assert [cell.difference for cell in found.measures["held_out.loss"][2]] == [None, None]
    assert found.notes == (
        f"other held-out rows in {runs[1]}: losses and answers cannot be compared with those of {runs[0]}",
    )


def test_another_base_is_told(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a", 4, 2.0), write(tmp_path / "b", 4, 2.4, base_fingerprint="other")]
    assert compare(runs).notes == (
        f"other base in {runs[1]}: what the adapters changed cannot be compared with {runs[0]}",
    )


def test_an_older_card_has_dashes(tmp_path: Path) -> None:
    old = write(tmp_path / "old", 4, 2.0)
    side = {
        "held_out": {"loss": 2.5, "perplexity": 12.2, "accuracy": 0.5, "tokens": 200},
        "answers": None,
        "neutral": None,
    }
    (old / "card.json").write_text(json.dumps({"base": side, "adapter": side, "steps": 90}), encoding="utf-8")
    new = write(tmp_path / "new", 4, 2.0, kl={"answers": {"mean": 0.5, "interval": None, "tokens": 9}, "neutral": None})
    found = compare([new, old])
    assert found.measures["held_out.loss"][2][1].text(".4f") == "2.5000"
    assert [cell.text(DIGITS) for cell in found.measures["kl.answers"][2]] == ["0.500", "–"]
    assert [note.split(": ")[1] for note in found.notes] == [
        "the card (of an older version?) does not tell which held-out rows it is about",
        "the card (of an older version?) does not tell which base it is about",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"base": ', "damaged (Expecting value"),
        ("[1]", "damaged: found [1] as the card, expected an object"),
        (
            '{"adapter": {"held_out": {"loss": "low"}}}',
            'damaged: found "low" as adapter.held_out.loss, expected a number',
        ),
        ('{"adapter": 3}', "damaged: found 3 as adapter, expected an object"),
        (
            '{"adapter": {"held_out": {"intervals": {"loss": [1]}}}}',
            "damaged: found [1] as adapter.held_out.intervals.loss, expected two numbers",
        ),
    ],
)
def test_a_damaged_card_is_told_in_a_line(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write(tmp_path / "a", 4, 2.0), write(tmp_path / "b", 4, 2.0)]
    (runs[1] / "card.json").write_text(text, encoding="utf-8")
    assert cli.main(["compare", *map(str, runs)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lamina: {runs[1] / 'card.json'}: {told}") and said.count("\n") == 1


def test_sums_that_do_not_fit_are_damage(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a", 4, 2.0), write(tmp_path / "b", 4, 2.0)]
    card = json.loads((runs[1] / "card.json").read_text(encoding="utf-8"))
    card["adapter"]["held_out"]["sums"] = [[1, 2], [3]]
    (runs[1] / "card.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(CheckpointError, match="as adapter.held_out.sums, expected rows of 3 numbers"):
        compare(runs)


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    run = write(tmp_path / "a", 4, 2.0)
    with pytest.raises(ConfigError, match="expected at least two runs, each of them once"):
        compare([run])
    with pytest.raises(ConfigError, match="expected at least two runs, each of them once"):
        compare([run, run])
    with pytest.raises(CheckpointError, match="none: found no job.toml, expected the folder of a run"):
        compare([run, tmp_path / "none"])
    other = write(tmp_path / "b", 4, 2.0)
    (other / "card.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"card.json: cannot be read .*expected the card of a finished run; .*--resume"
    ):
        compare([run, other])


def test_text_of_jobs_is_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / "a", 4, 2.0), write(tmp_path / "b", 4, 2.0)]
    job = (runs[1] / "job.toml").read_text(encoding="utf-8")
    (runs[1] / "job.toml").write_text(job.replace('"rows.jsonl"', '"\\u001b[31mrows"'), encoding="utf-8")
    assert cli.main(["compare", *map(str, runs)]) == 0
    assert "\x1b" not in capsys.readouterr().out
