"""Image files as rows that are decoded on access."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from saflex_jax import checks
from saflex_jax._compat import optional

MOST_PIXELS = 2**26  # 8192 x 8192; decoded, a larger image takes hundreds of megabytes
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Without `channels` a file's own mode decides. With it 8-bit modes are converted as well, which may
# drop an alpha channel or a colour space; other modes would lose bits and are refused.
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
CONVERTED = (*MODES, "RGBA", "LA", "CMYK", "YCbCr")


class Rows:
    """N rows that are read on access; looks like an array of shape [N, ...].

    Only `rows[i]`, `rows[a:b]`, `rows[indices]` and `np.asarray(rows)` read.

    >>> squares = Rows(lambda places: places**2, size=1000, shape=(), dtype=int)
    >>> squares[[10, 2]].tolist(), squares.shape
    ([100, 4], (1000,))

    Args:
      read: indices i[B] in [0, N) -> array [B, *shape].
      size: N.
      shape: of one row.
      dtype: of the arrays that `read` returns.
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
        rows = np.arange(len(self))[places]
        return self._read(rows) if rows.ndim else self._read(rows[None])[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del copy  # every read makes a new array
        return self[:].astype(dtype or self.dtype, copy=False)


def subset(inputs: Any, rows: np.ndarray) -> Any:
    """The given rows of a pytree of arrays, or of `Rows`, which stay unread.

    >>> subset({"x": np.array([5, 6, 7])}, np.array([2, 0]))["x"].tolist()
    [7, 5]

    Args:
      inputs: pytree of arrays [N, ...], or `Rows`.
      rows: i[n], or anything that indexes rows.
    """
    if isinstance(inputs, Rows):
        return Rows(lambda i: inputs[rows[i]], len(rows), inputs.shape[1:], inputs.dtype)
    return jax.tree.map(lambda x: x[rows], inputs)


def joined(first: Any, second: Any) -> Any:
    """The rows of both, concatenated; `Rows` stay unread.

    >>> joined(np.array([1, 2]), np.array([3])).tolist()
    [1, 2, 3]

    Args:
      first, second: pytrees of arrays [N, ...], or `Rows`.

    Raises:
      ValueError: rows of different shape or dtype.
    """
    for leaves in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        expected, given = (f"{x.dtype}{list(x.shape[1:])}" for x in leaves)
        if given != expected:
            raise ValueError(f"second must have rows {expected}, as first; given {given}")
    if not isinstance(first, Rows) and not isinstance(second, Rows):
        return jax.tree.map(lambda *x: np.concatenate(x), first, second)
    size = len(first)

    def read(places):
        in_first = places < size
        rows = np.empty((len(places), *first.shape[1:]), first.dtype)
        rows[in_first] = first[places[in_first]]
        rows[~in_first] = second[places[~in_first] - size]
        return rows

    return Rows(read, size + len(second), first.shape[1:], first.dtype)


def resized(images: Any, size: tuple[int, int]) -> Any:
    """8-bit images [N, H, W, C] at another size (bilinear), resized on access.

    >>> resized(np.zeros((5, 8, 8, 3), np.uint8), (4, 6)).shape
    (5, 4, 6, 3)

    Args:
      images: uint8[N, H, W, C], an array or `Rows`.
      size: (H, W) of the result.

    Raises:
      ImportError: Pillow is not installed.
      ValueError: images that are not 8-bit.
    """
    if images.shape[1:3] == size:
        return images
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 to be resized; given {images.dtype}")
    with optional("Pillow"):
        from PIL import Image

    shape = (*size, images.shape[-1])

    def read(places):
        resized_rows = np.empty((len(places), *shape), np.uint8)
        for row, pixels in enumerate(images[places]):
            image = Image.fromarray(pixels.squeeze(-1) if shape[-1] == 1 else pixels)
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            resized_rows[row] = np.asarray(image).reshape(shape)
        return resized_rows

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
      size: (H, W) to resize all images to (bilinear); None = they all have one size.
      channels: 1 (luma) or 3, without alpha; None = the files' own, the same for all.

    Raises:
      ImportError: Pillow is not installed.
      ValueError: size or channels out of range; an image that does not decode or has another shape
        than the first one (the first is decoded now, the others on access). Names the file.
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
    return [p for p in visible(folder) if is_image(p)]


def is_image(file: pathlib.Path) -> bool:
    """By its suffix."""
    return file.suffix.lower() in SUFFIXES


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files in a folder and in its folders, by name, without hidden ones."""
    files = []
    # Not by `visible`: a walk knows folders without asking for each file what it is.
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _hidden(name)]
        files += [pathlib.Path(place, name) for name in names if not _hidden(name)]
    return sorted(files)


def visible(folder: pathlib.Path) -> list[pathlib.Path]:
    """What is directly in a folder, by name, without hidden names such as macOS's `._0.png`."""
    return sorted(p for p in folder.iterdir() if not _hidden(p.name))


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _decoder(
    size: tuple[int, int] | None, channels: int | None
) -> Callable[[str | os.PathLike], np.ndarray]:
    """File -> uint8[H, W, C]."""
    with optional("Pillow"):
        from PIL import Image

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
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(
                        f"it must have at most {MOST_PIXELS:,} pixels; given {image.width} x "
                        f"{image.height}"
                    )
                checks.choice(MODES if channels is None else CONVERTED, **{"its mode": image.mode})
                image = image.convert(wanted[channels] if channels else MODES[image.mode])
                if size is not None:
                    image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"{file} does not decode: {error}") from error
        pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], -1)

    return decode
