"""Predictions of a run on a data set, at its last or any checkpoint, as a table.

    python -m experiments.predict --workdir=runs/digits --source=usps [--out=FILE.csv]

--source is a data set as in `config.data.name`: inputs of the run's shape, read as the run reads
its own. Columns: row, predicted, probability, p0 to pK-1, and the label where classes are known.
"""

from __future__ import annotations

import argparse
import functools

import numpy as np
from absl import logging

from experiments import finished, task
from saflex_jax import train


def predictions(run: finished.Run, source: str, folder: str) -> dict[str, np.ndarray]:
    """The table of a data set.

    Raises:
      ValueError: a run on features or tables; inputs of another shape.
    """
    section = run.config.data
    if section.features or run.data.source.columns is not None:
        raise ValueError("--workdir must be of a run on images, whose inputs need no scale of its")
    found = task.opened(source, folder or section.dir, section.size, section.task, False)
    own = run.data.pools.candidates.inputs.shape[1:]
    if tuple(found.inputs.shape[1:]) != tuple(own):
        raise ValueError(
            f"--source must have inputs of shape {list(own)}, as the run's; {source} has "
            f"{list(found.inputs.shape[1:])}"
        )
    probs = train.probabilities(run.method, run.state, found.inputs)
    table = {
        "row": np.arange(len(probs)),
        "predicted": probs.argmax(1),
        "probability": probs.max(1),
        **{f"p{k}": column for k, column in enumerate(probs.T)},
    }
    if found.labels.ndim == 1:
        table["label"] = found.labels
    return table


def main(argv: list[str] | None = None) -> None:
    """Predicts and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    finished.add_options(parser, "predictions.csv")
    parser.add_argument("--source", required=True, help="a data set, as config.data.name")
    parser.add_argument("--data_dir", default="", help="of data sets; default: the run's")
    given = parser.parse_args(argv)
    own = {"source": given.source, "folder": given.data_dir}
    finished.write(given, functools.partial(predictions, **own))


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # else Orbax reports every file
    main()
