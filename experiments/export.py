"""Weights, labels and utilities of a run's candidates, at its last or any checkpoint, as a table.

    python -m experiments.export --workdir=runs/digits [--step=400] [--draws=1] [--out=FILE.parquet]

The columns are those of `experiments.audit`. --out ends in .csv or .parquet.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from absl import logging

from experiments import finished, tables
from saflex_jax.train import CheckpointError


def main(argv: list[str] | None = None) -> None:
    """Looks at every candidate and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a finished run")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: what was tested")
    parser.add_argument("--draws", type=int, default=1, help="of the pipeline, a row each")
    parser.add_argument("--out", type=pathlib.Path, help="default: WORKDIR/candidates.csv")
    given = parser.parse_args(argv)
    file = given.out or given.workdir / "candidates.csv"
    try:
        run = finished.opened(given.workdir, given.step)
        tables.write(finished.columns(run, given.draws), file)
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        sys.exit(str(error))
    print(file)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # else Orbax reports every file
    main()
