"""A contact sheet of every image operation and policy, or of every corruption, on photographs.

python -m saflex_jax.augment.show [--corruptions] [--out FILE] [--images FILE FILE ...] [--seed N]
"""

from __future__ import annotations

import argparse
import pathlib
import textwrap
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax.augment import OPERATIONS, corruptions, parse, policies
from saflex_jax.types import Batch

SIDE, COLUMNS = 96, 3
WIDTH, PAPER = 8.6, "#F8F6F1"  # inches, and what figures lie on, as in experiments/style.py
LINE = 0.14  # inches, of text in 8 points
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
    "posterize": [8, 3, 1],
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
    """f32[COLUMNS, SIDE, SIDE, 3] in [0, 1]: centre squares of the files, or bundled views."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    if paths:
        images = [Image.open(path).convert("RGB") for path in paths]
    else:  # scikit-learn's two photographs, square views of both in turn
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
    names = [(OPERATIONS[number], magnitude) for number, magnitude, _ in columns]
    steps = [f"{_narrow(name)} {magnitude:.2g}" for name, magnitude in names]
    own = float(augmented.labels[row, row])
    return "\n".join([*steps, f"prior {own:.2f}"] if own < 0.995 else steps)


def _narrow(name: str) -> str:
    """On two lines where one would be wider than an image."""
    return name.replace("_", "\n") if len(name) > 11 else name


def _lines(entry: tuple[str, np.ndarray, list[str]]) -> int:
    """How many lines its name and its longest caption have."""
    name, _, captions = entry
    return 2 + name.count("\n") + max(caption.count("\n") for caption in captions)


def draw(sheet: dict[str, tuple[np.ndarray, list[str]]], out: pathlib.Path) -> None:
    """Writes the sheet: one row per entry, in as many columns as fit."""
    from matplotlib.figure import Figure

    entries = [(textwrap.fill(name, 42), *row) for name, row in sheet.items()]
    columns = len(entries[0][2])
    across = 3 if columns <= 3 else 2
    height, cell = -(-len(entries) // across), WIDTH / across / (columns + 0.3)
    blocks = [entries[place * height :][:height] for place in range(across)]
    lines = [
        max(_lines(block[row]) for block in blocks if row < len(block)) for row in range(height)
    ]
    heights = [cell + LINE * (number + 1) for number in lines]
    figure = Figure(figsize=(WIDTH, sum(heights) + 3 * LINE), facecolor=PAPER)
    for block, part in zip(blocks, figure.subfigures(1, across)):
        part.set_facecolor(PAPER)
        axes = part.subplots(height, columns, squeeze=False, height_ratios=heights)
        top = 1 - 2 * LINE / figure.get_figheight()
        part.subplots_adjust(left=0.03, right=0.97, top=top, bottom=0, hspace=0, wspace=0.06)
        for axis in axes.ravel():
            axis.set_axis_off()
        for row, (name, images, captions) in zip(axes, block):
            row[0].set_title(name, fontsize=8, weight="bold", loc="left", pad=3)
            for axis, image, caption in zip(row, images, captions):
                axis.imshow(np.clip(image, 0, 1))
                axis.set_anchor("N")
                axis.text(0, -0.03, caption, fontsize=8, va="top", transform=axis.transAxes)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


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
