"""Writes the golden files anew: ``python tests/golden/write.py``. What changed in them is what users will see changed."""

import contextlib
import inspect
import io
from collections.abc import Callable
from pathlib import Path

from pydantic.dataclasses import is_pydantic_dataclass

import lamina
from lamina import cli

FOLDER = Path(__file__).parent


def printed(*arguments: str) -> str:
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(arguments) == 0
    return out.getvalue()


def signatures() -> str:
    """The public names and how they are called."""
    return "\n".join(f"{name}{_signature(getattr(lamina, name))}" for name in lamina.__all__) + "\n"


def _signature(public: object) -> str:
    """Names and defaults; annotations are mypy's affair, and are written in another way by each version of Python."""
    assert callable(public), f"{public} is public, and can be neither called nor made"
    if isinstance(public, type) and issubclass(public, Exception):
        return f" is an {public.__base__.__name__}"
    if isinstance(public, type) and is_pydantic_dataclass(public):
        return " is a section: its settings are in init.toml"
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(public).parameters.values()]
    return str(inspect.Signature(bare))


GOLDEN: dict[str, Callable[[], str]] = {
    "help.txt": lambda: printed("--help"),
    "init.toml": lambda: printed("init"),
    "signatures.txt": signatures,
}

if __name__ == "__main__":
    for name, made in GOLDEN.items():
        (FOLDER / name).write_text(made(), encoding="utf-8")
