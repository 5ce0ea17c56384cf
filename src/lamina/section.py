"""A section of settings: a frozen dataclass whose fields are the settings of the module that defines it.

A setting is written once, beside the code that uses it, as type, range, default and documentation string:

    @section
    class LoRA:
        \"\"\"The low-rank adapter.\"\"\"

        rank: Annotated[int, Field(ge=1)] = 16
        \"\"\"Rank r of the update s·B·A.\"\"\"

Types and ranges are checked by pydantic when the section is made, from Python as from a file, and strictly: "8", 8.0
and True are not the integer 8 (an integer may stand for a number, a list for a tuple). Everything that is wrong is
reported in one ``ConfigError``. Where None is allowed the word "none" means it, because TOML has no null: a file, a flag
and Python say it alike. What contradicts something else is the section's own affair: its ``__post_init__``
raises ``ConfigError`` or ``ValueError``. ``settings.py`` turns the fields into TOML, flags and help.
"""

import datetime
import difflib
import functools
import re
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar, Union, cast, dataclass_transform, get_args, get_origin

import annotated_types
import pydantic
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from lamina.errors import ConfigError

C = TypeVar("C")
_CONFIG = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, strict=True)
_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", types.NoneType: "none"}
BARE = re.compile("[A-Za-z0-9_-]+")
"""A key that needs no quotes."""
UTF8 = "UTF-8 text"
"""What text is that a file of settings can hold; the name of a file may be other bytes."""
_PLURALS = {int: "integers", float: "numbers", str: "texts", bool: "truth values"}


class SectionError(ConfigError):
    """Settings of one section are wrong: ``problems`` maps each setting to what was found and what was expected."""

    def __init__(self, problems: dict[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {text}" if name else text for name, text in problems.items()))
        self.problems = problems


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(pydantic.Field,))
def section(cls: type[C]) -> type[C]:
    """Makes a class a frozen, checked section of settings.

    Raises:
        ConfigError: on construction, one line that lists every problem: setting, what was found, what was expected.
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls)
    made.__init__ = _one_error(made.__init__)
    return cast(type[C], made)


def _one_error(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked(self: Any, **values: Any) -> None:
        fields = type(self).__pydantic_fields__
        for name, value in values.items():
            if isinstance(value, list):  # settings are values, hence tuples; files and people write lists
                values[name] = tuple(value)
            elif value == "none" and name in fields and types.NoneType in arms(fields[name].annotation):
                values[name] = None
        try:
            init(self, **values)
        except pydantic.ValidationError as error:
            raise SectionError(_by_setting(error, fields, values)) from None

    return checked


def _by_setting(
    error: pydantic.ValidationError, fields: dict[str, FieldInfo], values: dict[str, Any]
) -> dict[str, str]:
    """One text per setting: pydantic reports each branch of a union and each item of a list on its own."""
    found: dict[str, str] = {}
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "unexpected_keyword_argument":
            found[name] = f"is no setting{nearest(name, fields)}"
        elif problem["type"] == "value_error":
            found[name] = problem["msg"].removeprefix("Value error, ")
        elif problem["type"] == "string_pattern_mismatch":
            found[name] = f"found {spelt(values[name])}, expected text that matches {problem['ctx']['pattern']}"
        elif problem["type"] == "string_unicode":
            found[name] = f"found {spelt(values[name])}, expected {UTF8}"
        elif problem["type"] == "missing":
            found[name] = f"found nothing, expected {expected(fields[name])}"
        else:
            found[name] = f"found {spelt(values[name])}, expected {expected(fields[name])}"
    return found


def spelt(value: Any) -> str:
    """A value as a file would have it, where a file can hold it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case tuple() | list():
            return f"[{', '.join(map(spelt, value))}]"
        case dict():
            return f"{{{', '.join(f'{key if BARE.fullmatch(str(key)) else repr(key)} = {spelt(item)}' for key, item in value.items())}}}"
        case datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            return repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, then all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    guess = f"; did you mean {close[0]}?" if close else ""
    return f"{guess} (known: {', '.join(known)})"


def arms(annotation: Any) -> set[Any]:
    """The classes that a value of this annotation may have: {str, tuple} for ``str | tuple[str, ...]``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return set().union(*map(arms, args))
    return arms(args[0]) if origin is Annotated else {origin or annotation}


def expected(kind: Any, plural: bool = False) -> str:
    """What a type admits, in words: ``an integer ≥ 1``, ``one of constant, linear, cosine``, ``a number > 0 or none``."""
    if isinstance(kind, FieldInfo):
        kind = Annotated[kind.annotation, *kind.metadata] if kind.metadata else kind.annotation
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words = expected(args[0], plural)
        ending = " or none" if words.endswith(" or none") else ""
        return words.removesuffix(ending) + _range(args[1:]) + ending
    if origin is Literal:
        return str(args[0]) if len(args) == 1 else f"one of {', '.join(map(str, args))}"
    if origin in (Union, types.UnionType):
        return " or ".join(expected(arm, plural) for arm in args)
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list of {expected(args[0], plural=True)}"
    if origin is tuple:
        return f"a list of {len(args)} {expected(args[0], plural=True)}"
    if origin is dict:
        return f"a table of {expected(args[1], plural=True)}"
    return (_PLURALS if plural else _NAMES)[kind]


def _range(metadata: Iterable[Any]) -> str:
    """The bounds among a field's metadata: `` ≥ 1 and < 2``."""
    bounds = []
    for item in metadata:
        match item:
            case FieldInfo():  # Field(...) inside Annotated, in an arm of a union or an item of a list
                return _range(item.metadata)
            case annotated_types.MinLen(1):
                bounds.append("of at least one character")
            case annotated_types.Ge(bound):
                bounds.append(f"≥ {bound}")
            case annotated_types.Gt(bound):
                bounds.append(f"> {bound}")
            case annotated_types.Le(bound):
                bounds.append(f"≤ {bound:,}")
            case annotated_types.Lt(bound):
                bounds.append(f"< {bound}")
    return " " + " and ".join(bounds) if bounds else ""
