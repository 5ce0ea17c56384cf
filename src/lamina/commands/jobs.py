"""Lists the built-in jobs, or prints the file of one."""

import argparse

from lamina import jobs
from lamina.errors import ConfigError
from lamina.section import nearest


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="the job whose file to print, comments and all")


def run(given: argparse.Namespace) -> None:
    names = jobs.names()
    if given.name is None:
        width = max(map(len, names))
        print("\n".join(f"{name:<{width}}  {jobs.summary(name)}" for name in names))
    elif given.name in names:
        print(jobs.path(f"{given.name}.toml").read_text(encoding="utf-8"), end="")
    else:
        raise ConfigError(f"{given.name}: is no built-in job{nearest(given.name, names)}")
