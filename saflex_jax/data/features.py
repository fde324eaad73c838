"""The format of feature sets: a frozen network's outputs for the rows of a data set, computed once.

A folder with features.json and arrays. The rows that may train or validate come first, each under V
views; the rows of the official test split follow, unaugmented. `create` and `writable` serve the
program that fills a set (`saflex features`); `from_features` reads it.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from saflex_jax import checks
from saflex_jax.data.images import Rows
from saflex_jax.data.sources import Source
from saflex_jax.types import Trace

DESCRIPTION = "features.json"
FORMAT = 1
AT_A_TIME = 2**20  # numbers that are held in double precision
FILLED = {"views": "f2", "tested": "f2", "prints": "V16", "operation": "i2", "magnitude": "f4"}


class Features(NamedTuple):
    """A memory-mapped feature set of N rows, of which the first n have V views.

    An example is at `create`.

    Attributes:
      source: of N rows. Inputs are view 0, f16[N, D]; `views` is f16[n, V, D].
      rows: i[N], row numbers in the data set.
      prints: V16[N], `fingerprints` of the inputs behind the features.
      trace: the operations of each view, arrays [n, V, L]; `operation` indexes `operations`.
      operations: names of operations.
      options: the options that made the set.
    """

    source: Source
    rows: np.ndarray
    prints: np.ndarray
    trace: Trace
    operations: tuple[str, ...]
    options: Mapping[str, Any]


def create(
    path: str | os.PathLike,
    source: Source,
    *,
    seen: np.ndarray,
    tested: np.ndarray,
    shape: tuple[int, int, int],
    operations: tuple[str, ...],
    options: Mapping[str, Any],
) -> None:
    """Creates a feature set whose features are zero, to be filled through `writable`.

    >>> import tempfile
    >>> source = Source(np.zeros((3, 8, 8, 1)), np.array([0, 1, 1]), 2)
    >>> rows = dict(seen=np.array([0, 2]), tested=np.array([1]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     create(folder, source, **rows, shape=(4, 5, 1), operations=("flip",), options={})
    ...     writable(folder)["tested"][:] = 7
    ...     features = from_features(folder)
    ...     last = features.source.inputs[2].tolist()
    >>> features.source.views.shape, features.source.labels.tolist(), last
    ((2, 4, 5), [0, 1, 1], [7.0, 7.0, 7.0, 7.0, 7.0])

    Args:
      path: the folder; created if it is missing.
      source: the data set.
      seen: i[n], rows that get V views.
      tested: i[t], rows that get one view.
      shape: (V, D, L): views, features, operations in a trace.
      operations: names that a trace indexes.
      options: everything that determines the features; JSON-able.
    """
    root, rows = pathlib.Path(path), np.concatenate([seen, tested])
    root.mkdir(exist_ok=True)
    arrays = {"rows": rows, "labels": source.labels[rows]}
    arrays |= {f"extra_{name}": values[rows] for name, values in source.extra.items()}
    order = np.argsort(rows, kind="stable")
    for name, places in source.splits.items():
        kept = places[np.isin(places, rows)]
        arrays[f"split_{name}"] = order[np.searchsorted(rows[order], kept)]
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", array)
    views, width, length = shape
    shapes = {
        "views": (len(seen), views, width),
        "tested": (len(tested), width),
        "prints": (len(rows),),
        "operation": (len(seen), views, length),
        "magnitude": (len(seen), views, length),
    }
    for name, dtype in FILLED.items():
        np.lib.format.open_memmap(root / f"{name}.npy", "w+", np.dtype(dtype), shapes[name])
    fields = {
        "format": FORMAT,
        "num_classes": source.num_classes,
        "task": source.task,
        "class_names": source.class_names,
        "operations": operations,
        "options": dict(options),
    }
    (root / DESCRIPTION).write_text(json.dumps(fields, indent=1))


def writable(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays to fill, by name; writing to one writes to its file."""
    return {name: _mapped(pathlib.Path(path), name, "r+") for name in FILLED}


def read_options(path: str | os.PathLike) -> dict[str, Any]:
    """The options of a feature set.

    Raises:
      ValueError: no feature set in that folder, or one of another format.
    """
    return _described(pathlib.Path(path))["options"]


def from_features(path: str | os.PathLike) -> Features:
    """The feature set in a folder, as `saflex features` makes it.

    An example is at `create`.

    Args:
      path: the folder.

    Raises:
      ValueError: no feature set in that folder, or one of another format.
    """
    root = pathlib.Path(path)
    about = _described(root)

    def load(pattern):
        return {p.stem.partition("_")[2]: np.load(p) for p in sorted(root.glob(pattern))}

    views, tested = (_mapped(root, name) for name in ("views", "tested"))
    size = len(views) + len(tested)

    def first(rows):
        inputs = np.empty((len(rows), tested.shape[1]), views.dtype)
        seen = rows < len(views)
        inputs[seen], inputs[~seen] = views[rows[seen], 0], tested[rows[~seen] - len(views)]
        return inputs

    source = Source(
        Rows(first, size, tested.shape[1:], views.dtype),
        np.load(root / "labels.npy"),
        about["num_classes"],
        about["task"],
        load("split_*.npy"),
        load("extra_*.npy"),
        class_names=tuple(about["class_names"]),
        views=views,
    )
    trace = Trace(_mapped(root, "operation"), _mapped(root, "magnitude"), None)
    return Features(
        source,
        np.load(root / "rows.npy"),
        np.load(root / "prints.npy"),
        trace,
        tuple(about["operations"]),
        about["options"],
    )


def fit_scale(values: np.ndarray) -> Callable[[np.ndarray | Rows], Rows]:
    """Standardises features by the training samples' mean and deviation.

        x_d <- (x_d - m_d) / s_d ,   m and s the mean and the deviation of `values`

    A constant feature is only shifted. All is computed in double precision, some rows at a time.

    >>> scale = fit_scale(np.array([[1.0, 0.1], [3.0, 0.1]]))
    >>> scale(np.array([[5.0, 0.1]]))[:].tolist()
    [[3.0, 0.0]]

    Args:
      values: f[N, D], of the training samples.

    Returns:
      f[..., D] -> f32 of that shape, computed on access.

    Raises:
      ValueError: no rows.
    """
    values = np.asarray(values)
    if not len(values):
        raise ValueError("values must have at least one row to fit a scale; given 0")
    constant = values.max(0) == values.min(0)  # the deviation may round to above zero
    mean = np.where(constant, values[0], values.mean(0, dtype=np.float64))
    square = sum(
        np.sum((values[part] - mean) ** 2, axis=0) for part in _parts(len(values), values.shape[1:])
    )
    deviation = np.where(constant, 1, np.sqrt(square / len(values)))

    def scale(x):
        def read(rows):
            scaled = np.empty((len(rows), *x.shape[1:]), np.float32)
            for part in _parts(len(rows), x.shape[1:]):
                scaled[part] = (np.asarray(x[rows[part]], np.float64) - mean) / deviation
            return scaled

        return Rows(read, len(x), x.shape[1:], np.float32)

    return scale


def _parts(size: int, shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of `size` rows of a shape, each of few numbers."""
    rows = max(AT_A_TIME // max(math.prod(shape), 1), 1)
    return (slice(begin, begin + rows) for begin in range(0, size, rows))


def _described(root: pathlib.Path) -> dict[str, Any]:
    try:
        about = json.loads((root / DESCRIPTION).read_text())
        checks.choice((str(FORMAT),), format=str(about["format"]))
        return about
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{root} must be a feature set; `saflex features {root.parent.name}` makes one: {error}"
        ) from error


def _mapped(root: pathlib.Path, name: str, mode: str = "r") -> np.ndarray:
    return np.load(root / f"{name}.npy", mmap_mode=mode)
