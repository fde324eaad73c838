"""Lists of samples as text files: which are trusted, and what the right labels of some are.

A line is FILE or FILE,CLASS for a folder of images, FILE as it lies in the folder: "cat/003.png".
For a table or an .npz file it is ROW or ROW,CLASS, rows counted from 0. A first line "file" or
"row", or one that starts so, is a header.
"""

from __future__ import annotations

import csv
from collections.abc import Collection

import numpy as np

from saflex_jax import checks, data


def read(
    source: data.Source, path: str, argument: str, tested: Collection[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that a file names, i[n], and their labels i[n], -1 where it gives none.

    Args:
      source: the data set.
      path: the file.
      argument: that named it, for errors.
      tested: rows that it must not name.

    Raises:
      ValueError: no such file, or an empty one; a line that names no sample, one that was named
        before or is tested, or no class. Names the line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [(n, line) for n, line in enumerate(csv.reader(file), 1) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{argument} must be a text file; {path}: {error}") from error
    if lines and lines[0][1][0].strip().lower() in ("file", "row"):
        lines = lines[1:]
    if not lines:
        raise ValueError(f"{argument} must name at least one sample; {path} names none")
    files = source.extra.get("file", np.arange(len(source.labels))).astype(str).tolist()
    places: dict[str, int] = {}
    for row, name in enumerate(files):
        places.setdefault(name, row)  # a set to test on, behind, may have files of the same names
    classes = source.class_names or tuple(map(str, range(source.num_classes)))
    rows: dict[int, int] = {}
    for number, (name, *label) in lines:
        where, name = f"{argument}: {path}, line {number}", name.strip()
        if name not in places:
            near = checks.nearest(name, files)
            raise ValueError(f"{where} must name a sample, as {files[0]!r}; given {name!r}{near}")
        if places[name] in rows:
            raise ValueError(f"{where} names {name!r}, which was named before")
        if places[name] in tested:
            raise ValueError(f"{where} must name no sample of the test split; given {name!r}")
        rows[places[name]] = _class(label[0].strip(), classes, where) if label else -1
    return np.array(list(rows)), np.array(list(rows.values()))


def _class(name: str, classes: tuple[str, ...], where: str) -> int:
    if name not in classes:
        near = checks.nearest(name, classes)
        raise ValueError(f"{where} must give one of the classes {classes}; given {name!r}{near}")
    return classes.index(name)


def trusted(source: data.Source, path: str) -> data.Source:
    """The data set with the samples that a file names as validation split, and their labels.

    Args:
      source: the data set; official validation samples stay such.
      path: of `config.data.trusted`.

    Raises:
      ValueError: as `read`; labels that are no classes; a sample of the official test split.
    """
    if source.labels.ndim > 1:
        raise ValueError("config.data.trusted must be '' where labels are no classes")
    tested = set(source.splits.get("test", np.array([])).tolist())
    rows, given = read(source, path, "config.data.trusted", tested)
    labels, told = source.labels.copy(), given >= 0
    labels[rows[told]] = given[told]
    official = dict(source.splits)
    rest = official.get("train", np.arange(len(labels)))
    official |= {
        "train": np.setdiff1d(rest, rows),
        "val": np.union1d(official.get("val", []), rows),
    }
    official["val"] = official["val"].astype(int)
    return source._replace(labels=labels, splits=official)
