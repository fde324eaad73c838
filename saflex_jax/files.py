"""Files that are never half-written: made beside their place, and renamed when all is there."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def renamed(path: str | os.PathLike, *, sync: bool = False) -> Iterator[pathlib.Path]:
    """A file beside `path` that takes its place at the end; after an error nothing of it is left.

    A reader sees the old file or the new one, and processes that write the same file do not meet.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with renamed(f"{folder}/x.txt") as part:
    ...         _ = part.write_text("all of it")
    ...     [path.name for path in pathlib.Path(folder).iterdir()]
    ['x.txt']

    Args:
      path: in a folder that is there.
      sync: wait for the disk first, or a power failure could leave the new name without content.

    Raises:
      OSError: it cannot be written; what was there before stays.
    """
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield part
        if sync:
            with part.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a text file as `renamed` does, and waits for the disk.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(f"{folder}/result.json", "{}")
    ...     [path.name for path in pathlib.Path(folder).iterdir()]
    ['result.json']

    Raises:
      OSError: as `renamed`.
    """
    with renamed(path, sync=True) as part:
        part.write_text(text, encoding="utf-8")
