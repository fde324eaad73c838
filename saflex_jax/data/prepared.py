"""The format of prepared data sets: a folder with dataset.json and arrays or image files.

`write_prepared` writes the format and `from_prepared` reads it; nothing else knows it.
`python -m experiments.prepare` fetches the data.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from saflex_jax import checks
from saflex_jax.data.sources import NONE, Source, from_folder, from_npz
from saflex_jax.data.tables import Column

DESCRIPTION = "dataset.json"
FORMAT = 1
KINDS = ("arrays", "folder", "npz")


class Description(NamedTuple):
    """The content of dataset.json.

    An example is at `write_prepared`.

    Attributes:
      name: of the data set.
      kind: "arrays": inputs.npy, labels.npy and extra_<name>.npy, as in `Source`; "folder": image
        files, as `from_folder` reads them; "npz": <name>.npz, as `from_npz` reads it.
      task: as in `Source`.
      num_classes: K.
      class_names: in the order of the labels; () for none.
      channels: of the images of a folder; None = the files' own, the same for all.
      splits: of arrays: name -> (begin, end) of its rows; {} without an official split.
      counts: of arrays: split (or "all") -> rows of each class, or of each different label if
        labels are graded; of a folder: folder -> files; of npz: split -> rows.
      licence: as the source of the data states it.
      columns: of a table; None if inputs are not a table.
      sha256: file -> digest; "." for all files of a folder.
      origin: where the data come from.
    """

    name: str
    kind: str
    task: str
    num_classes: int
    class_names: tuple[str, ...] = ()
    channels: int | None = None
    splits: Mapping[str, tuple[int, int]] = NONE
    counts: Mapping[str, tuple[int, ...] | int] = NONE
    licence: str = ""
    columns: tuple[Column, ...] | None = None
    sha256: Mapping[str, str] = NONE
    origin: str = ""


def write_prepared(
    path: str | os.PathLike, description: Description, arrays: Mapping[str, np.ndarray] = NONE
) -> Description:
    """Writes arrays and dataset.json into an existing folder.

    For other kinds than "arrays" the folder already holds the files. Files are written in place:
    write into a scratch folder and rename it, so that a prepared folder is always complete.

    >>> import tempfile
    >>> about = Description("tiny", "arrays", "multiclass", 2, splits={"train": (0, 2)})
    >>> arrays = {"inputs": np.eye(3), "labels": np.array([0, 1, 1])}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     counts = write_prepared(folder, about, arrays).counts
    ...     source = from_prepared(folder)
    >>> counts, source.labels.tolist()
    ({'train': (1, 1)}, [0, 1, 1])

    Args:
      path: the folder.
      description: counts and sha256 are computed from the folder.
      arrays: "inputs", "labels" and "extra_<name>", for the kind "arrays".

    Returns:
      The description as written.

    Raises:
      ValueError: an unknown kind; splits that are not ranges of the rows.
    """
    checks.choice(KINDS, **{"description.kind": description.kind})
    root = pathlib.Path(path)
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", np.ascontiguousarray(array))
    written = description._replace(
        counts=_counts(root, description), sha256=digests(root, description.kind)
    )
    fields = {"format": FORMAT, **written._asdict()}
    if written.columns is not None:
        fields["columns"] = [column._asdict() for column in written.columns]
    (root / DESCRIPTION).write_text(json.dumps(fields, indent=1, default=dict))
    return written


def read_description(path: str | os.PathLike) -> Description:
    """The description in a folder's dataset.json.

    Raises:
      ValueError: none, or one of another format; says how to prepare the data set.
    """
    root = pathlib.Path(path)
    try:
        fields = json.loads((root / DESCRIPTION).read_text())
        if fields["format"] != FORMAT:
            raise ValueError(f"its format must be {FORMAT}; given {fields['format']}")
        return _parsed(fields)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{root} must be a prepared data set: python -m experiments.prepare {root.name} "
            f"--out {root.parent}; {error}"
        ) from error


def from_prepared(path: str | os.PathLike, *, size: tuple[int, int] | None = None) -> Source:
    """A prepared data set: a folder with a dataset.json, as `write_prepared` makes it.

    Arrays are memory-mapped. An example is at `write_prepared`.

    Args:
      path: the folder.
      size: (H, W) of images in files, as for `from_folder`.

    Raises:
      ValueError: no such folder, or one of another format; or as `from_folder` and `from_npz`.
    """
    root = pathlib.Path(path)
    about = read_description(root)
    if about.kind == "npz":
        task = "ordinal" if about.task == "ordinal" else None
        source = from_npz(root / f"{about.name}.npz", task=task)
        return source._replace(class_names=about.class_names)
    if about.kind == "folder":
        return from_folder(root, size=size, channels=about.channels)
    extra = sorted(root.glob("extra_*.npy"))
    return Source(
        np.load(root / "inputs.npy", mmap_mode="r"),
        np.load(root / "labels.npy"),
        about.num_classes,
        about.task,
        {name: np.arange(*ends) for name, ends in about.splits.items()},
        {p.stem.removeprefix("extra_"): np.load(p) for p in extra},
        about.columns,
        about.class_names,
    )


def digests(path: str | os.PathLike, kind: str) -> dict[str, str]:
    """File -> SHA-256; for a folder of images one digest, named "."."""
    root = pathlib.Path(path)
    if kind != "folder":
        return {p.name: file_digest(p) for p in sorted(root.glob("*.np[yz]"))}
    total = hashlib.sha256()
    for file in _image_files(root):
        total.update(f"{file.relative_to(root).as_posix()} {file_digest(file)}\n".encode())
    return {".": total.hexdigest()}


def file_digest(path: str | os.PathLike, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes; for .npy these are its dtype, shape and values."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _image_files(root: pathlib.Path) -> list[pathlib.Path]:
    files = (p for p in root.rglob("*") if p.is_file())
    return sorted(p for p in files if p != root / DESCRIPTION)


def _counts(root: pathlib.Path, about: Description) -> dict[str, Any]:
    """What is in the folder, in the form of `Description.counts`."""
    if about.kind == "folder":
        return dict(
            collections.Counter(p.parent.relative_to(root).as_posix() for p in _image_files(root))
        )
    if about.kind == "npz":
        with np.load(root / f"{about.name}.npz") as file:
            labels = [name for name in file if name.endswith("_labels")]
            return {name.removesuffix("_labels"): len(file[name]) for name in labels}
    labels, num_kinds = np.load(root / "labels.npy"), about.num_classes
    splits = about.splits or {"all": (0, len(labels))}
    for name, (begin, end) in splits.items():
        if not 0 <= begin < end <= len(labels):
            raise ValueError(
                f"splits[{name!r}] must be (begin, end) with 0 <= begin < end <= {len(labels)}; "
                f"given {begin, end}"
            )
    if labels.ndim == 2:
        # Sorted by the last class first: of two classes, by the grade of the second.
        distinct, labels = np.unique(labels[:, ::-1], axis=0, return_inverse=True)
        labels, num_kinds = labels.reshape(-1), len(distinct)
    return {
        name: tuple(np.bincount(labels[begin:end], minlength=num_kinds).tolist())
        for name, (begin, end) in splits.items()
    }


def _parsed(fields: Mapping[str, Any]) -> Description:
    """A Description from JSON: lists become tuples, columns become `Column`."""
    known = {name: fields[name] for name in Description._fields if name in fields}
    about = Description(**known)
    columns = about.columns and tuple(
        Column(c["name"], _tuple(c["categories"])) for c in about.columns
    )
    return about._replace(
        class_names=tuple(about.class_names),
        splits={name: tuple(ends) for name, ends in about.splits.items()},
        counts={name: _tuple(count) for name, count in about.counts.items()},
        columns=columns or None,
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Iterable) else value
