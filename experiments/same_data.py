"""What ties runs to their data: beliefs are kept by row, and mean nothing of other rows."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import task
from experiments.configs import sources
from saflex_jax import train

FILE = "data.json"  # in the folder of a run; runs from before it have none


def keep(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes down which data a run reads, before it trains."""
    train.write_whole(workdir / FILE, json.dumps({"asked": _asked(config), "digest": _of(config)}))


def check(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Raises ValueError if a run's config reads other data now than when it trained.

    Of another config nothing is said: it may read other data, and checkpoints refuse it.
    """
    if not (workdir / FILE).exists():
        return
    kept, asked = json.loads((workdir / FILE).read_text()), _asked(config)
    if {**sources.DEFAULTS, **kept["asked"]} == asked and kept["digest"] != _of(config):
        section = config.data
        what = f"{section.name} or {section.trusted}" if section.trusted else section.name
        raise ValueError(
            f"{what} has changed since the run: inputs, labels or splits differ from those that "
            f"{workdir} was trained on. Undo that, or train anew with another --workdir"
        )


def _asked(config: ConfigDict) -> dict[str, Any]:
    """What decides which rows are read, while the files stay as they are."""
    return {**sources.DEFAULTS, **json.loads(config.data.to_json()), "seed": config.seed}


def _of(config: ConfigDict) -> str:
    """A digest of all inputs and labels, and of the rows that train, validate and test."""
    source, prints, split, _ = task.make_split_source(config)
    return _digest(prints, source.labels, *split)


def digests(config: ConfigDict) -> dict[str, str]:
    """Of all inputs, of all labels, and of the rows that train, validate and test, one each."""
    source, prints, split, _ = task.make_split_source(config)
    return {
        "inputs": _digest(prints),
        "labels": _digest(source.labels),
        "splits": _digest(*split),
    }


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for rows in arrays:
        digest.update(np.asarray(rows).tobytes())
    return digest.hexdigest()
