"""Pools of candidates generated before training, several for each source sample.

`write_array_record` writes a pool as one file and `Pool.from_array_record` reads it.
"""

from __future__ import annotations

import copy
import csv
import io
import os
import pathlib
from types import ModuleType

import numpy as np

from saflex_jax import checks
from saflex_jax._compat import optional
from saflex_jax.batches import floats
from saflex_jax.data.images import Rows, image_rows, images_in, subset, visible
from saflex_jax.data.provenance import METADATA, Provenance, read_provenance
from saflex_jax.files import renamed
from saflex_jax.types import Trace

MOST_SOURCES = 2**27  # an array of their counts is 1 GB
CHUNK = 256  # records in memory at once while the labels of an ArrayRecord file are read


class Pool:
    """Generated candidates and their labels: `pool(index, draw) -> (inputs, labels)`.

    Source sample i has `pool.draws(i)` candidates, numbered from zero; it may have none. The label
    is the generator's and becomes the candidate's prior. `len(pool)` is the number of sources: the
    largest source plus one, or `num_sources`. Make pools with `from_arrays`, `from_folder` and
    `from_array_record`; train on one with `data.ArrayStream(generated=pool)`.

    >>> pool = Pool.from_arrays(np.float32([[1], [2], [3]]), np.eye(3), np.array([0, 0, 2]))
    >>> pool.draws(np.array([0, 1, 2])).tolist()
    [2, 0, 1]
    >>> inputs, labels = pool(index=np.array([0, 2]), draw=np.array([1, 0]))
    >>> inputs.tolist(), labels.argmax(1).tolist()
    ([[2.0], [3.0]], [1, 2])

    Args:
      inputs: of the T candidates, floats or 8-bit.
      labels: f[T, K] in the simplex, or i[T] classes.
      source: i[T] >= 0, the source sample of each.
      num_classes: K; None = the number of columns of soft labels.
      num_sources: None = the largest source plus one.
      provenance: origin of the T candidates, in their order; None = unknown.

    Attributes:
      shape: of one input.
      trace: arrays [T, L] that batches carry, see `with_trace`; None = no trace.
    """

    def __init__(
        self,
        inputs: np.ndarray | Rows,
        labels: np.ndarray,
        source: np.ndarray,
        *,
        num_classes: int | None,
        num_sources: int | None,
        provenance: Provenance | None = None,
    ):
        """See the class."""
        labels, source = np.asarray(labels), np.asarray(source)
        if not labels.size:
            raise ValueError("a pool must hold at least one candidate; given 0")
        if labels.ndim == 1:
            if num_classes is None:
                raise ValueError(
                    "num_classes must be a number where labels are classes; given None"
                )
            checks.integers(num_classes, labels=labels)
        else:
            checks.simplex(labels=labels)
            if num_classes not in (None, labels.shape[1]):
                raise ValueError(f"labels must have {num_classes} columns; given {labels.shape[1]}")
        checks.rows(len(labels), source=source)
        _within("source", source, MOST_SOURCES if num_sources is None else num_sources)
        self.num_classes, self.shape = num_classes or labels.shape[1], tuple(inputs.shape[1:])
        self.provenance, self.trace = provenance, None
        self._inputs, self._labels, self._source = inputs, labels, source
        self._order = np.argsort(source, kind="stable")
        self._counts = np.bincount(source, minlength=num_sources or 0)
        self._starts = np.cumsum(self._counts) - self._counts

    @classmethod
    def from_arrays(
        cls,
        inputs: np.ndarray,
        labels: np.ndarray,
        source: np.ndarray,
        *,
        num_classes: int | None = None,
        num_sources: int | None = None,
        provenance: Provenance | None = None,
    ) -> Pool:
        """The pool of T candidates in arrays.

        Args:
          inputs: f[T, ...], or uint8[T, ...]; a memory map stays one.
          labels: f[T, K] in the simplex, or i[T] classes.
          source: i[T] >= 0, the source sample of each; a source's candidates keep their order.
          num_classes: K; None = the number of columns of soft labels.
          num_sources: None = the largest source plus one.
          provenance: of the candidates.

        Raises:
          ValueError: no candidates, arrays that disagree in T, inputs that are not finite floats,
            images above [0, 1], labels outside the simplex or the classes, sources out of range.
        """
        inputs = np.asanyarray(inputs)
        floating = np.issubdtype(inputs.dtype, np.floating)
        if not (floating or inputs.dtype == np.uint8) or inputs.shape[:1] != np.shape(source):
            raise ValueError(
                f"inputs must be floats with a row for each of {np.size(source)} sources; "
                f"given {inputs.dtype}{list(inputs.shape)}"
            )
        for start in range(0, len(inputs), CHUNK):  # it may be larger than memory
            part = inputs[start : start + CHUNK]
            checks.finite(inputs=part)
            if floating and inputs.ndim == 4:
                checks.pixels(inputs=part)
        return cls(
            inputs,
            labels,
            source,
            num_classes=num_classes,
            num_sources=num_sources,
            provenance=provenance,
        )

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike,
        *,
        num_classes: int | None = None,
        num_sources: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Pool:
        """The pool of the images `<source>/<draw>.<png|jpg|jpeg|webp|bmp>`, decoded on access.

        `labels.csv` in the folder has the header `file,label` (classes) or `file,p0,p1,...` (soft
        labels) and a row for every image, `3/0.png,7`. Rows of missing images are ignored, so you
        can filter candidates by deleting their files. A source's candidates are numbered in the
        order of `<draw>`. Grey images are [H, W, 1], others [H, W, 3], in [0, 1]. An optional
        `metadata.jsonl` has a line for every image (`read_provenance`).

        Args:
          path: the folder.
          num_classes: K, needed for classes; None = the number of columns of soft labels.
          num_sources: None = the largest source plus one.
          size: (H, W) to resize all images to (bilinear); None = they all have one size.

        Raises:
          ImportError: Pillow is not installed.
          ValueError: no images, names that are not numbers, a source out of range, a label or line
            that is missing or malformed; on access, an image that does not decode, or has another
            shape than the first. All name the file.
        """
        folder = pathlib.Path(path)
        candidates = []  # (source, draw, name, file)
        for source in (p for p in visible(folder) if p.is_dir()):
            for p in images_in(source):  # folders without images hold other things
                number = _number("source", source.name, source)
                if num_sources is not None and number >= num_sources:
                    raise ValueError(f"sources must lie in [0, {num_sources}); given {p}")
                candidates.append((number, _number("draw", p.stem, p), p.name, p))
        if not candidates:
            raise ValueError(f"{folder} must hold images <source>/<draw>.png; given none")
        candidates.sort()
        files = [p for *_, p in candidates]
        images = image_rows(files, size=size)
        names = [p.relative_to(folder) for p in files]
        labels, metadata = _csv_labels(folder / "labels.csv", names), folder / METADATA
        known = None
        if metadata.exists():
            known = read_provenance(metadata, [name.as_posix() for name in names])
        return cls(
            images,
            labels,
            np.array([source for source, *_ in candidates]),
            num_classes=num_classes,
            num_sources=num_sources,
            provenance=known,
        )

    @classmethod
    def from_array_record(
        cls,
        path: str | os.PathLike,
        *,
        num_classes: int | None = None,
        num_sources: int | None = None,
    ) -> Pool:
        """The pool of a file that `write_array_record` wrote; inputs are read on access.

        Sources and labels of all records are read now.

        Args:
          path: the file.
          num_classes: K, needed for classes; None = the number of columns of soft labels.
          num_sources: None = the largest source plus one.

        Raises:
          ImportError: array_record is not installed.
          ValueError: no such file, or an empty one; a record that does not decode; sources or
            labels as for `from_arrays`; on access, inputs that are not finite or of another shape
            than the first.
        """
        # Records are read at random, so reading ahead would be wasted.
        reader = _array_record().ArrayRecordReader(str(path), "readahead_buffer_size:0")
        total = reader.num_records()  # also zero where there is no such file
        if not total:
            raise ValueError(f"path must be an ArrayRecord file with records; given {path}")

        def records(places, *names):
            try:
                opened = [np.load(io.BytesIO(r)) for r in reader.read(places)]
                return [[record[name] for name in names] for record in opened]
            except Exception as error:  # the reader's, zipfile's or NumPy's
                raise ValueError(f"{path} does not decode: {error}") from error

        labels_and_sources = []
        for start in range(0, total, CHUNK):
            chunk = list(range(start, min(start + CHUNK, total)))
            labels_and_sources += records(chunk, "labels", "source")
        labels, source = map(np.stack, zip(*labels_and_sources))
        shape = records([0], "inputs")[0][0].shape

        def read(places):
            inputs = np.empty((len(places), *shape), np.float32)
            for row, (candidate,) in enumerate(records(places.tolist(), "inputs")):
                name = f"record {places[row]} of {path}"
                if candidate.shape != shape:
                    raise ValueError(
                        f"{name} must have shape {shape}, as the first has; given {candidate.shape}"
                    )
                checks.finite(**{name: candidate})
                if candidate.ndim == 3:
                    checks.pixels(**{name: candidate})
                inputs[row] = candidate
            return inputs

        rows = Rows(read, total, shape, np.float32)
        return cls(rows, labels, source, num_classes=num_classes, num_sources=num_sources)

    def of(self, rows: np.ndarray) -> Pool:
        """The pool of some sources, such as a training split; its source j is this one's rows[j].

        Args:
          rows: i[n], sources.
        """
        _within("rows", rows, len(self))
        chosen = copy.copy(self)
        chosen._counts, chosen._starts = self._counts[rows], self._starts[rows]
        return chosen

    def keep(self, kept: np.ndarray) -> Pool:
        """The pool of the kept candidates; `self` must be a whole pool.

        >>> pool = Pool.from_arrays(np.zeros((3, 1)), np.eye(3), np.array([0, 0, 2]))
        >>> pool.keep(np.array([True, False, True])).draws(np.arange(3)).tolist()
        [1, 0, 1]

        Args:
          kept: bool[T].
        """
        checks.rows(len(self._source), kept=kept)
        chosen = copy.copy(self)
        chosen._order = self._order[np.asarray(kept)[self._order]]
        chosen._counts = np.bincount(self._source[kept], minlength=len(self))
        chosen._starts = np.cumsum(chosen._counts) - chosen._counts
        return chosen

    def with_trace(self, trace: Trace) -> Pool:
        """The pool whose candidates carry a trace into their batches.

        Args:
          trace: arrays [T, L].
        """
        checks.rows(len(self._source), **{"a column of trace": trace.operation[:, 0]})
        chosen = copy.copy(self)
        chosen.trace = trace
        return chosen

    def samples(self) -> tuple[Rows, np.ndarray, np.ndarray, np.ndarray]:
        """All candidates, source by source, as separate samples.

        Returns:
          (inputs, unread, labels f32[n, K], sources i[n], indices i[n] among the T).
        """
        source = np.repeat(np.arange(len(self)), self._counts)
        draw = np.arange(len(source)) - np.repeat(np.cumsum(self._counts) - self._counts,
                                                  self._counts)  # fmt: skip
        places = self.places(source, draw)
        inputs = self._inputs
        rows = Rows(lambda i: inputs[i], len(inputs), inputs.shape[1:], inputs.dtype)
        return subset(rows, places), self._prior(places), source, places

    def __len__(self) -> int:
        return len(self._counts)

    def draws(self, index: np.ndarray) -> np.ndarray:
        """The number of candidates of each source, i[B].

        Args:
          index: i[B], sources.
        """
        return self._counts[_within("index", index, len(self))]

    def places(self, index: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Indices i[B] of candidates among the T.

        Args:
          index: i[B], sources.
          draw: i[B], number of the candidate within its source.
        """
        counts = self.draws(index)
        checks.rows(len(counts), draw=draw)
        return self._order[self._starts[index] + _within("draw", draw, counts)]

    def __call__(self, index: np.ndarray, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Candidate draw[b] of source index[b]: (inputs f32[B, ...], labels f32[B, K])."""
        places = self.places(index, draw)
        inputs = floats(np.asarray(self._inputs[places]))
        return inputs.astype(np.float32), self._prior(places)

    def _prior(self, places: np.ndarray) -> np.ndarray:
        labels = self._labels[places]
        if labels.ndim == 1:
            labels = labels[:, None] == np.arange(self.num_classes)
        return labels.astype(np.float32)


def write_array_record(
    path: str | os.PathLike, inputs: np.ndarray, labels: np.ndarray, source: np.ndarray
) -> None:
    """Writes candidates for `Pool.from_array_record`: each record is an .npz of one candidate.

    The file is written under another name and renamed, so a file of that name is always complete.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "pool.array_record"
    ...     write_array_record(file, np.ones((3, 2)), np.array([0, 1, 1]), np.array([0, 0, 1]))
    ...     Pool.from_array_record(file, num_classes=2).draws(np.array([0, 1])).tolist()
    [2, 1]

    Args:
      path: the file; an existing one is replaced.
      inputs: f[T, ...], or uint8[T, ...], written as floats.
      labels: f[T, K] in the simplex, or i[T] classes.
      source: i[T] >= 0, the source sample of each.

    Raises:
      ImportError: array_record is not installed.
      ValueError: as for `Pool.from_arrays`.
      OSError: the file cannot be written.
    """
    inputs, labels, source = map(np.asarray, (inputs, labels, source))
    classes = int(labels.max(initial=0)) + 1 if labels.ndim == 1 else None
    Pool.from_arrays(inputs, labels, source, num_classes=classes)  # raises on bad arrays
    try:
        with renamed(path) as part:
            writer = _array_record().ArrayRecordWriter(str(part), "group_size:1")  # random access
            for x, y, i in zip(inputs, labels, source):
                packed = io.BytesIO()
                np.savez(packed, inputs=floats(x).astype(np.float32), labels=y, source=i)
                writer.write(packed.getvalue())
            writer.close()
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _within(name: str, values: np.ndarray, bound: float | np.ndarray) -> np.ndarray:
    """The values as an array, if they are integers of shape [B] in [0, bound)."""
    values = np.asarray(values)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"{name} must be integers of shape [B]; given {values.dtype}{list(values.shape)}"
        )
    bad = (values < 0) | (values >= bound)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        bound = np.broadcast_to(bound, values.shape)[row]
        raise ValueError(f"{name} must lie in [0, {bound}); row {row} is {values[row]}")
    return values


def _number(what: str, text: str, path: pathlib.Path) -> int:
    if not text.isdecimal():
        raise ValueError(f"the {what} must be a number in <source>/<draw>.png; given {path}")
    return int(text)


def _csv_labels(path: pathlib.Path, files: list[pathlib.Path]) -> np.ndarray:
    """The files' labels in labels.csv: classes i[T] or soft labels f32[T, K]."""
    with open(path, newline="", encoding="utf-8-sig") as lines:
        header, *rows = [row for row in csv.reader(lines) if row] or [[]]
    soft = [f"p{k}" for k in range(len(header) - 1)]
    if header[:1] != ["file"] or header[1:] not in (["label"], soft) or len(header) < 2:
        raise ValueError(
            f"{path} must have the header file,label or file,p0,p1,...; given {header}"
        )
    parse = int if header[1] == "label" else np.float32
    by_file = {}
    for file, *values in rows:
        if file in by_file:
            raise ValueError(f"{path} must have one row for {file}; given two")
        try:
            by_file[file] = [parse(v) for v in values]
        except ValueError as error:
            raise ValueError(f"{path} must have numbers for {file}; given {values}") from error
        if len(values) != len(header) - 1:
            raise ValueError(
                f"{path} must have {len(header) - 1} numbers for {file}; given {values}"
            )
    for file in files:
        if file.as_posix() not in by_file:
            raise ValueError(f"{path} must have a row for {file}; given none")
    labels = np.array([by_file[file.as_posix()] for file in files])
    return labels[:, 0] if header[1] == "label" else labels


def _array_record() -> ModuleType:
    with optional("array_record"):
        from array_record.python import array_record_module
    return array_record_module
