"""A folder that one run at a time writes into."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

LOCK = ".lock"  # in the folder of a run


class FolderInUse(RuntimeError):
    """Another process is writing into the folder; the message says which."""


@contextlib.contextmanager
def one_run_in(folder: str | os.PathLike) -> Iterator[None]:
    """Locks the folder for this run; all processes of a run call it, and the first holds the lock.

    The operating system's lock on the file ".lock" ends with its process, so that the folder of a
    dead process is free. The file says who holds it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, one_run_in(folder):
    ...     with one_run_in(folder):  # doctest: +ELLIPSIS
    ...         pass
    Traceback (most recent call last):
        ...
    saflex_jax.train.files.FolderInUse: ... is in use by process ... on ..., since ...

    Args:
      folder: created if it is missing.

    Raises:
      FolderInUse: another run holds it.
      OSError: the folder cannot be created or written; names it.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(_held(pathlib.Path(folder)))
            except (FolderInUse, OSError) as error:
                refusal = error
        if jax.process_count() > 1:  # or the others would wait for the first one
            free = bool(multihost_utils.broadcast_one_to_all(np.array(refusal is None)))
            if not free and refusal is None:
                refusal = FolderInUse(f"process 0 could not take {folder}; it says why")
        if refusal is not None:
            raise refusal
        yield


@contextlib.contextmanager
def _held(folder: pathlib.Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise type(error)(
            error.errno, f"{folder} must be a folder that can be written into; {error.strerror}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(
                f"{folder} is in use by {_holder(lock)}; end that run, or use another folder"
            ) from None
        lock.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": now}, lock)
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def _holder(lock) -> str:
    lock.seek(0)
    try:
        about = json.load(lock)
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (ValueError, KeyError):  # it writes this just now
        return "another process"
