"""What the commands share that open a finished run or a plain model."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamina import settings
from lamina.errors import ConfigError
from lamina.generation import Sampling
from lamina.model.weights import ModelSettings
from lamina.opened import Opened, open_run

_MODEL = {"model": ModelSettings}
_SAMPLING = {"generate": Sampling}


def add_opening(parser: argparse.ArgumentParser, what: str, as_trained: bool = False, bare: bool = False) -> None:
    """RUN, and how to load it; ``as_trained`` in the form and precision in which it was trained, and no other; ``bare`` where an
    adapter without a run will do."""
    parser.add_argument("run", metavar="RUN", type=named, help=what)
    parser.add_argument(
        "--model",
        type=named,
        metavar="BASE",
        help="where the base lies, if it has moved since the run" + (", or of a bare adapter" if bare else ""),
    )
    parser.add_argument("--best", action="store_true", help="the run's best adapter instead of its last")
    settings.add_flags(parser, _MODEL, without={"model", *(("dtype", "base", "double_quant") if as_trained else ())})


def named(text: str) -> str:
    """An argument that names a folder: nothing would be the current one."""
    if not text:
        raise argparse.ArgumentTypeError("found nothing, expected the name of a folder")
    return text


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How answers are chosen."""
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the draws, where temperature is above 0"
    )
    settings.add_flags(parser, _SAMPLING)


def model_changes(given: argparse.Namespace) -> dict[str, Any]:
    """The settings of the model that flags change."""
    place = {} if given.model is None else {"model": given.model}
    return place | dict(settings.read_flags(given, _MODEL).values["model"])


def open_given(given: argparse.Namespace) -> Opened:
    """Opens what the arguments name.

    Raises:
        ConfigError: the best adapter of what is no run.
    """
    if given.best and not (Path(given.run) / "job.toml").is_file():
        raise ConfigError(
            f"--best: {given.run} is not the folder of a run, so it has no best adapter; leave --best out"
        )
    return open_run(given.run, best=given.best, changes=model_changes(given))


def sampling_of(given: argparse.Namespace, opened: Opened) -> Sampling:
    """The run's sampling, with the flags over it."""
    own = opened.job.generate if opened.job else Sampling()
    return replace(own, **settings.read_flags(given, _SAMPLING).values["generate"])
