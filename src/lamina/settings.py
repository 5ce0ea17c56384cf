"""Settings from files and flags, and back: knows no setting by name.

Everything here is generated from the fields of the sections it is handed, ``{"adapter": LoRA, …}``; the section called
``""`` holds the keys at the top of a file. Values come in layers, later ones over earlier: the defaults of the fields,
a TOML file (``read_toml``), the flags (``read_flags``). ``build`` makes the sections, and tells all that is wrong at once,
each problem with the place it came from. ``write_toml`` writes every setting with its documentation.

A setting that is None is written as ``key = "none"``, or, where None is the default, as a commented-out line: a complete
file names every setting.

Rejected: one library for all of it, see docs/decisions/0002-settings.md.
"""

import argparse
import ast
import codecs
import json
import re
import textwrap
import tomllib
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lamina.errors import ConfigError
from lamina.section import UTF8, SectionError, arms, expected, nearest, spelt

Sections = Mapping[str, type]
_WIDTH = 110
_KEY = re.compile(r"\((?:(?:'[^']*'|\"[^\"]*\"),? ?)+\)")
"""The name of a table as tomllib's messages have it: ('train',)."""


@dataclass(frozen=True)
class Setting:
    """One field of one section."""

    section: str
    name: str
    field: FieldInfo

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def doc(self) -> str:
        return " ".join((self.field.description or "").split())

    @property
    def default(self) -> Any:
        return self.field.get_default(call_default_factory=True)

    def where(self) -> str:
        """How a message names the setting's place in a file."""
        return _place(self.section, self.name)


def _place(section: str, name: str = "") -> str:
    return f"[{section}] {name}".rstrip() if section else name or "at the top"


@dataclass(frozen=True)
class Layer:
    """Values from one source: section → name → value, and how a message names the place of one."""

    values: Mapping[str, Mapping[str, Any]]
    where: Callable[[Setting], str]


def settings(sections: Sections) -> Iterator[Setting]:
    """Every setting, in the order of the sections and of their fields."""
    for section, cls in sections.items():
        fields: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
        yield from (Setting(section, name, field) for name, field in fields.items())


def build(sections: Sections, *layers: Layer) -> dict[str, Any]:
    """Makes an instance of every section, later layers over earlier ones over the defaults.

    Raises:
        ConfigError: everything that is wrong in any section, each with the place its value came from.
    """
    made, problems = {}, []
    for section, cls in sections.items():
        known = {s.name: s for s in settings({section: cls})}
        values, origin = {}, {}
        for layer in layers:
            for name, value in layer.values.get(section, {}).items():
                values[name] = value
                origin[name] = layer.where(known[name])
        try:
            made[section] = cls(**values)
        except SectionError as error:
            problems += [f"{origin.get(n) or _place(section, n)}: {t}" for n, t in error.problems.items()]
        except ConfigError as error:
            problems.append(f"{_place(section)}: {error}")
    if problems:
        raise ConfigError("; ".join(problems))
    return made


# Files


def parse_toml(data: bytes, name: str) -> dict[str, Any]:
    """The tables of a TOML file; ``name`` is what messages call it.

    Raises:
        ConfigError: the file is not UTF-8, or not TOML, with the line.
    """
    try:
        data = data.removeprefix(codecs.BOM_UTF8)  # Windows writes this mark at the beginning of a file
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}:{line}: found the byte 0x{data[error.start]:02x}, expected UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        text = str(error)
        place = re.search(r" \(at line (\d+), column \d+\)", text)
        line = int(place[1]) if place else data.count(b"\n") + 1
        why = _KEY.sub(lambda key: f"[{'.'.join(ast.literal_eval(key[0]))}]", re.sub(r" \(at .*\)$", "", text))
        raise ConfigError(f"{name}:{line}: found broken TOML ({why}), expected lines such as: rank = 16") from None


def read_toml(tables: Mapping[str, Any], sections: Sections, name: str) -> Layer:
    """Checks that every name in a parsed file is a setting. Types and ranges are left to ``build``.

    Raises:
        ConfigError: every unknown section and setting, with the nearest known name.
    """
    problems: list[str] = []
    values: dict[str, dict[str, Any]] = {section: {} for section in sections}
    known: dict[str, set[str]] = {section: set() for section in sections}
    for setting in settings(sections):
        known[setting.section].add(setting.name)
    for key, value in tables.items():
        if key in sections and isinstance(value, dict):
            values[key] = value
            problems += [f"[{key}] {n}: {_misplaced(n, key, known)}" for n in value if n not in known[key]]
        elif key in sections and key:
            problems.append(f"{key}: found {spelt(value)}, expected a table [{key}]")
        elif key in known.get("", ()):
            values[""][key] = value
        elif isinstance(value, dict):
            problems.append(f"[{key}]: is no section{nearest(key, filter(None, sections))}")
        else:
            problems.append(f"{key}: {_misplaced(key, '', known)}")
    if problems:
        raise ConfigError(f"{name}: {'; '.join(problems)}")
    return Layer(values, lambda setting: f"{name}: {setting.where()}")


def _misplaced(name: str, section: str, known: Mapping[str, set[str]]) -> str:
    """What to say of a key that its section does not know: it belongs elsewhere, or it is misspelt."""
    for other, names in known.items():
        if name in names:
            return f"belongs {f'under [{other}]' if other else 'at the top of the file, before the first section'}"
    return f"is no setting{nearest(name, known.get(section, ()))}"


def write_toml(made: Mapping[str, Any]) -> str:
    """A complete file of the given sections (name → instance), each setting under its documentation.

    Reading it back gives equal sections.
    """
    blocks = []
    for section, instance in sorted(made.items(), key=lambda item: item[0] != ""):  # in TOML the top comes first
        cls = type(instance)
        if section:
            blocks.append(_comment(cls.__doc__) + f"[{section}]\n")
        for setting in settings({section: cls}):
            value = getattr(instance, setting.name)
            line = f"{setting.name} = {_literal('none' if value is None else value)}"
            silent = "# " if value is None and setting.default is None else ""
            blocks.append(f"{_comment(describe(setting))}{silent}{line}\n")
    return "\n".join(blocks)


def describe(setting: Setting) -> str:
    """The setting's documentation, what it admits and its default, in a line."""
    default = "no default" if setting.field.is_required() else f"default {default_text(setting)}"
    return f"{setting.doc} ({expected(setting.field)}; {default})".lstrip()


def default_text(setting: Setting) -> str:
    """The default as a file would have it; nothing where there is none."""
    if setting.field.is_required():
        return ""
    return "none" if setting.default is None else _literal(setting.default)


def _comment(text: str | None) -> str:
    lines = textwrap.wrap(" ".join((text or "").split()), _WIDTH, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def _literal(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "".join(map(_escaped, json.dumps(value, ensure_ascii=False)))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)


def _escaped(character: str) -> str:
    """A character of a text in JSON as TOML has it, whose escapes are the same: what cannot be seen may steer a terminal."""
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 2**16 else f"\\U{ord(character):08x}"


# Flags


def add_flags(parser: argparse.ArgumentParser, sections: Sections, without: Collection[str] = ()) -> None:
    """Adds one flag per setting, grouped by section. Absent flags leave no trace in the namespace."""
    for section, cls in sections.items():
        group = parser.add_argument_group(section or "run", " ".join((cls.__doc__ or "").split()))
        for setting in settings({section: cls}):
            if setting.name in without:
                continue
            text = describe(setting).replace("%", "%%")
            dest = f"{setting.section}.{setting.name}"
            if bool in arms(setting.field.annotation):
                group.add_argument(
                    setting.flag, dest=dest, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
                )
            else:
                group.add_argument(
                    setting.flag, dest=dest, default=argparse.SUPPRESS, help=text, metavar=_metavar(setting)
                )


def read_flags(given: argparse.Namespace, sections: Sections) -> Layer:
    """Parses the flags that were given by the types of their fields.

    Raises:
        ConfigError: every flag whose value does not fit its type.
    """
    problems: list[str] = []
    values: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for setting in settings(sections):
        text = vars(given).get(f"{setting.section}.{setting.name}")
        if text is None:
            continue
        try:
            values[setting.section][setting.name] = _parse(setting, text)
        except ValidationError as error:
            patterns = [problem["ctx"]["pattern"] for problem in error.errors() if "pattern" in problem.get("ctx", {})]
            wanted = f"text that matches {patterns[0]}" if patterns else expected(setting.field)
            broken = any(problem["type"] == "string_unicode" for problem in error.errors())
            problems.append(f"{setting.flag}: found {text!r}, expected {UTF8 if broken else wanted}")
    if problems:
        raise ConfigError("; ".join(problems))
    return Layer(values, lambda setting: setting.flag)


def _parse(setting: Setting, text: str | bool) -> Any:
    """A flag's text as a value of its field: ``a,b`` for lists, ``pattern=8,pattern=4`` for tables, ``none`` for None."""
    kinds = arms(setting.field.annotation)
    if isinstance(text, bool) or (text == "none" and types.NoneType in kinds):
        return text
    value: Any = text
    entry = r"(.+?)=([^=,]+)(?:,|$)"  # a pattern may itself hold commas: the number after = ends an entry
    if dict in kinds:
        value = dict(re.findall(entry, text)) if re.fullmatch(f"({entry})+", text) else text
    elif tuple in kinds and (str not in kinds or "," in text):
        parts = re.split(r",(?![^(\[{]*[)\]}])", text) if text else []  # not within a pattern's brackets
        value = tuple(part.strip() for part in parts)
    return TypeAdapter(setting.field.rebuild_annotation()).validate_python(value, strict=False)


def _metavar(setting: Setting) -> str:
    signs = {int: "N", float: "X", str: "TEXT", tuple: "A,B", dict: "PATTERN=N"}
    kinds = arms(setting.field.annotation)
    return next((sign for kind, sign in signs.items() if kind in kinds), "NAME")
