"""Real photographs, and one augmentation step of Pillow: the reference of the parity tests."""

import functools

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# Pillow truncates the blend (1 level) after rounding the degenerate image (1/2 level, which the
# blend multiplies by |1 - factor|); all else is exact to its one truncation.
ROUNDED_DEGENERATE = ("color", "sharpness")


@functools.cache
def photographs():
    return load_sample_images().images


@functools.cache
def crops(size, count, *, grey=False, seed=0):
    """uint8[count, H, W, 3 or 1], random crops of scikit-learn's two photographs."""
    height, width = size if isinstance(size, tuple) else (size, size)
    rng = np.random.default_rng(seed)
    photos = []
    for number in range(count):
        photo = photographs()[number % 2]
        top = rng.integers(photo.shape[0] - height + 1)
        left = rng.integers(photo.shape[1] - width + 1)
        photos.append(photo[top : top + height, left : left + width])
    if grey:
        photos = [np.asarray(Image.fromarray(p).convert("L"))[..., None] for p in photos]
    return np.stack(photos)


def pillow(name, pixels, value, *, fill=0, resample=Image.Resampling.NEAREST):
    """uint8[H, W, C] after one operation by Pillow."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    colour = fill if image.mode == "L" else (fill,) * 3

    def move(*matrix):
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=colour
        )

    out = {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "solarize": lambda: ImageOps.solarize(image, value * 255),
        "posterize": lambda: ImageOps.posterize(image, round(value)),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(value),
        "color": lambda: ImageEnhance.Color(image).enhance(value),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(value),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(value),
        "rotate": lambda: image.rotate(value, resample=resample, fillcolor=colour),
        "shear_x": lambda: move(1, value, 0, 0, 1, 0),
        "shear_y": lambda: move(1, 0, 0, value, 1, 0),
        "translate_x": lambda: move(1, 0, value, 0, 1, 0),
        "translate_y": lambda: move(1, 0, 0, 0, 1, value),
    }[name]()
    return np.asarray(out).reshape(pixels.shape)


def assert_like_pillow(name, value, actual, pixels, **options):
    """`actual` f32 in [0, 1] is what Pillow makes of `pixels`, to the project's tolerances."""
    expected = pillow(name, pixels, value, **options).astype(np.float64)
    off = np.abs(np.clip(np.asarray(actual, np.float64), 0, 1) * 255 - expected)
    if name in GEOMETRIC:
        assert (off <= 1).mean() >= 0.99, f"{name}({value}): {(off <= 1).mean():.4f} of the pixels"
    else:
        bound = 1 + (abs(1 - value) / 2 if name in ROUNDED_DEGENERATE else 0)
        assert off.max() <= bound + 1e-3, f"{name}({value}): {off.max():.3f} levels"
