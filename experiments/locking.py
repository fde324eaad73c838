"""One process at a time makes a thing, in a scratch folder beside it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def locked(out: pathlib.Path, name: str, *, wait: bool = False) -> Iterator[pathlib.Path]:
    """Holds the lock of a name and gives a scratch folder, which is removed afterwards.

    Args:
      out: the folder of the lock and the scratch folder.
      name: of the lock.
      wait: until another process gives the lock back.

    Raises:
      RuntimeError: another process holds the lock; says which.
    """
    with open(out / f".{name}.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            lock.seek(0)
            raise RuntimeError(f"process {lock.read()} is preparing {name} in {out}") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for leftover in out.glob(f".{name}.scratch-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{name}.scratch-", dir=out, ignore_cleanup_errors=True
        ) as scratch:
            yield pathlib.Path(scratch)
