"""Weights, labels and utilities of a run's candidates, at its last or any checkpoint, as a table.

    saflex export --workdir=runs/digits [--step=400] [--draws=1] [--out=FILE.parquet]

The columns are those of `experiments.audit`. --out ends in .csv or .parquet.
"""

from __future__ import annotations

import argparse
import functools

from experiments import command_line, finished
from saflex_jax import checks


def main(argv: list[str] | None = None) -> None:
    """Looks at every candidate and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    finished.add_options(parser, "candidates.csv")
    parser.add_argument("--draws", type=int, default=1, help="of the pipeline, a row each")
    given = parser.parse_args(argv)
    checks.whole(1, **{"--draws": given.draws})
    finished.write(given, functools.partial(finished.columns, draws=given.draws))


def command() -> None:
    """The program, with the arguments of the process."""
    command_line.run_plain(main)


if __name__ == "__main__":
    command()
