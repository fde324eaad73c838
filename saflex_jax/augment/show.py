"""A contact sheet of every image operation and policy, or of every corruption, on photographs.

python -m saflex_jax.augment.show [--corruptions] [--out FILE] [--images FILE FILE ...] [--seed N]
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax.augment import OPERATIONS, corruptions, parse, policies
from saflex_jax.types import Batch

SIDE, COLUMNS = 96, 6
# The operations of the policies, from one end of their values to the other.
VALUES = {
    "identity": [0.0],
    "autocontrast": [0.0],
    "equalize": [0.0],
    "invert": [0.0],
    "rotate": np.linspace(-135, 135, COLUMNS),
    "shear_x": np.linspace(-0.6, 0.6, COLUMNS),
    "shear_y": np.linspace(-0.6, 0.6, COLUMNS),
    "translate_x": np.linspace(-32, 32, COLUMNS),
    "translate_y": np.linspace(-32, 32, COLUMNS),
    "solarize": np.linspace(1, 0, COLUMNS),
    "posterize": [8, 5, 4, 3, 2, 1],
    "brightness": np.linspace(0.1, 1.9, COLUMNS),
    "color": np.linspace(0.0, 1.9, COLUMNS),
    "contrast": np.linspace(0.1, 1.9, COLUMNS),
    "sharpness": np.linspace(0.0, 1.9, COLUMNS),
}
# Pipelines as `parse` reads them, one row each; every column is another draw.
PIPELINES = (
    "randaugment(2,9)", "trivialaugment()", "trivialaugment(wide=False)",
    "autoaugment('cifar10')", "autoaugment('imagenet')", "autoaugment('svhn')", "augmix(3)",
    "random_field(length=24, translate=4)",
    "random_field(length=24, hue=.1, saturation=.5, brightness=.3)",
    "flip | shift(12)", "shift(12, padding='reflect')", "affine(degrees=30, scale=.2, shear=.2)",
    "resized_crop()", "cutout(40)", "random_erasing(1.0)", "blur((.1, 3.))", "soft_crop(24)",
    "mixup(1.0)", "cutmix(1.0)", "resizemix()", "fmix(1.0)", "gridmix(1.0)", "smoothmix()",
)  # fmt: skip


def photographs(paths: Sequence[str] = ()) -> np.ndarray:
    """f32[COLUMNS, SIDE, SIDE, 3] in [0, 1]: centre squares of the files, or six bundled views."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    if paths:
        images = [Image.open(path).convert("RGB") for path in paths]
    else:  # scikit-learn's two photographs, three square views of each
        whole = [Image.fromarray(photo) for photo in load_sample_images().images]
        lefts = (0, 106, 213)
        images = [photo.crop((x, 0, x + 427, 427)) for x in lefts for photo in whole]
    squares = []
    for image in images:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
        squares.append(np.asarray(square, np.float32) / 255)
    return np.stack([squares[n % len(squares)] for n in range(COLUMNS)])


def rows_of_operations(images: np.ndarray) -> dict[str, tuple[np.ndarray, list[str]]]:
    """name -> (f32[columns, H, W, 3], captions): the first photograph at every value."""
    apply = jax.jit(lambda *a: policies.apply(*a, names=tuple(VALUES)))
    rows = {}
    for name, values in VALUES.items():
        given = np.resize(np.asarray(values, np.float32), COLUMNS)
        views = images if len(values) == 1 else np.repeat(images[:1], COLUMNS, 0)
        number = jnp.full(COLUMNS, OPERATIONS.index(name))
        captions = [""] * COLUMNS if len(values) == 1 else [f"{v:.3g}" for v in given]
        rows[name] = np.asarray(apply(jnp.asarray(views), number, jnp.asarray(given))), captions
    return rows


def rows_of_pipelines(images: np.ndarray, seed: int) -> dict[str, tuple[np.ndarray, list[str]]]:
    """pipeline -> (f32[columns, H, W, 3], captions): all photographs, captioned by their traces."""
    batch = Batch(
        jnp.asarray(images), jnp.eye(COLUMNS), jnp.ones(COLUMNS, bool), jnp.arange(COLUMNS)
    )
    rows = {}
    for text in PIPELINES:
        augmented = jax.jit(parse(text))(jax.random.key(seed), batch)
        captions = [_caption(augmented, row) for row in range(COLUMNS)]
        rows[text] = np.asarray(augmented.inputs), captions
    return rows


def rows_of_corruptions(images: np.ndarray, seed: int) -> dict[str, tuple[np.ndarray, list[str]]]:
    """name -> (f32[columns, H, W, 3], captions): the first photograph, clean and at 1 to 5."""
    apply = jax.jit(corruptions.corrupt, static_argnames=("name", "severity"))
    key, clean = jax.random.key(seed), jnp.asarray(images[:1])
    severities = range(1, corruptions.SEVERITIES + 1)
    rows = {}
    for name in corruptions.NAMES:
        images = [clean, *(apply(key, clean, name=name, severity=n) for n in severities)]
        rows[name] = np.concatenate(images), ["clean", *map(str, severities)]
    return rows


def _caption(augmented: Batch, row: int) -> str:
    """Operations with their magnitudes, and the label's own share where it is mixed."""
    columns = zip(*(np.asarray(x[row]) for x in augmented.trace))
    steps = [f"{OPERATIONS[number]} {magnitude:.2g}" for number, magnitude, _ in columns]
    own = float(augmented.labels[row, row])
    return "\n".join([*steps, f"prior {own:.2f}"] if own < 0.995 else steps)


def draw(sheet: dict[str, tuple[np.ndarray, list[str]]], out: pathlib.Path) -> None:
    """Writes the sheet, a row for each entry, in two columns of rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = list(sheet.items())
    height = -(-len(entries) // 2)
    figure = plt.figure(figsize=(2 * COLUMNS * 1.1 + 3.2, height * 1.25))
    for half, part in zip((entries[:height], entries[height:]), figure.subfigures(1, 2)):
        axes = part.subplots(height, COLUMNS)
        part.subplots_adjust(
            left=0.17, right=0.99, top=0.985, bottom=0.005, hspace=0.3, wspace=0.04
        )
        for axis in axes.ravel():
            axis.set_axis_off()
        for row, (name, (images, captions)) in zip(axes, half):
            for axis, image, caption in zip(row, images, captions):
                axis.imshow(np.clip(image, 0, 1))
                axis.set_title(caption, fontsize=5.5, pad=2)
            wrapped = name.replace(", ", ",\n").replace(" | ", " |\n").replace("(wide", "\n(wide")
            row[0].text(-0.06, 0.5, wrapped, transform=row[0].transAxes, ha="right", va="center",
                        fontsize=8)  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None, *, log: Callable[[str], None] = print) -> None:
    """Draws the sheet."""
    parser = argparse.ArgumentParser(prog="python -m saflex_jax.augment.show", description=__doc__)
    parser.add_argument("--corruptions", action="store_true", help="at all severities, instead")
    parser.add_argument("--out", type=pathlib.Path, help="default: in runs/")
    parser.add_argument("--images", nargs="+", default=(), help="image files; default: bundled")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    images = photographs(options.images)
    if options.corruptions:
        name, sheet = "corruptions", rows_of_corruptions(images, options.seed)
    else:
        sheet = rows_of_operations(images) | rows_of_pipelines(images, options.seed)
        name = "augmentations"
    out = options.out or pathlib.Path(f"runs/{name}.png")
    draw(sheet, out)
    log(f"wrote {out}")


if __name__ == "__main__":
    main()
