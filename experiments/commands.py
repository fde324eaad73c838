"""The command `saflex`: the commands of this package under one name, for whoever installed it.

    saflex train --data=PATH

is `python -m experiments.main --data=PATH`, and so `python -m saflex_jax train --data=PATH` is.
This imports nothing that takes time; each command imports what it needs.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """A module of `experiments` with a function `command()`, and what it does in a line."""

    module: str
    about: str


COMMANDS = {
    "prepare": Command("prepare", "fetch a data set or pretrained weights, once"),
    "inspect": Command("inspect", "describe a data set: counts, ranges, copies, a contact sheet"),
    "features": Command("features", "compute features of a data set by a pretrained network"),
    "train": Command("main", "train one run: --data=PATH of your own data, or --config=NAME"),
    "compare": Command("compare", "train the arms of a config over seeds: a table and a figure"),
    "audit": Command("audit", "say which labels of a run or of features are wrong: table, page"),
    "export": Command("export", "write weights, labels and utilities of a run as a table"),
    "predict": Command("predict", "write a run's predictions on a data set as a table"),
}
OWN = ("saflex_jax", "experiments")  # a missing module of these is a damaged installation


def usage() -> str:
    """What `saflex --help` prints."""
    lines = "\n".join(f"  {name:9} {about}" for name, (_, about) in COMMANDS.items())
    return (
        "usage: saflex COMMAND [OPTIONS]\n\n"
        f"{lines}\n\n"
        "saflex COMMAND --help lists a command's options. With --debug an error shows where it\n"
        "was raised. saflex --version prints the version."
    )


def main(argv: list[str] | None = None) -> None:
    """Hands the other arguments to the command that the first one names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", "help"):
        print(usage())
        return
    if name == "--version":
        print(importlib.metadata.version("saflex_jax"))
        return
    if name not in COMMANDS:
        _refuse(name)
    sys.argv = [f"saflex {name}", *rest]
    try:
        module = importlib.import_module(f"experiments.{COMMANDS[name].module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in OWN:
            raise
        sys.exit(f'saflex {name} needs {error.name}: pip install "saflex_jax[experiments]"')
    module.command()


def _refuse(name: str) -> None:
    """Ends with status 2, saying what is accepted."""
    if not name:
        print(usage(), file=sys.stderr)
        sys.exit(2)
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    commands = ", ".join(COMMANDS)
    print(f"saflex: no command {name!r}{hint} Commands: {commands}", file=sys.stderr)
    sys.exit(2)
