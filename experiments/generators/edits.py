"""Edits between real images, without torch: colour, texture or background of another image.

The prompt names the edit. The other image is drawn from the source's own class, so that the label
stays; "wrong class" plants an error, for tests: another class's image under the source's label.
"augment: TEXT" is a pipeline of `saflex_jax.augment`.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.generators import Generator, Made, Options, Originals, Request, check_each
from saflex_jax import augment, checks
from saflex_jax.types import Batch

WRONG = "wrong class"
PIPELINE = "augment:"


def color(image: np.ndarray, other: np.ndarray, strength: float) -> np.ndarray:
    """Gives each channel the mean and deviation of the other's.

        x <- x + a ((x - m) s' / s + m' - x)

    Args:
      image, other: f32[H, W, C] in [0, 1].
      strength: a, in [0, 1].

    Source: Reinhard et al., "Color Transfer between Images", 2001, in RGB.
    """
    mean, spread = image.mean((0, 1)), image.std((0, 1))
    target = (image - mean) * other.std((0, 1)) / np.maximum(spread, 1e-3) + other.mean((0, 1))
    return image + strength * (target - image)


def texture(image: np.ndarray, other: np.ndarray, strength: float) -> np.ndarray:
    """Moves the amplitudes of high frequencies to the other's; phases, which are shapes, stay.

        |X_f| <- |X_f| + a (|X'_f| - |X_f|)   for |f| above an eighth of the sampling rate

    Args:
      image, other, strength: as of `color`.

    Source: the amplitude swap of Yang and Soatto, "FDA", CVPR 2020, which takes low frequencies.
    """
    spectrum, theirs = (np.fft.fft2(x, axes=(0, 1)) for x in (image, other))
    rows, columns = (np.fft.fftfreq(side) for side in image.shape[:2])
    high = (np.hypot(rows[:, None], columns[None]) > 1 / 8)[..., None]
    change = strength * high * (np.abs(theirs) - np.abs(spectrum))
    moved = (np.abs(spectrum) + change) * np.exp(1j * np.angle(spectrum))
    return np.fft.ifft2(moved, axes=(0, 1)).real


def background(image: np.ndarray, other: np.ndarray, strength: float) -> np.ndarray:
    """Blends the other's pixels in where the image looks like its own border.

        x <- x + a b (x' - x) ,   b = exp(-(d / s)^2)

    with d the distance of a pixel's colour from the border's median, and s the mean of d.

    Args:
      image, other, strength: as of `color`.
    """
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    distance = np.linalg.norm(image - np.median(border, axis=0), axis=-1)
    likeness = np.exp(-((distance / max(float(distance.mean()), 1e-3)) ** 2))
    return image + strength * likeness[..., None] * (other - image)


def _replaced(image: np.ndarray, other: np.ndarray, strength: float) -> np.ndarray:
    del image, strength
    return other


SWAPS: dict[str, Callable] = {
    "color": color,
    "texture": texture,
    "background": background,
    WRONG: _replaced,
}


@functools.cache
def _pipeline(text: str) -> Callable[[int, np.ndarray], np.ndarray]:
    """(seed, f32[H, W, C]) -> the image under a pipeline, compiled once."""
    pipeline = augment.parse(text)

    @jax.jit
    def apply(seed, image):
        batch = Batch(image[None], jnp.ones((1, 1)), jnp.ones(1, bool), jnp.zeros(1, jnp.int32))
        return pipeline(jax.random.key(seed), batch).inputs[0]

    return lambda seed, image: np.asarray(apply(seed, image))


def check(prompts: Sequence[str], strengths: Sequence[float], steps: int) -> None:
    """Raises ValueError on a prompt that names no edit, or a strength outside [0, 1]."""
    del steps
    for prompt in prompts:
        if prompt.startswith(PIPELINE):
            augment.parse(prompt.removeprefix(PIPELINE))
        else:
            checks.choice((*SWAPS, f"{PIPELINE} flip"), **{"--prompt": prompt})
    check_each("--strength", strengths, 0.0, 1.0)


def make(options: Options, originals: Originals) -> Generator:
    """The generator; it reads other images among `originals` alone.

    Raises:
      ValueError: "wrong class" is asked for (on a request) where there is one class.
    """
    del options

    def candidate(request: Request) -> Made:
        image = request.image.astype(np.float32) / 255
        if request.prompt.startswith(PIPELINE):
            made = _pipeline(request.prompt.removeprefix(PIPELINE))(request.seed, image)
            return Made(_bytes(made), {"known_label": request.label})
        wrong = request.prompt == WRONG
        fitting = (originals.labels != request.label) == wrong
        fitting &= originals.rows != request.source
        if wrong and not fitting.any():
            raise ValueError(f"--prompt {WRONG!r} needs sources of two classes; given one")
        partner, label = request.source, request.label  # of a class of one sample, its own
        if fitting.any():
            place = np.random.default_rng(request.seed).choice(np.flatnonzero(fitting))
            partner, label = int(originals.rows[place]), int(originals.labels[place])
        other = originals.read(partner).astype(np.float32) / 255
        made = SWAPS[request.prompt](image, other, request.strength)
        return Made(_bytes(made), {"partner": partner, "known_label": label})

    versions = {"numpy": np.__version__, "jax": jax.__version__}
    versions["saflex_jax"] = importlib.metadata.version("saflex_jax")
    return Generator(candidate, {"model": "edits", "revision": "1", "versions": versions})


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
