"""Files that are never half-written: written under another name and renamed when complete."""

from __future__ import annotations

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def renamed(path: str | os.PathLike, *, sync: bool = False) -> Iterator[pathlib.Path]:
    """A file next to `path` that replaces it at the end; after an error nothing of it is left.

    A reader sees the old file or the new one. Threads, processes and hosts that write the same file
    do not clash: the last one stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with renamed(f"{folder}/x.txt") as part:
    ...         _ = part.write_text("all of it")
    ...     [path.name for path in pathlib.Path(folder).iterdir()]
    ['x.txt']

    Args:
      path: in an existing folder.
      sync: wait for the disk first; otherwise a power failure could leave an empty file.

    Raises:
      OSError: it cannot be written; the old file stays.
    """
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
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

    Args:
      path: in an existing folder.
      text: the content.

    Raises:
      OSError: as `renamed`.
    """
    with renamed(path, sync=True) as part:
        part.write_text(text, encoding="utf-8")
