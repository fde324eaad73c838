"""Labelled data sets behind one interface: inputs, labels, official splits.

`inputs` is an array, a memory map, or `images.Rows`, which reads files on access; all three are
indexed alike. 8-bit images stay 8-bit until a batch is made (`batches.floats`).
"""

from __future__ import annotations

import functools
import os
import pathlib
import zipfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from saflex_jax import checks
from saflex_jax._compat import optional
from saflex_jax.data.images import SUFFIXES, Rows, files_in, image_rows, images_in, joined, visible
from saflex_jax.data.tables import Column, read_table

TASKS = ("multiclass", "multilabel", "ordinal")
SPLITS = ("train", "val", "test")
MOST_CLASSES = 2**20  # of dense labels; a larger number is a label that is none
NONE: Mapping[str, Any] = MappingProxyType({})


class Source(NamedTuple):
    """A labelled data set.

    >>> Source(np.zeros((3, 8)), np.array([0, 1, 1]), num_classes=2).task
    'multiclass'

    Attributes:
      inputs: N rows: images uint8[N, H, W, C] or floats in [0, 1]; tables f[N, D] as measured,
        with categorical columns as codes and NaN = missing.
      labels: i[N] classes; f[N, K] in the simplex for graded labels; {0, 1}[N, K - 1] for the task
        "multilabel".
      num_classes: K, the width of `priors`.
      task: "multiclass", "multilabel", or "ordinal" (classes in order).
      splits: name -> rows i[n] of the official splits; {} for none.
      extra: name -> [N]; other label sets, groups, captions.
      columns: of a table; None if inputs are not a table.
      class_names: of the labels; () for none.
      views: f[n, V, ...], several inputs for each of the first n rows, those that may train; None
        if a row is one input.
      left_out: of a folder, the files in its classes' folders that are no samples.
    """

    inputs: np.ndarray | Rows
    labels: np.ndarray
    num_classes: int
    task: str = "multiclass"
    splits: Mapping[str, np.ndarray] = NONE
    extra: Mapping[str, np.ndarray] = NONE
    columns: tuple[Column, ...] | None = None
    class_names: tuple[str, ...] = ()
    views: np.ndarray | None = None
    left_out: tuple[str, ...] = ()


def priors(labels: np.ndarray, num_classes: int, task: str = "multiclass") -> np.ndarray:
    """Labels as points of the simplex, f32[N, K], as a step reads them.

    A class becomes one-hot; a graded label stays. Several labels of one sample share the mass
    equally, and an extra last class stands for none of them:

        q_k = y_k / sum_j y_j,   q_K = 1 where y = 0

    so that mixing, scores and soft labels work with a softmax.

    >>> priors(np.array([2, 0]), 3).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    >>> priors(np.array([[1, 1], [0, 0]]), 3, "multilabel").tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]

    Args:
      labels: i[N] classes, f[N, K] in the simplex, or {0, 1}[N, K - 1] for the task "multilabel".
      num_classes: K.
      task: one of `TASKS`.

    Raises:
      ValueError: an unknown task; labels that do not fit it or the number of classes; more classes
        than 2^20, or than fit into memory.

    Source: Mahajan et al., "Exploring the Limits of Weakly Supervised Pretraining", ECCV 2018,
    section 2.2 (their k labels with 1 / k each).
    """
    checks.choice(TASKS, task=task)
    checks.within(1, MOST_CLASSES, num_classes=num_classes)
    labels = np.asarray(labels)
    if labels.ndim == 1:
        checks.integers(num_classes, labels=labels)
        return _one_hot(labels, num_classes)
    width = num_classes - (task == "multilabel")
    if labels.ndim != 2 or labels.shape[1] != width:
        raise ValueError(
            f"labels must have shape [N] or [N, {width}] for {num_classes} classes of {task}; "
            f"given {list(labels.shape)}"
        )
    if task != "multilabel":
        checks.simplex(labels=labels)
        return labels.astype(np.float32)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("multilabel labels must be 0 or 1; given others")
    with_none = np.column_stack([labels, ~labels.any(1)]).astype(np.float32)
    return with_none / with_none.sum(1, keepdims=True)


def _one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """f32[N, K], and no K by K."""
    try:
        rows = np.zeros((len(labels), num_classes), np.float32)
    except MemoryError as error:
        raise ValueError(
            f"num_classes must be small enough for {len(labels)} dense labels in memory; given "
            f"{num_classes}"
        ) from error
    rows[np.arange(len(labels)), labels] = 1
    return rows


def digits() -> Source:
    """Handwritten digits: 1,797 grey images of 8x8, 10 classes (UCI, via scikit-learn).

    >>> digits().inputs.shape
    (1797, 8, 8, 1)
    """
    with optional("scikit-learn"):
        from sklearn import datasets

    data = datasets.load_digits()
    return Source((data.images[..., None] / 16).astype(np.float32), data.target, 10)


def wdbc() -> Source:
    """Wisconsin breast cancer: 569 rows, 30 numeric columns, 2 classes (UCI, via scikit-learn).

    >>> wdbc().class_names
    ('malignant', 'benign')
    """
    with optional("scikit-learn"):
        from sklearn import datasets

    data = datasets.load_breast_cancer()
    columns = tuple(Column(str(name), None) for name in data.feature_names)
    names = tuple(map(str, data.target_names))
    return Source(data.data, data.target, 2, columns=columns, class_names=names)


SOURCES = {"digits": digits, "wdbc": wdbc}


def from_npz(path: str | os.PathLike, *, task: str | None = None) -> Source:
    """A file of arrays: images or features, and labels; or in the format of MedMNIST.

    A file of arrays has "labels" [N] (integers or texts) and "images" [N, H, W] or [N, H, W, C],
    8-bit or floats in [0, 1], or "features" f[N, D]. Optional: "trusted" bool[N], whose rows become
    the validation split.

    A file of MedMNIST has {train,val,test}_images and {train,val,test}_labels. Images are
    uint8[n, H, W] or uint8[n, H, W, 3]; labels are [n, 1], or 0 and 1 in [n, C] with C > 1 for
    several labels per sample.

    >>> import tempfile
    >>> arrays = {f"{split}_images": np.zeros((2, 4, 4), np.uint8) for split in SPLITS}
    >>> arrays |= {f"{split}_labels": np.array([[0], [1]]) for split in SPLITS}
    >>> with tempfile.TemporaryFile() as file:
    ...     np.savez(file, **arrays)
    ...     _ = file.seek(0)
    ...     source = from_npz(file)
    >>> source.inputs.shape, source.splits["test"].tolist()
    ((6, 4, 4, 1), [4, 5])

    Args:
      path: the file.
      task: "ordinal" for classes in order; None = by the labels' width.

    Raises:
      ValueError: another kind of file, or a truncated one; an array that is missing or does not fit
        the others; labels that are not classes.

    Source: Yang et al., "MedMNIST v2", Scientific Data 2023.
    """
    checks.choice(("multiclass", "ordinal"), task=task or "multiclass")
    try:
        with np.load(path) as file:
            wanted = [f"{split}_{kind}" for kind in ("images", "labels") for split in SPLITS]
            plain, missing = "labels" in file, [name for name in wanted if name not in file]
            if missing and not plain:
                raise ValueError(
                    f"it has {sorted(file)}"
                    + f", and no {', '.join(missing)}" * (len(missing) < len(wanted))
                )
            arrays = {name: file[name] for name in (file if plain else wanted)}
    except FileNotFoundError:
        raise
    except (
        *(OSError, ValueError, EOFError, TypeError, AttributeError, MemoryError),
        zipfile.BadZipFile,
    ) as error:
        reason = error if zipfile.is_zipfile(path) else "it is no zip archive"
        if "allow_pickle" in str(reason):
            reason = "it holds Python objects; of texts, .astype(str) makes an array"
        raise ValueError(
            f"{path} must be an .npz file with labels and images or features, or with "
            f"{{train,val,test}}_{{images,labels}}: {reason}"
        ) from error
    if plain:
        return _from_arrays(path, arrays, task)
    images, labels = ([arrays[f"{s}_{kind}"] for s in SPLITS] for kind in ("images", "labels"))
    pixels, width = images[0].shape[1:], labels[0].shape[1:]
    for split, x, y in zip(SPLITS, images, labels):
        arrays_fit = x.dtype == np.uint8 and y.dtype.kind in "biu" and len(x) == len(y) > 0
        images_fit = x.shape[1:] == pixels and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 3))
        if not arrays_fit or not images_fit or y.ndim != 2 or y.shape[1:] != width:
            raise ValueError(
                f"{path} must hold in each split images uint8[n, H, W] or [n, H, W, 3] and labels "
                f"of integers [n, C], of one shape; given in {split} {x.dtype}{list(x.shape)} and "
                f"{y.dtype}{list(y.shape)}"
            )
    splits = ranges(dict(zip(SPLITS, map(len, labels))))
    x, y = np.concatenate(images), np.concatenate(labels).astype(np.int64)
    x = x[..., None] if x.ndim == 3 else x
    if width[0] > 1:
        if task or not np.isin(y, (0, 1)).all():
            raise ValueError(
                f"{path} has {width[0]} labels at once, which must be 0 or 1, and task None; given "
                f"{np.unique(y)[:5].tolist()} and {task!r}"
            )
        return Source(x, y, width[0] + 1, "multilabel", splits)
    y = y[:, 0]
    if y.min() < 0 or y.max() < 1:
        raise ValueError(
            f"{path} must have labels >= 0 of two or more classes; given {y.min()} to {y.max()}"
        )
    if y.max() >= len(y):
        raise ValueError(
            f"{path} must have fewer classes than its {len(y)} samples, from 0 on; given a label "
            f"of {y.max()}"
        )
    return Source(x, y, int(y.max()) + 1, task or "multiclass", splits)


def _from_arrays(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], task: str | None
) -> Source:
    """The set of a file with "labels", and "images" or "features"."""
    checks.known(str(path), arrays, ("images", "features", "labels", "trusted"))
    kinds = [kind for kind in ("images", "features") if kind in arrays]
    if len(kinds) != 1:
        raise ValueError(f"{path} must hold images or features beside labels; given {kinds}")
    inputs, labels = arrays[kinds[0]], arrays["labels"]
    if kinds == ["images"] and inputs.ndim == 3:
        inputs = inputs[..., None]
    ranks = {"images": 4, "features": 2}
    fits = inputs.ndim == ranks[kinds[0]] and inputs.dtype.kind in "uif" and len(inputs) > 0
    if not fits or (
        kinds == ["images"] and not (inputs.dtype == np.uint8 or inputs.dtype.kind == "f")
    ):
        raise ValueError(
            f"{path} must hold images of 8 bits or floats [N, H, W] or [N, H, W, C], or features "
            f"[N, D]; given {kinds[0]} {inputs.dtype}{list(inputs.shape)}"
        )
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(inputs),) or labels.dtype.kind not in "biuU":
        raise ValueError(
            f"{path} must hold labels of integers or texts [{len(inputs)}], one for each of its "
            f"{kinds[0]}; given {labels.dtype}{list(labels.shape)}"
        )
    if kinds == ["images"] and inputs.dtype.kind == "f":
        checks.finite(**{f"{path}: images": inputs})
        checks.pixels(**{f"{path}: images": inputs})
    names, labels = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{path} must hold labels of two or more classes; given {names.tolist()}")
    columns, splits = None, {}
    if kinds == ["features"]:
        columns = tuple(Column(f"feature {d}", None) for d in range(inputs.shape[1]))
    if "trusted" in arrays:
        known = arrays["trusted"]
        if known.dtype != bool or known.shape != labels.shape or known.all() or not known.any():
            raise ValueError(
                f"{path} must hold trusted bool[{len(labels)}], True for some rows; given "
                f"{known.dtype}{list(known.shape)}, {int(np.sum(known))} True"
            )
        splits = {"train": np.flatnonzero(~known), "val": np.flatnonzero(known)}
    texts = tuple(map(str, names.tolist()))
    return Source(
        inputs, labels, len(names), task or "multiclass", splits, columns=columns, class_names=texts
    )


def from_folder(
    path: str | os.PathLike, *, size: tuple[int, int] | None = None, channels: int | None = None
) -> Source:
    """Image files [SPLIT/]CLASS/FILE, decoded on access; SPLIT is train, val or test.

    Classes are the names of the folders, sorted, over all splits. `extra["file"]` has the files'
    names, from the folder on. Hidden names, such as `.ipynb_checkpoints`, are skipped. `left_out`
    names files of other kinds (by their suffix) and all in folders of a class's folder.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         (pathlib.Path(folder) / name).mkdir()
    ...         Image.new("RGB", (6, 4)).save(pathlib.Path(folder) / name / "0.png")
    ...     source = from_folder(folder)
    ...     shape = source.inputs[:2].shape
    >>> source.class_names, source.labels.tolist(), shape
    (('cat', 'dog'), [0, 1], (2, 4, 6, 3))

    Args:
      path: the folder.
      size: (H, W) to resize all images to (bilinear); None = they all have one size.
      channels: 1 or 3; None = the files' own.

    Raises:
      ImportError: Pillow is not installed.
      ValueError: a class without images, fewer than two classes, other folders next to splits; or
        as `images.image_rows`.
    """
    root = pathlib.Path(path)
    named = [s for s in SPLITS if (root / s).is_dir()]
    files, folders, sizes, left_out = [], [], {}, []
    others = [p.name for p in visible(root) if p.is_dir() and p.name not in named]
    if named and others:
        raise ValueError(f"{root} must hold splits {SPLITS} or classes; given {named} and {others}")
    for top in [root / s for s in named] or [root]:
        before = len(files)
        for folder in (p for p in visible(top) if p.is_dir()):
            images = images_in(folder)
            if not images:
                raise ValueError(f"{folder} must hold images {SUFFIXES}; given none")
            files += images
            left_out += sorted({*files_in(folder)} - {*images})
            folders += [folder.name] * len(images)
        sizes[top.name] = len(files) - before
    if not files:
        raise ValueError(f"{root} must hold images [SPLIT/]CLASS/FILE; given none")
    names, labels = np.unique(folders, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{root} must hold at least two classes; given {names.tolist()}")
    relative, others = (
        [file.relative_to(root).as_posix() for file in part] for part in (files, left_out)
    )
    return Source(
        image_rows(files, size=size, channels=channels),
        labels,
        len(names),
        splits=ranges(sizes) if named else {},
        extra={"file": np.array(relative)},
        class_names=tuple(names.tolist()),
        left_out=tuple(others),
    )


def from_tfds(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image: str = "image",
    label: str = "label",
) -> Source:
    """A data set that TFDS prepared as ArrayRecord, read without TensorFlow.

    >>> source = from_tfds("cifar10")  # doctest: +SKIP

    Args:
      name: "cifar10", or with a version "cifar10:3.0.2".
      data_dir: where it was prepared; None = TFDS's default.
      image, label: names of its features.

    Raises:
      ImportError: tensorflow_datasets is not installed.
      ValueError: not prepared there as ArrayRecord, or without these features.
    """
    with optional("tensorflow_datasets"):
        import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        tables = {s: builder.as_data_source(split=s) for s in builder.info.splits}
        if not tables:
            raise ValueError("nothing is there")
    except Exception as error:  # many kinds, by what is missing
        raise ValueError(
            f"{name} must be prepared as ArrayRecord in {data_dir or 'the default folder'}: "
            f'builder.download_and_prepare(file_format="array_record"), once, with TensorFlow; '
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    features = builder.info.features
    if not {image, label} <= set(features):
        raise ValueError(
            f"{name} must have the features {image!r} and {label!r}; given {sorted(features)}"
        )
    first = np.asarray(next(iter(tables.values()))[0][image])

    def rows(table):
        def read(places):
            # With the first record: zero rows have a shape too, and another shape is refused.
            return np.stack([first, *(r[image] for r in table.__getitems__(places.tolist()))])[1:]

        return Rows(read, len(table), first.shape, first.dtype)

    undecoded = {image: tfds.decode.SkipDecoding()}
    labels = [
        record[label]
        for split in tables
        for record in builder.as_data_source(split=split, decoders=undecoded)
    ]
    return Source(
        functools.reduce(joined, map(rows, tables.values())),
        np.array(labels).astype(np.int64),
        features[label].num_classes,
        splits=ranges({split: len(table) for split, table in tables.items()}),
        class_names=tuple(features[label].names or ()),
    )


def from_table(path: str | os.PathLike, **options) -> Source:
    """A CSV, ARFF or KEEL file.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     _ = file.write("age,class\\n31,no\\n45,yes\\n")
    ...     file.flush()
    ...     from_table(file.name).labels.tolist()
    [0, 1]

    Args:
      path: the file.
      **options: see `tables.read_table`.
    """
    table = read_table(path, **options)
    return Source(
        table.values,
        table.labels,
        len(table.class_names),
        columns=table.columns,
        class_names=table.class_names,
    )


def ranges(sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The rows of consecutive splits: name -> i[size].

    >>> {name: rows.tolist() for name, rows in ranges({"train": 3, "test": 2}).items()}
    {'train': [0, 1, 2], 'test': [3, 4]}
    """
    ends = np.cumsum(list(sizes.values()))
    return {name: np.arange(end - size, end) for end, (name, size) in zip(ends, sizes.items())}
