"""The job file: a version, the keys at its top, and one table per section of settings.

    version = 1
    name = "demo"

    [model]
    model = "lamina:demo/base"

Complete or partial: what a file leaves out has its default. Files and folders are found from where ``lamina`` is called.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lamina import jobs
from lamina.errors import ConfigError
from lamina.section import nearest, section, spelt
from lamina.settings import Layer, Sections, build, parse_toml, read_flags, read_toml, write_toml

VERSION = 1
_TITLE = """\
# A job for Lamina: lamina train job.toml
# Every setting stands here with its documentation; each is also a flag (max_length is --max-length), which wins over the
# file. A line "# key = ..." is a setting whose default is none. Paths are found from where lamina is called.

"""


@section
class Head:
    """The run as a whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """The job's name; a run without out goes to runs/<name>-<n>."""

    out: Annotated[str, Field(min_length=1)] | None = None
    """The folder of the run, new or empty; none takes the next free runs/<name>-<n>."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Everything random is a function of it: the split, the order of the data, the adapter's A, dropout, sampling."""


def find(job: str) -> Path:
    """The file of a job: a built-in name, or the path of a TOML file.

    Raises:
        ConfigError: there is no such job.
    """
    if job in jobs.names():
        return jobs.path(f"{job}.toml")
    path = Path(job)
    if path.is_file():
        return path
    if (path / "job.toml").is_file():
        raise ConfigError(
            f"{job}: found a run's folder, expected a job; `lamina train --resume {job}` goes on with it, "
            f"`lamina train {path / 'job.toml'}` runs it anew"
        )
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(f"{job}: found no such file, expected a job.toml; `lamina init > job.toml` writes one")
    raise ConfigError(f"{job}: is no built-in job{nearest(job, jobs.names())} and no file")


def read(path: Path, sections: Sections) -> Layer:
    """The settings of a job file, every name checked.

    Raises:
        ConfigError: the file is unreadable, of a newer version, or holds unknown settings.
    """
    try:
        tables = parse_toml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: found {error.strerror}, expected a readable job file") from None
    version = tables.pop("version", VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(f"{path}: version: found {spelt(version)}, expected {VERSION}")
    if version > VERSION:
        raise ConfigError(
            f"{path}: found version = {version}, expected at most {VERSION}: written by a newer version of Lamina; "
            "upgrade with `pip install --upgrade lamina`"
        )
    return read_toml(tables, sections, str(path))


def load(job: str | None, sections: Sections, flags: argparse.Namespace | None = None) -> dict[str, Any]:
    """A job's sections, with ``""`` for the head: defaults, the job's file over them, the flags over both.

    Raises:
        ConfigError: whatever is wrong in the file, or in the flags.
    """
    sections = {"": Head, **sections}
    layers = [read(find(job), sections)] if job else []
    return build(sections, *layers, *([read_flags(flags, sections)] if flags else []))


def dump(made: Mapping[str, Any]) -> str:
    """A complete, commented job file of the head (``""``) and the sections."""
    return f"{_TITLE}version = {VERSION}\n\n{write_toml(made)}"
