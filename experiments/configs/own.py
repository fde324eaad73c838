"""Your own data: a folder of images, an .npz file or a table; labels as they are given.

Command:   saflex train --data=PATH --trusted=FILE
           which is --config="own:PATH?trusted=FILE"; every field can be set beside it. PATH may
           also name a data set of `saflex prepare --list`.
Hardware:  any CPU. 1,800 images of 8x8 pixels take 20 seconds of a core, 3,000 of 28x28 4 minutes.
Expected:  what the command says first: how many samples train, are trusted and are tested, and of
           what. On the digits of scikit-learn with 30 % wrong labels: docs/own_data.md.

What is not in the data has these values: a tenth of the samples is the validation split, or the
trusted ones are; a fifth is the test split; larger images are resized to 64 pixels.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import named_rows, task
from experiments.configs import methods, sources
from experiments.datasets import DATASETS
from saflex_jax import data
from saflex_jax._compat import optional

PEEKED = 500  # files of a folder whose size and mode are read now
UNKNOWN = 0.2  # share of wrong labels that is assumed where nobody named trusted samples
TRUSTED = "?trusted="
PIXELS = 64  # images are resized to, where they are larger or of several sizes
TABLE = {"name": "mlp", "widths": (64, 64), "norm": "none"}


def get_config(path: str = "digits") -> ConfigDict:
    """The config for a data set.

    Args:
      path: of a folder, an .npz file or a table, or the name of a data set; behind TRUSTED the
        file that names trusted samples.

    Raises:
      ValueError: nothing is there, or it cannot be split; says what to do.
    """
    name, _, trusted = path.partition(TRUSTED)
    fields: dict[str, Any] = {}
    task.check_name(name, "--data")
    if pathlib.Path(name).exists():
        if {name} & {*data.SOURCES, *DATASETS}:  # a folder of the name of a known data set
            name = f"./{name}"
        if pathlib.Path(name).is_dir():
            fields = as_read(pathlib.Path(name))
    section = sources.section(name, **fields)
    source = task.opened(name, *(section[f] for f in ("dir", "size", "task")), False,
                         section["channels"])  # fmt: skip
    if trusted:
        section["trusted"] = trusted
        source = named_rows.trusted(source, trusted)
    section |= _held_out(name, source)
    section["train_on_val"] = "val" in source.splits  # named by somebody, so trusted
    size = len(source.labels) - section["val"] - section["test"]
    images = source.columns is None
    return ConfigDict(
        {
            "seed": 0,
            "runner": "jit",
            "data": section,
            "augment": _pipeline(source.inputs.shape) if images else "feature_noise(0.1)",
            "model": _network(source.inputs.shape) if images else dict(TABLE),
            "optimizer": {"learning_rate": 1e-2 if images else 3e-3, "weight_decay": 1e-4},
            "method": methods.all_methods(rule="saflex", saflex=_rule(section)),
            "train": {"steps": _steps(size), "batch_size": _batch_size(size), "val_batch_size": 0,
                      "log_every": 100, "checkpoint_every": 500, "keep_best": False},
        }
    )  # fmt: skip


def _rule(section: Mapping[str, Any]) -> dict:
    """Nobody can learn the share of wrong labels from samples that may be as wrong."""
    return {} if section["train_on_val"] else {"rule": {"noise_rate": UNKNOWN}}


def as_read(folder: pathlib.Path) -> dict[str, int]:
    """Size and channels that all images of a folder are read with; 0 = as they are.

    Raises:
      ValueError: a file that is no image; names it.
    """
    with optional("Pillow"):
        from PIL import Image

    files = [file for file in data.images.files_in(folder) if data.images.is_image(file)]
    shapes, modes = collections.Counter(), set()
    for file in files[:: max(1, len(files) // PEEKED)]:
        try:
            with Image.open(file) as image:
                shapes[image.size] += 1
                modes.add(image.mode)
        except OSError as error:
            raise ValueError(f"{file} is no image: {error}") from error
    fields = {}
    if len(shapes) > 1 or max(map(max, shapes), default=0) > PIXELS:
        fields["size"] = min(PIXELS, int(np.median([min(shape) for shape in shapes.elements()])))
    if len(modes) > 1 or modes - {"1", "L", "P", "RGB"}:
        fields["channels"] = 1 if modes <= {"1", "L", "LA"} else 3
    return fields


def _held_out(name: str, source: data.Source) -> dict[str, int]:
    """Numbers of validation and test samples; 0 where the data set has such a split."""
    classes = task.strata(source)[source.splits.get("train", slice(None))]
    held, counts = [s for s in ("val", "test") if s not in source.splits], np.bincount(classes)
    rare = np.flatnonzero((counts < 1 + 2 * len(held)) & (counts > 0))
    if held and len(rare):
        names = source.class_names or tuple(map(str, range(source.num_classes)))
        raise ValueError(
            f"--data: each class of {name} must have {1 + 2 * len(held)} samples or more, to be "
            f"split into train and {' and '.join(held)}; {names[rare[0]]!r} has "
            f"{counts[rare[0]]}. Leave the class out, or put samples into folders train, val and "
            "test"
        )
    return task.held_out_sizes(classes, held)


def _pipeline(shape: tuple[int, ...]) -> str:
    """Nothing that can change a class: no flip, which would of letters and digits."""
    return f"shift({max(1, min(shape[1:3]) // 8)}) | affine(degrees=10, scale=0.1)"


def _network(shape: tuple[int, ...]) -> Mapping[str, Any]:
    """A small CNN whose last feature map has 4 x 4 pixels or so."""
    stages = int(np.clip(np.log2(max(shape[1:3])) - 1, 2, 5))
    return {"name": "small_cnn", "widths": (16, 32, 64, 128, 128)[:stages], "norm": "group"}


def _batch_size(size: int) -> int:
    """A power of two, at most 128 and a quarter of the samples."""
    return int(2 ** np.clip(np.log2(max(size, 1) / 4) // 1, 3, 7))


def _steps(size: int) -> int:
    """100 visits of a sample, but 1,500 to 6,000 steps: what is believed of it is a mean."""
    return int(np.clip(round(100 * size / _batch_size(size), -2), 1500, 6000))
