"""A job without what is wrong in it, so that the rest can be examined.

Unknown keys, and values that do not fit, are left at their defaults. What was wrong is told by ``jobfile.load``, whose errors
name it all at once; here it is only left out.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from lamina import jobfile
from lamina.errors import ConfigError
from lamina.job import SECTIONS, Job
from lamina.jobfile import Head
from lamina.section import SectionError
from lamina.settings import parse_toml, read_flags, settings

_WHOLE: dict[str, type] = {"": Head, **SECTIONS}


def salvaged(job: str | None, flags: argparse.Namespace) -> tuple[Job | None, list[str]]:
    """What of a job, or of flags alone, can be examined, and which values of known settings do not fit.

    Returns:
        None for the job where too little is left.
    """
    values: dict[str, dict[str, Any]] = {section: {} for section in _WHOLE}
    try:
        for section, known in _known(_tables(job)).items() if job else ():
            values[section] |= known
    except ConfigError:
        return None, []  # no such file, or not TOML
    for name, value in vars(flags).items():
        try:
            given = read_flags(argparse.Namespace(**{name: value}), _WHOLE).values
        except ConfigError:
            continue
        for section in _WHOLE:
            values[section] |= given[section]
    problems: list[str] = []
    made = {section: _made(section, values[section], problems) for section in _WHOLE}
    return None if None in made.values() else Job.of(made), problems


def _tables(job: str) -> Mapping[str, Any]:
    path = jobfile.find(job)
    try:
        return parse_toml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _known(tables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of a file that exist, by section; those at the top of the file belong to the head."""
    found: dict[str, dict[str, Any]] = {}
    for setting in settings(_WHOLE):
        table = tables.get(setting.section) if setting.section else tables
        if isinstance(table, Mapping) and setting.name in table:
            found.setdefault(setting.section, {})[setting.name] = table[setting.name]
    return found


def _made(section: str, values: dict[str, Any], problems: list[str]) -> Any | None:
    """The section of those values that fit; None where a needed one is missing, or they contradict each other."""
    while True:
        try:
            return _WHOLE[section](**values)
        except SectionError as error:
            if not (wrong := error.problems.keys() & values.keys()):
                return None
            problems += [f"[{section}] {name}: {text}" for name, text in error.problems.items() if name in wrong]
            values = {name: value for name, value in values.items() if name not in wrong}
        except ConfigError:
            return None
