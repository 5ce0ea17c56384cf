"""The package's annotations are checked while the tests run: types by beartype, shapes by jaxtyping.

jaxtyping binds every call's arguments and lets beartype check them twice, which a check of shapes needs and a check of
types does not. So it takes the modules that annotate shapes, and beartype alone all others: the same checks, and half of
the processor time of what calls many small functions.
"""

from pathlib import Path

from beartype import BeartypeConf, BeartypeDecorPlace
from beartype.claw import beartype_package
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "lamina"


def with_shapes() -> list[str]:
    """The modules that annotate shapes."""
    return [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in sorted(PACKAGE.rglob("*.py"))
        if "jaxtyping" in (text := file.read_text(encoding="utf-8")) or "lamina.ops.shapes" in text
    ]


def check_annotations() -> None:
    """Checks what is imported from now on, with the numeric tower of PEP 484: an int may stand for a float."""
    functions = BeartypeDecorPlace.FIRST  # below decorators, which may change what is returned
    beartype_package(
        "lamina", conf=BeartypeConf(is_pep484_tower=True, claw_is_pep526=False, claw_decor_place_func=functions)
    )
    install_import_hook(with_shapes(), "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
