"""A run's page: whatever its folder holds or lacks, it says so; damaged files are one line; nothing in it acts."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kept_run import card, dump, explanation, plain, write_kept, write_ledger, write_lines

from lamina import cli
from lamina.errors import CheckpointError
from lamina.report.chapters.card import shade
from lamina.report.chapters.curves import smoothed
from lamina.report.forms import Step
from lamina.report.kept import read_kept
from lamina.report.page import Text
from lamina.reporting import page_of, report

HOSTILE = '<script>alert(1)</script>{{7*7}}</style>" onload="x" \x00\x1b[2J\u202e$a$'
FILES = ("metrics.jsonl", "card.json", "explanation.json", "check.json", "samples.jsonl", "ledger.parquet")


def html(folder: Path) -> str:
    return plain(report(folder).read_text(encoding="utf-8"))


def notes(folder: Path) -> list[str]:
    """The paragraphs of the page, without drawing it."""
    return [block.text for s in page_of(read_kept(folder)).sections for block in s.blocks if isinstance(block, Text)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run that lacks nothing."""
    return html(write_kept(tmp_path_factory.mktemp("report") / "run"))


def test_every_chapter_with_its_charts(drawn: str) -> None:
    text = drawn
    for title in (
        "The outcome",
        "How it learnt",
        "Before and after",
        "Token by token",
        "What the update is",
        "How it grew",
    ):
        assert f">{title}</h2>" in text
    for title in ("Answers over the steps", "What it cost", "The doctor&#39;s findings", "The job"):
        assert f">{title}</h2>" in text
    assert text.count("<svg") == text.count('<figure class="chart">') == 15
    assert 'class="muted"' not in text, "nothing is absent"
    assert "took 12 s of training (3,500 tokens/s), planned were 11 s, and the whole run" in plain(text)
    assert "It learnt: on 900 held-out answer tokens the loss fell from 3.000 to 0.600" in text
    assert "1 of 21 matrices did not move: layer 0 self_attn.q_proj." in text


def test_text_of_data_models_and_doctor_is_shown_and_does_nothing(tmp_path: Path) -> None:
    text = html(write_kept(tmp_path / "run", text=HOSTILE))
    assert "<script" not in text and "{{7*7}}" in text and 'onload="' not in text and text.count("</style>") == 1
    assert not set("\x00\x1b\u202e") & set(text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{7*7}}" in text


def test_the_same_folder_gives_the_same_bytes(drawn: str, tmp_path: Path) -> None:
    assert html(write_kept(tmp_path / "run")) == drawn


@pytest.mark.slow
def test_a_page_of_250_steps_and_224_matrices_is_small(tmp_path: Path) -> None:
    assert len(html(write_kept(tmp_path / "run", steps=250, layers=32, rank=64)).encode()) < 1_500_000


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_absent_is_said_to_be(name: str, tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run")
    (folder / name).unlink()
    assert any(f"no {name}" in text for text in notes(folder))


def test_a_folder_with_nothing_but_a_job(tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run")
    for name in FILES:
        (folder / name).unlink()
    text = html(folder)
    assert "it has not ended, or it was interrupted" in text and "<svg" not in text
    (folder / "job.toml").unlink()
    with pytest.raises(CheckpointError, match="found no job.toml, expected the folder of a run"):
        report(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "bytes", "other"])
def test_a_damaged_file_is_one_line(name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_kept(tmp_path / "run")
    path = folder / name
    content = path.read_bytes()
    damaged = {"cut": content[:-5] + b"\n", "bytes": b"\xff\xfe\x00\n", "other": b'[{"loss": "x"}]\n'}
    path.write_bytes(damaged[damage])
    if name == "metrics.jsonl" and damage == "other":
        path.write_bytes(b'{"step": 1, "loss": "x"}\n')
    assert cli.main(["report", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"lamina: {path}: cannot be read (") and err.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_values_that_do_not_fit_name_their_place(tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run")
    dump(folder / "card.json", card("a", 3) | {"base": {"held_out": {"loss": "much"}}})
    with pytest.raises(
        CheckpointError, match=r"card.json: cannot be read \(base.held_out.loss: Input should be a valid"
    ):
        report(folder)


@pytest.mark.parametrize("value", [math.nan, *(pytest.param(value, marks=pytest.mark.slow) for value in (-1e308, 0.0))])
def test_losses_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run")
    made = card("a", 60)
    for side in ("base", "adapter"):
        for part in ("held_out", "neutral"):
            made[side][part] |= {"loss": value, "perplexity": value}
    made["dose"] |= {"task": [value] * 7, "neutral": [value] * 7}
    made["difference"] |= {"held_out.loss": [value, value, value]}
    dump(folder / "card.json", made)
    found = explanation(3, 8)
    for matrix in found["matrices"]:
        matrix |= {"norm": value, "singular_values": [value] * 8}
    for cell in found["map"]:
        cell |= {"norm": value, "relative": value}
    found["ranks"] |= {"base_loss": value, "adapter_loss": value}
    dump(folder / "explanation.json", found)
    lines = [{"step": 0, "eval_loss": value, "eval_tokens": 9}]
    lines += [json.loads(line) | {"loss": value, "grad_norm": value} for line in steps_of(folder)]
    write_lines(folder / "metrics.jsonl", lines)
    assert html(folder).count("<svg") >= 14


def steps_of(folder: Path) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"loss"' in line]


def test_a_run_of_one_step_without_held_out_rows(tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run", steps=1, layers=1, rank=1)
    write_lines(folder / "metrics.jsonl", [json.loads(line) for line in steps_of(folder)])
    nothing: dict[str, Any] = dict.fromkeys(("held_out", "answers", "neutral"))
    made = card("a", 1) | {"base": nothing, "adapter": nothing, "difference": {}, "learnt": None, "dose": None}
    dump(folder / "card.json", made | {"kl": None, "seconds": {}})
    dump(folder / "explanation.json", explanation(1, 1) | {"ranks": None, "not_measured": "the run held out no rows"})
    text = html(folder)
    assert "Nothing was held out, so whether it learnt more than its training rows by heart cannot be said" in text
    assert "No held-out loss at lower ranks: the run held out no rows." in text
    assert "No held-out prompts were answered" in text and "no neutral text was measured" in text


@pytest.mark.usefixtures("undrawn")
def test_an_empty_ledger_and_one_with_a_row_too_few(tmp_path: Path) -> None:
    import pyarrow.parquet

    folder = write_kept(tmp_path / "run")
    table = pyarrow.parquet.read_table(folder / "ledger.parquet")
    pyarrow.parquet.write_table(table.slice(0, 0), folder / "ledger.parquet")
    assert "There is no ledger.parquet." in notes(folder)
    pyarrow.parquet.write_table(table.slice(1), folder / "ledger.parquet")
    with pytest.raises(CheckpointError, match=r"ledger.parquet: cannot be read .*1259.*60"):
        report(folder)
    write_ledger(folder, 1, 1)
    assert any("1 of 7 matrices did not move" in note for note in notes(folder))


@pytest.mark.usefixtures("undrawn")
def test_tokens_are_not_called_answers_where_prompts_are_learnt_too(tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run")
    (folder / "job.toml").write_text('[data]\ntrain_on = "everything"\n', encoding="utf-8")
    text = html(folder)
    assert "on 900 held-out tokens the loss fell" in text and "nats per answer token" not in text
    assert "loss on held-out rows (nats per token)" in text and ">tokens predicted (%)" in text
    assert "On held-out rows the adapter's" in text.replace("&#39;", "'")
    assert "answer tokens" not in text and "Tokens of the held-out rows" in text
    (folder / "job.toml").write_text("", encoding="utf-8")
    assert "answer tokens predicted (%)" in html(folder)
    dump(folder / "card.json", card("a", 60) | {"counted": "tokens"})
    assert "answer tokens" not in html(folder), "the card knows: plain text is learnt whole, whatever the job says"
    dump(folder / "card.json", card("a", 60) | {"counted": "words"})
    with pytest.raises(CheckpointError, match=r"card.json: cannot be read \(counted: Input should be 'answer tokens'"):
        report(folder)
    (folder / "job.toml").write_text("[data", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"job.toml: cannot be read \("):
        report(folder)


@pytest.mark.usefixtures("undrawn")
def test_warnings_and_notes_stand_beside_the_outcome(tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run")
    assert any(note.startswith("The doctor found 1 error before the run") for note in notes(folder))
    dump(folder / "check.json", {"findings": [{"rule": "steps", "grade": "warning", "found": "few steps"}] * 2})
    dump(folder / "card.json", card("a", 60) | {"ledger_notes": ["note, step 50: clipped"]})
    assert {
        "The doctor had 2 warnings before the run: see its findings below.",
        "The ledger has 1 remark on how it trained: see How it grew.",
        "note, step 50: clipped",
    } <= set(notes(folder))


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [(4.0, 2.0, "much"), (4.0, 3.5, "some"), (4.0, 3.9, "same"), (4.0, 4.5, "worse"), (None, None, "context")],
)
def test_the_shades_of_tokens(before: float | None, after: float | None, name: str) -> None:
    assert shade(before, after) == name


@pytest.mark.usefixtures("undrawn")
def test_spaces_that_were_learnt_can_be_seen(tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run")
    made = card("a", 60)
    given = {"text": " ", "trained": False, "before": None, "after": None}
    made["learnt"]["rows"] = [
        {"row": 1, "tokens": [given, {"text": " ", "trained": True, "before": 4.0, "after": 1.0}]}
    ]
    dump(folder / "card.json", made)
    text = html(folder)
    assert '<span class="t context"> </span><span class="t much">␣<small>4.0→1.0</small></span>' in text


@pytest.mark.usefixtures("undrawn")
def test_a_dose_curve_without_a_knee(tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run")
    made = card("a", 60)
    made["dose"] |= {"knee": None, "rows": 1}
    dump(folder / "card.json", made)
    text = html(folder)
    assert "so there is no knee. Measured on 1 row." in text and "more of it brings little" not in text


@pytest.mark.usefixtures("undrawn")
def test_what_tokens_add_is_written_without_powers_of_ten(tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run")
    made = card("a", 60)
    made["learnt"]["most"] = [{"text": "a", "count": 5385, "before": 15.517, "after": 2.531}]
    dump(folder / "card.json", made)
    assert '<td class="n">−69,930</td>' in html(folder)


@pytest.mark.usefixtures("undrawn")
def test_both_ends_of_an_interval_have_the_same_decimals(tmp_path: Path) -> None:
    folder = write_kept(tmp_path / "run")
    distance = {"mean": 0.0651, "interval": [0.0601, 0.07], "tokens": 900}
    dump(folder / "card.json", card("a", 60) | {"kl": {"answers": distance, "neutral": None}})
    assert "predictions are 0.0651 [0.0601, 0.0700] nats per token away" in html(folder)


def step(number: int, loss: float, tokens: int) -> Step:
    return Step(step=number, loss=loss, tokens=9, supervised_tokens=tokens, learning_rate=1, grad_norm=1, seconds=1)


def test_smoothing_counts_tokens_and_keeps_a_constant() -> None:
    assert smoothed([step(1, 2.0, 1), step(2, 4.0, 3)]) == [3.5, 3.5]
    assert smoothed([step(n, 2.0, 0) for n in range(3)]) == [2.0] * 3


class Counted(list[Step]):
    """Steps that count how many of them were taken out."""

    taken = 0

    def __iter__(self) -> Iterator[Step]:
        self.taken += len(self)
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.taken += len(found) if isinstance(index, slice) else 1
        return found


def test_smoothing_a_long_run_takes_no_more_for_a_step_than_a_short_one() -> None:
    steps = Counted(step(n, 1.0 + n % 7, 1 + n % 5) for n in range(3000))
    found, half = smoothed(steps), 100
    assert steps.taken < 5 * len(steps)
    for at in (0, 50, 1500, 2999):
        some = list(steps)[max(0, at - half) : at + half + 1]
        tokens = sum(one.supervised_tokens for one in some)
        # 3,000 sums of up to 36,000, each rounded by 2^-53 of that: 1.2e-8 at most, of a window of at least 1,000.
        assert found[at] == pytest.approx(sum(one.loss * one.supervised_tokens for one in some) / tokens, rel=1e-9)


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_kept(tmp_path / "run")
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "page.html")}
    assert (tmp_path / "page.html").is_file() and not (folder / "report.html").exists()
    (folder / "explanation.json").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"
    assert cli.main(["report", str(folder), "--out", str(tmp_path)]) == 2
    assert "found a folder, expected the name of a file for the page" in capsys.readouterr().err
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert f"found no folder {tmp_path / 'no'}; make it" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "found no job.toml, expected the folder of a run" in capsys.readouterr().err
