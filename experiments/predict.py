"""Predictions of a run on a data set, at its last or any checkpoint, as a table.

    saflex predict --workdir=runs/digits --source=usps [--out=FILE.csv]
    saflex predict --workdir=runs/mine --source=FOLDER

--source is a data set as in `config.data.name`, or a folder with nothing but images: inputs of the
run's shape, or a table with its columns, and a label behind them or none, read as the run reads its
own.
Columns of what is written: row, file of a folder, predicted, class where
classes have names, probability, p0 to pK-1, and label where the source has the same classes.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import command_line, finished, task
from saflex_jax import data, train


def predictions(run: finished.Run, source: str, folder: str) -> dict[str, np.ndarray]:
    """The table of a data set.

    Raises:
      ValueError: a run on features; inputs of another shape, or other columns.
    """
    section, own_source = run.config.data, run.data.source
    if section.features:
        raise ValueError("--workdir must be of a run on images or a table; given one on features")
    found = _opened(source, section, folder or section.dir, own_source.columns)
    own = own_source.inputs.shape[1:]
    if tuple(found.inputs.shape[1:]) != tuple(own):
        raise ValueError(
            f"--source must have inputs of shape {list(own)}, as the run's; {source} has "
            f"{list(found.inputs.shape[1:])}"
        )
    inputs = found.inputs if own_source.columns is None else _encoded(run, found)
    probs = train.probabilities(run.method, run.state, inputs)
    names = np.array(own_source.class_names)
    table = {
        "row": np.arange(len(probs)),
        **({"file": found.extra["file"]} if "file" in found.extra else {}),
        "predicted": probs.argmax(1),
        **({"class": names[probs.argmax(1)]} if len(names) else {}),
        "probability": probs.max(1),
        **{f"p{k}": column for k, column in enumerate(probs.T)},
    }
    if found.labels.ndim == 1 and found.class_names == own_source.class_names:
        table["label"] = found.labels
    return table


def _encoded(run: finished.Run, found: data.Source) -> Any:
    """A table's inputs, in the codes and the scale of the run's training rows.

    Raises:
      ValueError: other columns.
    """
    columns, values = run.data.source.columns, np.array(found.inputs, np.float64)

    def kinds(of):
        return [(c.name, "numbers" if c.categories is None else "categories") for c in of or ()]

    if kinds(columns) != kinds(found.columns):
        raise ValueError(
            f"--source must have the run's columns {kinds(columns)} before its label; given "
            f"{kinds(found.columns)}"
        )
    for place, (own, its) in enumerate(zip(columns, found.columns)):
        if own.categories is not None:
            code = {name: code for code, name in enumerate(own.categories)}
            codes = np.array([code.get(name, np.nan) for name in its.categories] + [np.nan])
            values[:, place] = codes[np.nan_to_num(values[:, place], nan=-1).astype(int)]
    source, _, split, _ = task.make_split_source(run.config)
    return data.fit_encoder(np.asarray(source.inputs)[split.train], columns)(values)


def _opened(
    source: str, section: ConfigDict, folder: str, columns: tuple[data.Column, ...] | None
) -> data.Source:
    """The data set; images directly in a folder have no labels, nor has a table of `columns`."""
    path = pathlib.Path(source)
    if columns and path.is_file() and path.suffix.lower() in task.TABLES:
        table = data.read_table(path, label=None)
        if [c.name for c in table.columns] == [c.name for c in columns]:
            unlabelled = np.empty((len(table.values), 0))
            return data.Source(table.values, unlabelled, 0, columns=table.columns)
    images = data.images.images_in(path) if path.is_dir() else []
    if not images:
        task.check_name(source, "--source")
        channels = section.channels if path.is_dir() else 0
        return task.opened(source, folder, section.size, section.task, False, channels)
    size = (section.size, section.size) if section.size else None
    rows = data.images.image_rows(images, size=size, channels=section.channels or None)
    files = np.array([image.name for image in images])
    return data.Source(rows, np.empty((len(images), 0)), 0, extra={"file": files})


def main(argv: list[str] | None = None) -> None:
    """Predicts and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    finished.add_options(parser, "predictions.csv")
    parser.add_argument("--source", required=True, help="a data set, as config.data.name")
    parser.add_argument("--data_dir", default="", help="of data sets; default: the run's")
    given = parser.parse_args(argv)
    own = {"source": given.source, "folder": given.data_dir}
    finished.write(given, functools.partial(predictions, **own))


def command() -> None:
    """The program, with the arguments of the process."""
    command_line.run_plain(main)


if __name__ == "__main__":
    command()
