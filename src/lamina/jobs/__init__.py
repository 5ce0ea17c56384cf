"""The jobs that come with Lamina: a TOML file each, and the files of the demo.

A job names a shipped file as ``lamina:demo/train.jsonl``, so that it means the same on every machine; ``path`` finds it.
"""

from pathlib import Path, PurePosixPath

from lamina.errors import ConfigError

PREFIX = "lamina:"
_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The built-in jobs."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def path(name: str) -> Path:
    """The place of a shipped file or folder: ``lamina:demo/base``, or ``demo.toml`` for a job.

    Raises:
        ConfigError: Lamina ships nothing of that name.
    """
    relative = PurePosixPath(name.removeprefix(PREFIX))
    found = _FOLDER / relative
    if relative.is_absolute() or ".." in relative.parts or not found.exists():
        raise ConfigError(f"found {name}, which is not shipped with Lamina; expected a file of a built-in job")
    return found


def summary(name: str) -> str:
    """The first line of a built-in job's file: what the job is."""
    return path(f"{name}.toml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
