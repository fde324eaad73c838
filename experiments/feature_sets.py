"""Feature sets in the place of images: where they are, and the inputs of one seed."""

from __future__ import annotations

import functools
import pathlib

import numpy as np
from ml_collections import ConfigDict

from saflex_jax import data


def feature_folder(folder: str, name: str, tag: str) -> pathlib.Path:
    """Where `experiments.features` puts the set TAG of a data set."""
    return pathlib.Path(folder) / "features" / pathlib.Path(name).name.replace(":", "-") / tag


def corrupted_tag(tag: str, corrupt: str) -> str:
    """The set of TAG's corrupted test rows; TAG itself where `corrupt` is empty."""
    return f"{tag}.{corrupt.replace(':', '-')}" if corrupt else tag


@functools.lru_cache(maxsize=4)
def feature_set(name: str, folder: str, tag: str) -> data.Features:
    """The set TAG of a data set; NAME@TAG names one of another tag.

    Raises:
      ValueError: no tag; it was not computed (says how).
    """
    name, _, own = name.partition("@")
    if not (own or tag):
        raise ValueError(f"a set of features must be named NAME@TAG; given {name!r}")
    return data.from_features(feature_folder(folder, name, own or tag))


def corrupted_features(section: ConfigDict, source: data.Source, rows: np.ndarray) -> data.Rows:
    """Features f16[n, D] of the given rows, corrupted: from the set "TAG.fog-3".

    Raises:
      ValueError: it was not computed, lacks rows, or was made by another network.
    """
    other = bool(section.test_on) and "=" not in section.test_on
    name = section.test_on if other else section.name
    base, _, tag = name.partition("@")
    tag = tag or section.features
    clean = feature_set(base, section.dir, tag)
    changed = feature_set(base, section.dir, corrupted_tag(tag, section.corrupt))
    for option in ("backbone", "weights", "size", "pixels"):
        if changed.options[option] != clean.options[option]:
            raise ValueError(
                f"config.data.corrupt needs features of the same {option}; those of {base} have "
                f"{clean.options[option]!r} and {changed.options[option]!r}"
            )
    wanted = clean.rows[rows - (len(source.labels) - len(clean.rows) if other else 0)]
    order = np.argsort(changed.rows)
    places = np.searchsorted(changed.rows, wanted, sorter=order)
    found = order[np.minimum(places, len(order) - 1)]
    missing = int((changed.rows[found] != wanted).sum())
    if missing:
        raise ValueError(
            f"config.data.corrupt must be '' where other rows are tested than the official test "
            f"split's, which the corrupted features are of; {missing} are missing"
        )
    return data.subset(changed.source.inputs, found)


def feature_inputs(section: ConfigDict, source: data.Source, split: data.Split) -> tuple:
    """`split_inputs` of features, standardised by view 0 of the training rows."""
    scale = data.fit_scale(source.inputs[split.train])
    tested = data.subset(source.inputs, split.test)
    if section.corrupt:
        tested = corrupted_features(section, source, split.test)
    taken = (
        *(data.subset(source.views, rows) for rows in (split.train, split.val)),
        *(data.subset(source.inputs, split.val), tested),
    )
    return tuple(np.asarray(scale(x)) for x in taken)
