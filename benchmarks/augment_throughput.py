"""Images per second of RandAugment(2, 9), here and in other libraries.

    python -m benchmarks.augment_throughput [--json] [--out FILE] [--rounds N]

All in one run, on the same crops of photographs, the libraries in turn. Each is given one array of
images in the dtype that it works on and hands one back, as training needs it; decoding is not
timed. Each uses its default threads. Images per second are those of all rounds together: some
libraries draw their operations once for a batch, so that one batch can take many times another.
A library that is missing or fails is null, with the reason. The libraries do not all do the same
work: "peers" in the JSON says what each does.

Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from sklearn.datasets import load_sample_images

from benchmarks import reporting, timing
from benchmarks.reporting import ratio
from saflex_jax import augment

OPERATIONS, MAGNITUDE, LARGEST = 2, 9, 30
STRENGTH = MAGNITUDE / LARGEST
# At this magnitude, by torchvision's ranges.
DEGREES, SLOPE, BLEND = 30 * STRENGTH, 0.3 * STRENGTH, 0.9 * STRENGTH
BITS = 8 - round(MAGNITUDE / (LARGEST / 4))
BATCH_SIZES = {32: 256, 224: 32}  # by the side of the images
SECONDS = 0.2  # of one job in one round


def pixels_moved(side: int) -> int:
    """By a translation."""
    return int(150 / 331 * side * STRENGTH)


def crops(side: int, size: int) -> np.ndarray:
    """u8[size, side, side, 3], crops of scikit-learn's two photographs, always the same."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)

    def crop():
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(extent - side + 1) for extent in photograph.shape[:2])
        return photograph[top : top + side, left : left + side]

    return np.stack([crop() for _ in range(size)])


def floats(images: np.ndarray) -> np.ndarray:
    """u8 -> f32 in [0, 1]."""
    return images.astype(np.float32) / 255


# --- the libraries: u8[B, H, W, 3] -> a job that augments the batch once, anew in every call.
# What they do is in their docstrings, for the JSON.


def saflex_jax(images: np.ndarray) -> timing.Job:
    """f32, 2 of 14 operations and signs drawn for every image; jit"""
    pipeline = augment.randaugment(OPERATIONS, MAGNITUDE)
    compiled = jax.jit(lambda key, call, batch: pipeline(jax.random.fold_in(key, call), batch))
    key, batch = jax.device_put((jax.random.key(0), timing.labelled(floats(images))))
    calls = itertools.count()
    return lambda: jax.block_until_ready(compiled(key, np.int32(next(calls)), batch))


def pillow_operations(side: int) -> dict[str, Callable]:
    """name -> (image, sign) -> image, the 14 operations with torchvision's ranges."""
    from PIL import Image, ImageEnhance, ImageOps

    pixels = pixels_moved(side)

    def affine(*matrix):
        signed = {
            sign: [e + sign * m for e, m in zip((1, 0, 0, 0, 1, 0), matrix)] for sign in (-1, 1)
        }
        return lambda image, sign: image.transform(
            image.size, Image.Transform.AFFINE, signed[sign], Image.Resampling.NEAREST
        )

    def enhance(kind):
        return lambda image, sign: kind(image).enhance(1 + sign * BLEND)

    return {
        "identity": lambda image, sign: image,
        "autocontrast": lambda image, sign: ImageOps.autocontrast(image),
        "equalize": lambda image, sign: ImageOps.equalize(image),
        "rotate": lambda image, sign: image.rotate(sign * DEGREES),
        "solarize": lambda image, sign: ImageOps.solarize(image, 255 * (1 - STRENGTH)),
        "color": enhance(ImageEnhance.Color),
        "posterize": lambda image, sign: ImageOps.posterize(image, BITS),
        "contrast": enhance(ImageEnhance.Contrast),
        "brightness": enhance(ImageEnhance.Brightness),
        "sharpness": enhance(ImageEnhance.Sharpness),
        "shear_x": affine(0, SLOPE, 0, 0, 0, 0),
        "shear_y": affine(0, 0, 0, SLOPE, 0, 0),
        "translate_x": affine(0, 0, pixels, 0, 0, 0),
        "translate_y": affine(0, 0, 0, 0, 0, pixels),
    }


def pillow(images: np.ndarray) -> timing.Job:
    """uint8, 2 of the same 14 and signs drawn for every image; Python loop"""
    from PIL import Image

    operations = list(pillow_operations(images.shape[1]).values())
    rng = random.Random(0)

    def augmented(pixels):
        image = Image.fromarray(pixels)
        for operation in rng.choices(operations, k=OPERATIONS):
            image = operation(image, rng.choice((-1, 1)))
        return np.asarray(image)

    return lambda: np.stack([augmented(pixels) for pixels in images])


def albumentations(images: np.ndarray) -> timing.Job:
    """uint8, 2 of the same 14 drawn for every image, one sign; Python loop"""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network otherwise
    import albumentations as A
    import cv2

    degrees, pixels = math.degrees(math.atan(SLOPE)), pixels_moved(images.shape[1])
    unchanged = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    affine = partial(A.Affine, interpolation=cv2.INTER_NEAREST, p=1)

    def enhance(name):
        return A.ColorJitter(**unchanged | {name: (1 + BLEND,) * 2}, p=1)

    operations = [
        A.NoOp(p=1),
        A.AutoContrast(method="pil", p=1),
        A.Equalize(mode="pil", p=1),
        affine(rotate=DEGREES),
        A.Solarize(threshold_range=(1 - STRENGTH, 1 - STRENGTH), p=1),
        enhance("saturation"),
        A.Posterize(num_bits=BITS, p=1),
        enhance("contrast"),
        enhance("brightness"),
        A.Sharpen(alpha=(BLEND,) * 2, lightness=(1, 1), p=1),
        affine(shear={"x": degrees, "y": 0}),
        affine(shear={"x": 0, "y": degrees}),
        affine(translate_px={"x": pixels, "y": 0}),
        affine(translate_px={"x": 0, "y": pixels}),
    ]
    some = A.SomeOf(operations, n=OPERATIONS, replace=True, p=1)
    return lambda: np.stack([some(image=image)["image"] for image in images])


def kornia(images: np.ndarray) -> timing.Job:
    """f32, 2 of its 15 operations drawn once for the batch, its own ranges"""
    import torch
    from kornia.augmentation.auto import RandAugment

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    batch = torch.from_numpy(floats(images)).permute(0, 3, 1, 2).contiguous().to(device)
    pipeline = RandAugment(n=OPERATIONS, m=MAGNITUDE)

    def job():
        with torch.no_grad():
            pipeline(batch)
        if device == "cuda":
            torch.cuda.synchronize()

    return job


def copy(images: np.ndarray) -> timing.Job:
    """f32, NumPy copy"""
    return floats(images).copy


PEERS = {
    setup.__name__: setup for setup in (saflex_jax, pillow, albumentations, kornia, copy)
}  # the last is the floor: the batch read and written once


def setups(side: int) -> dict[str, timing.Setup]:
    """Of all libraries, on the same images."""
    images = crops(side, BATCH_SIZES[side])
    return {name: partial(setup, images) for name, setup in PEERS.items()}


# --- the run and its report


class AugmentThroughput(reporting.Benchmark):
    """The benchmark: a series for each size of images."""

    packages = ("saflex_jax", "jax", "jaxlib", "numpy", "pillow", "albumentations",
                "opencv-python-headless", "kornia", "torch")  # fmt: skip

    def __init__(self, options):
        self.series = [
            timing.Series(str(side), tuple(PEERS), partial(setups, side), options.rounds, SECONDS)
            for side in BATCH_SIZES
        ]

    def report(self):
        """Images per second of all rounds, their spread (IQR), and ratios."""
        report = {"images_per_second": {}, "spread": {}, "ratios": {}, "why_null": {}}
        for series in self.series:
            side, size = series.title, BATCH_SIZES[int(series.title)]
            times = {name: series.times(name) for name in PEERS}
            speed = {name: size / np.mean(t) if t else None for name, t in times.items()}
            report["images_per_second"][side] = speed
            report["spread"][side] = {
                n: timing.spread(size / np.array(t)) for n, t in times.items()
            }
            pairs = [("saflex_jax", name) for name in PEERS if name not in ("saflex_jax", "copy")]
            report["ratios"][side] = {
                f"{above}/{below}": ratio(speed[above], speed[below])
                for above, below in [*pairs, ("copy", "saflex_jax")]
            }
            report["why_null"][side] = series.why_null()
        return report | {"peers": {name: setup.__doc__ for name, setup in PEERS.items()}}


main = partial(reporting.command, AugmentThroughput)

if __name__ == "__main__":
    sys.exit(main())
