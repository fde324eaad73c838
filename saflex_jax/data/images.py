"""Image files as rows that are decoded when they are asked for."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from saflex_jax import checks

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# What a file's own mode becomes where no number of channels is asked for, and the 8-bit modes that
# lose an alpha channel or a colour space where one is; the others would lose bits.
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
CONVERTED = (*MODES, "RGBA", "LA", "CMYK", "YCbCr")


class Rows:
    """N rows that are read when they are asked for; looks like an array of shape [N, ...].

    `rows[i]`, `rows[a:b]`, `rows[places]` and `np.asarray(rows)` read; nothing else does.

    Args:
      read: places i[B] in [0, N) -> array [B, *shape].
      size: N.
      shape: of one row.
      dtype: of the arrays that `read` gives.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        size: int,
        shape: Sequence[int],
        dtype: np.typing.DTypeLike,
    ):
        self._read, self.shape, self.dtype = read, (size, *shape), np.dtype(dtype)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places) -> np.ndarray:
        found = np.arange(len(self))[places]
        return self._read(found) if found.ndim else self._read(found[None])[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del copy  # what was read is nobody else's
        return self[:].astype(dtype or self.dtype, copy=False)


def subset(inputs: Any, rows: np.ndarray) -> Any:
    """Some of the rows, of a pytree of arrays or of `Rows`, which are not read."""
    if isinstance(inputs, Rows):
        return Rows(lambda i: inputs[rows[i]], len(rows), inputs.shape[1:], inputs.dtype)
    return jax.tree.map(lambda x: x[rows], inputs)


def joined(first: Any, second: Any) -> Any:
    """The rows of both, one after the other; of pytrees of arrays, or of `Rows`, not read.

    Raises:
      ValueError: rows of another shape or dtype.
    """
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        kinds = [f"{x.dtype}{list(x.shape[1:])}" for x in (one, other)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"second must have rows {kinds[0]}, as first; given {kinds[1]}")
    if not isinstance(first, Rows) and not isinstance(second, Rows):
        return jax.tree.map(lambda *x: np.concatenate(x), first, second)
    size = len(first)

    def read(places):
        before = places < size
        found = np.empty((len(places), *first.shape[1:]), first.dtype)
        found[before], found[~before] = first[places[before]], second[places[~before] - size]
        return found

    return Rows(read, size + len(second), first.shape[1:], first.dtype)


def resized(images: Any, size: tuple[int, int]) -> Any:
    """8-bit images [N, H, W, C] at another size (bilinear), made when rows are asked for.

    Raises:
      ValueError: they are not 8-bit.
    """
    if images.shape[1:3] == size:
        return images
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 to be resized; given {images.dtype}")
    from PIL import Image

    shape = (*size, images.shape[-1])

    def read(places):
        made = np.empty((len(places), *shape), np.uint8)
        for row, pixels in enumerate(images[places]):
            image = Image.fromarray(pixels.squeeze(-1) if shape[-1] == 1 else pixels)
            made[row] = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).reshape(
                shape
            )
        return made

    return Rows(read, len(images), shape, np.uint8)


def image_rows(
    files: Sequence[pathlib.Path],
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> Rows:
    """Image files as uint8[N, H, W, C], decoded by threads on access.

    Args:
      files: at least one.
      size: (H, W) that all are resized to (bilinear); None = they have one size.
      channels: 1 (luma) or 3, an alpha channel is left out; None = what the files have, which must
        be the same for all.

    Raises:
      ImportError: Pillow is not installed.
      ValueError: size or channels out of range; an image, now the first and on access any other,
        that does not decode or has another shape than the first. Names the file.
    """
    decode = _decoder(size, channels)
    first = decode(files[0])

    def read(places):
        pixels = np.empty((len(places), *first.shape), np.uint8)
        with ThreadPoolExecutor() as threads:  # decoding releases the interpreter's lock
            images = threads.map(lambda place: decode(files[place]), places)
            for row, (place, image) in enumerate(zip(places, images)):
                if image.shape != first.shape:
                    raise ValueError(
                        f"{files[place]} must have shape {first.shape}, as {files[0]} has; given "
                        f"{image.shape}; `size` and `channels` make all alike"
                    )
                pixels[row] = image
        return pixels

    return Rows(read, len(files), first.shape, np.uint8)


def images_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The image files directly in a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _decoder(
    size: tuple[int, int] | None, channels: int | None
) -> Callable[[str | os.PathLike], np.ndarray]:
    """File -> uint8[H, W, C]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('images need Pillow: pip install "saflex_jax[data]"') from error
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (H, W), both >= 1; given {size}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3; given {channels}")
    wanted = {1: "L", 3: "RGB"}

    def decode(file):
        try:
            with Image.open(file) as image:
                if getattr(image, "n_frames", 1) > 1:
                    raise ValueError(f"it must be one image; given {image.n_frames} frames")
                checks.choice(MODES if channels is None else CONVERTED, **{"its mode": image.mode})
                image = image.convert(wanted[channels] if channels else MODES[image.mode])
                if size is not None:
                    image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"{file} does not decode: {error}") from error
        pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], -1)

    return decode
