"""Small files of every kind that a data set may come from."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZES = {"train": 6, "val": 3, "test": 4}  # of what `medmnist` makes
RNG = np.random.default_rng(0)


def save(path: pathlib.Path, seed: int, shape: tuple[int, ...] = (4, 6)) -> np.ndarray:
    """Writes an image of random pixels, which are returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def medmnist(channels: int = 1, labels: int = 1, classes: int = 3) -> dict[str, np.ndarray]:
    """The arrays of a file in MedMNIST's format; every class occurs."""
    arrays = {}
    for name, size in SIZES.items():
        shape = (size, 5, 5) if channels == 1 else (size, 5, 5, 3)
        arrays[f"{name}_images"] = RNG.integers(0, 256, shape, dtype=np.uint8)
        high = classes if labels == 1 else 2
        arrays[f"{name}_labels"] = RNG.integers(0, high, (size, labels)).astype(np.uint8)
    arrays["train_labels"][0] = classes - 1 if labels == 1 else 1
    return arrays


def prepared(folder: pathlib.Path, **changes) -> pathlib.Path:
    """Writes dataset.json by hand; arrays are left to the caller."""
    about = {
        "format": 1,
        "name": "x",
        "kind": "arrays",
        "task": "multiclass",
        "num_classes": 2,
        "class_names": ["no", "yes"],
        "channels": None,
        "columns": None,
        "splits": {"train": [0, 3], "test": [3, 5]},
    }
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(about | changes))
    return folder


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Images as plain tensors, which TFDS prepares without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS would look for a checksum file beside this one

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(20)),
            "test": self._generate_examples(range(20, 29)),
        }

    def _generate_examples(self, numbers):
        for number in numbers:  # the image names the example
            yield number, {"image": np.full((4, 4, 1), number, np.uint8), "label": number % 3}
