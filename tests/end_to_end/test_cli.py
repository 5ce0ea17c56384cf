"""The command line's own promises: quick help, one-line errors, exit states, nothing heavy before it is needed."""

import errno
import io
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from lamina import cli, jobs

GOLDEN = Path(__file__).parents[1] / "golden"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake is told in."""
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("lamina: ")
    assert told.err.count("\n") == 1
    return told.err.removeprefix("lamina: ").rstrip("\n")


def prints(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    told = capsys.readouterr()
    assert told.err == ""
    return told.out


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, lamina.cli as cli; cli.main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'rich', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    assert (done.returncode, done.stderr) == (0, "")
    # Measured: 0.04 s. The limit is the promise; a machine under load may take ten times as long as an idle one.
    assert seconds <= 0.5


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = prints(capsys, "--help")
    assert text == (GOLDEN / "help.txt").read_text(encoding="utf-8")
    assert prints(capsys) == text == prints(capsys, "-h") == prints(capsys, "help")
    modules = {path.stem for path in (Path(cli.__file__).parent / "commands").glob("*.py")} - {"__init__", "opening"}
    assert modules == set(cli.COMMANDS)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lamina {command}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert prints(capsys, "--version").startswith("lamina 0.")


def test_init_prints_a_complete_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert prints(capsys, "init") == (GOLDEN / "init.toml").read_text(encoding="utf-8")


def test_init_starts_from_a_job_and_takes_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = prints(capsys, "init", "demo", "--rank", "3", "--targets", "q_proj,v_proj")
    assert '\nname = "demo"\n' in first
    assert "\nrank = 3\n" in first
    assert '\ntargets = ["q_proj", "v_proj"]\n' in first
    file = tmp_path / "job.toml"
    file.write_text(first, encoding="utf-8")
    assert prints(capsys, "init", str(file)) == first


def test_init_prints_nothing_that_steers_a_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, again = tmp_path / "job.toml", tmp_path / "again.toml"
    file.write_text('[model]\nmodel = "m\u009b31m\u202e"\n[data]\ndata = "d"\n', encoding="utf-8")
    text = prints(capsys, "init", str(file))
    assert not set("\x9b\u202e") & set(text) and r'model = "m\u009b31m\u202e"' in text
    again.write_text(text, encoding="utf-8")
    assert prints(capsys, "init", str(again)) == text


def test_jobs_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    listed = prints(capsys, "jobs").splitlines()
    assert [line.split()[0] for line in listed] == jobs.names()
    for name in jobs.names():
        assert prints(capsys, "jobs", name) == jobs.path(f"{name}.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "found command 'trian', which is unknown; did you mean train?; see `lamina --help`"),
        (["xyz"], "found command 'xyz', which is unknown; see `lamina --help`"),
        (
            ["train", "demo", "--lerning-rate", "3"],
            "found flag '--lerning-rate', which is unknown; did you mean --learning-rate?; see `lamina train --help`",
        ),
        (
            ["train", "demo", "--rnak=3", "--aplha", "1"],
            "found flag '--rnak', which is unknown; did you mean --rank?; found flag '--aplha', which is unknown; "
            "did you mean --alpha?; see `lamina train --help`",
        ),
        (["jobs", "demo", "demo"], "found 'demo', which no argument expects; see `lamina jobs --help`"),
        (["train", "demo", "--rank"], "argument --rank: expected one argument; see `lamina train --help`"),
        (["train", "demo", "--rank", "0"], "--rank: found '0', expected an integer ≥ 1"),
        (
            ["train", "demo", "--rank", "x", "--long", "cut"],
            "--long: found 'cut', expected one of drop, truncate, split; --rank: found 'x', expected an integer ≥ 1",
        ),
        (
            ["train"],
            "found no job, expected a built-in one (`lamina train demo`), a job.toml (`lamina init` prints one), or both "
            "--model and --data",
        ),
        (["train", "--model", "m"], "found no job, expected a built-in one"),
        (["train", "dmeo"], "dmeo: is no built-in job; did you mean demo? (known: demo, guanaco-7b, kdnuggets, kdnug"),
        (
            ["train", "no/job.toml"],
            "no/job.toml: found no such file, expected a job.toml; `lamina init > job.toml` writ",
        ),
        (["jobs", "dmeo"], "dmeo: is no built-in job; did you mean demo?"),
        (
            ["train", "demo", "--resume", "r"],
            "found both the job demo and --resume r, expected one: a run has its own job",
        ),
        (
            ["train", "--resume", "runs/a", "--rank", "3", "--read-ahead", "9"],
            "found --rank with --resume, expected only --model, --revision, --data, --data-revision, --eval-data, --read-ahead, "
            "--checkpoint-layers, --offload-checkpoints, --memory-gib, --save-every: "
            "a resumed run is the same run; for another one: lamina train runs/a/job.toml --rank …",
        ),
        (["train", "demo", "--layers", "abc"], "--layers: found 'abc', expected text that matches ^(all|"),
        (["train", "demo", "--name", "a/b"], "--name: found 'a/b', expected text that matches ^[A-Za-z0-9]"),
        (["train", "demo", "--data", ""], "--data: found '', expected text of at least one character"),
        (["train", "demo", "--resume", ""], "argument --resume: found nothing, expected the name of a folder; see"),
        (["chat", ""], "argument RUN: found nothing, expected the name of a folder; see `lamina chat --help`"),
        (
            ["train", "demo", "--steps", "3", "--epochs", "2"],
            "found --epochs beside --steps, which decides alone; leave out one, or add --steps none",
        ),
        (
            ["train", "demo", "--epochs", "2"],
            "found --epochs beside the job's steps = 150, which decides alone; leave out one, or add --steps none",
        ),
        (
            ["train", "kdnuggets"],
            "snli-contradictions.jsonl: no such file; `lamina jobs kdnuggets` prints the script that writes it",
        ),
        (
            ["chat", "model", "--best"],
            "--best: model is not the folder of a run, so it has no best adapter; leave --be",
        ),
        (
            ["train", "demo", "--base", "bf16"],
            "[model]: base: found bf16 with dtype fp32, expected the same; set dtype to bf16, or leave base out",
        ),
        (["generate", "run"], "the following arguments are required: --prompts; see `lamina generate --help`"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, *arguments).startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "version = 2\nwonder = 3\n",
            "found version = 2, expected at most 1: written by a newer version of Lamina; upgrade",
        ),
        ("version = true\n", "version: found true, expected 1"),
        (
            "version = 1\n[adapter]\nrnak = 3\n",
            "[adapter] rnak: is no setting; did you mean rank? (known: alpha, alpha_pat",
        ),
        ("version = 1\n[adapter]\nrank = 'x'\n", "[adapter] rank: found 'x', expected an integer ≥ 1"),
        ("name = 'a/b'\n", "name: found 'a/b', expected text that matches ^[A-Za-z0-9]"),
    ],
)
def test_a_job_file_that_is_wrong_is_told_with_its_place(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.toml"
    file.write_text(text, encoding="utf-8")
    assert f"{file}: {told}" in fails(capsys, "init", str(file), "--model", "m", "--data", "d")


def test_a_job_file_that_cannot_be_parsed_is_told_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.toml"
    file.write_text("version = 1\nrank 8\n", encoding="utf-8")
    assert fails(capsys, "train", str(file)).startswith(f"{file}:2: found broken TOML")


def test_a_run_folder_is_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.toml").write_text("version = 1\n", encoding="utf-8")
    assert fails(capsys, "train", str(tmp_path)) == (
        f"{tmp_path}: found a run's folder, expected a job; `lamina train --resume {tmp_path}` goes on with it, "
        f"`lamina train {tmp_path / 'job.toml'}` runs it anew"
    )


def test_a_job_file_that_cannot_be_read_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "job.toml"
    file.write_text("version = 1\n", encoding="utf-8")

    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # chmod does not stop root
    assert fails(capsys, "init", str(file)) == f"{file}: found Permission denied, expected a readable job file"


def test_the_shipped_files_are_found_and_no_others() -> None:
    assert jobs.path("lamina:demo.toml").is_file()
    for name in ("lamina:demo/nothing.txt", "lamina:../cli.py", "lamina:/etc/hosts"):
        with pytest.raises(
            cli.ConfigError, match=f"^found {name}, which is not shipped with Lamina; expected a file of a"
        ):
            jobs.path(name)


OUT_OF_MEMORY = (
    "lamina: out of memory; what was saved is untouched; free some memory, or run where there is more (--device)\n"
)
SAID_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    "could not create a primitive",
    "could not create a memory object",
)


def raising(error: BaseException) -> Callable[[str], types.SimpleNamespace]:
    def run(_: object) -> None:
        raise error

    return lambda _: types.SimpleNamespace(arguments=lambda parser: None, run=run, __doc__="")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (cli.ConfigError("a\nb \x1b[2J\u202ec"), 2, "lamina: a b \ufffd[2J\ufffdc\n"),
        (
            KeyboardInterrupt("interrupted after step 3 of 9; go on with: …"),
            130,
            "lamina: interrupted after step 3 of 9; go",
        ),
        (KeyboardInterrupt(), 130, "lamina: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a/x.partial"),
            2,
            "lamina: runs/a/x.partial: No space left on device; free some space\n",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "runs"),
            2,
            "lamina: runs: Read-only file system; name another place, or make this one writable\n",
        ),
        (
            OSError(errno.EACCES, "Permission denied", "runs/a/.lock"),
            2,
            "lamina: runs/a/.lock: Permission denied; name another place, or give yourself the right to this one\n",
        ),
        (MemoryError(), 2, OUT_OF_MEMORY),
        *((RuntimeError(words), 2, OUT_OF_MEMORY) for words in SAID_OF_MEMORY),
    ],
)
def test_exit_states(
    error: BaseException,
    status: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli.importlib, "import_module", raising(error))
    assert cli.main(["jobs"]) == status
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("a bug"), OSError(errno.EBADF, "Bad file descriptor"), RuntimeError("mat1")]
)
def test_a_bug_keeps_its_traceback(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.importlib, "import_module", raising(error))
    with pytest.raises(type(error)):
        cli.main(["jobs"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys, lamina.cli as cli; sys.exit(cli.main(['jobs', 'demo']))"
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminal_without_utf8_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["train", "demo", "--rank", "0"]) == 2
    sys.stderr.flush()
    assert b"expected an integer \\u2265 1" in raw.getvalue()
