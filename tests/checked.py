"""The package's annotations are checked while the tests run: types by beartype, shapes by jaxtyping.

jaxtyping binds every call's arguments and has beartype check them twice, which takes a third of the time of a tiny model's
step. What it must know is only where a call begins and ends, for in one call a letter stands for one number. So its hook
finds the functions of the modules that annotate shapes, and what it calls for each of them is replaced: beartype checks
once, inside jaxtyping's context where the function annotates a shape. All other modules are beartype's alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
from beartype import BeartypeConf, BeartypeDecorPlace
from beartype.claw import beartype_package

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "lamina"

context = functools.partial(jaxtyping.jaxtyped, "context")


def with_shapes() -> list[str]:
    """The modules that annotate shapes."""
    return [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in sorted(PACKAGE.rglob("*.py"))
        if "jaxtyping" in (text := file.read_text(encoding="utf-8")) or "lamina.ops.shapes" in text
    ]


def checked(typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """In place of ``jaxtyping.jaxtyped``: of a class, the fields of a dataclass; of a function, arguments and result."""

    def decorate(made: Any) -> Any:
        if isinstance(made, type):
            if dataclasses.is_dataclass(made):
                made.__init__ = of_function(made.__init__)
            return made
        return of_function(made)

    def of_function(function: Callable[..., Any]) -> Callable[..., Any]:
        one = typechecker(function)
        if "jaxtyping" not in repr(function.__annotations__):
            return one

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with context():
                return one(*args, **kwargs)

        return call

    return decorate


def check_annotations() -> None:
    """Checks what is imported from now on, with the numeric tower of PEP 484: an int may stand for a float."""
    functions = BeartypeDecorPlace.FIRST  # below decorators, which may change what is returned
    beartype_package(
        "lamina", conf=BeartypeConf(is_pep484_tower=True, claw_is_pep526=False, claw_decor_place_func=functions)
    )
    jaxtyping.jaxtyped = checked
    jaxtyping.install_import_hook(with_shapes(), "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
