"""Files of records that grow, one JSON object a line.

Killed at any point, a file is whole but for its last line: readers leave it out, and who appends
next cuts it off.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from saflex_jax.data.provenance import read_lines


def text(records: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in records)


def read(path: pathlib.Path) -> list[dict]:
    """The records of a file; none if there is no file."""
    return read_lines(path, open_end=True) if path.exists() else []


def append(path: pathlib.Path, *records: Mapping[str, Any]) -> None:
    """Adds records; all are on the disk when this returns, or none where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
    try:
        with path.open("ab") as file:
            file.write(text(records).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        os.truncate(path, size)
        raise
