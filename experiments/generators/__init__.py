"""What makes candidates of samples: one small file for each generator, found here by its name.

    make(Options, Originals) -> Generator ;   Generator.make(Request) -> Made

A request holds everything that a candidate depends on, its own seed among it: the same request
makes the same candidate, whatever was made before it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saflex_jax import checks

# name -> module in this folder
GENERATORS = {
    "edits": "edits",
    "image_to_image": "image_to_image",
    "text_to_image": "text_to_image",
    "instruct_pix2pix": "instruct_pix2pix",
}
LABEL = "{label}"  # in a prompt: the name of the source's class


class Options(NamedTuple):
    """What fixes a generator.

    Attributes:
      model: a name on a hub, or a folder; "" where the generator has none.
      revision: of the model; "" = the newest.
      pixels: side of the images that the model sees; 0 = the data set's own.
      device: torch's; "" = the fastest that it has.
      dtype: of the model's parameters.
    """

    model: str = ""
    revision: str = ""
    pixels: int = 512
    device: str = ""
    dtype: str = "float32"


class Originals(NamedTuple):
    """The samples that candidates may be made of.

    Attributes:
      rows: i[S], sorted: their places in the data set.
      labels: i[S], their classes.
      read: row of the data set -> uint8[H, W, C].
    """

    rows: np.ndarray
    labels: np.ndarray
    read: Callable[[int], np.ndarray]


class Request(NamedTuple):
    """One candidate to be made.

    Attributes:
      image: uint8[H, W, C] of the source sample; C is 1 or 3.
      source: its row in the data set.
      label: its class.
      prompt: in the generator's language.
      strength: in [0, 1], how far from the source.
      guidance: >= 0, how literally the prompt is taken.
      steps: >= 1, of a sampler.
      seed: of this candidate alone.
    """

    image: np.ndarray
    source: int
    label: int
    prompt: str
    strength: float
    guidance: float
    steps: int
    seed: int


class Made(NamedTuple):
    """A candidate: uint8[H, W, C] of the source's shape, and what else is known of it."""

    image: np.ndarray
    known: Mapping[str, Any]


class Generator(NamedTuple):
    """A generator that is ready.

    Attributes:
      make: Request -> Made.
      about: of metadata.jsonl: "model", "revision" and "versions", package -> version.
    """

    make: Callable[[Request], Made]
    about: Mapping[str, Any]


def find(name: str):
    """The module of a generator: `make(options, originals)` and `check(prompts, strengths, steps)`.

    Raises:
      ValueError: an unknown name.
    """
    checks.choice(GENERATORS, **{"--generator": name})
    return importlib.import_module(f"{__name__}.{GENERATORS[name]}")


def check_each(name: str, values: Sequence[float], low: float, high: float) -> None:
    """Raises ValueError unless there are values, and all lie in [low, high]."""
    if not values or not all(low <= value <= high for value in values):
        raise ValueError(f"{name} must be numbers in [{low}, {high}]; given {list(values)}")
