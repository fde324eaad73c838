"""Ends all processes of a run when one of them is lost or hangs, and says which.

JAX's own service notices a process whose heartbeats stop, but not one that hangs in Python, and a
broken collective does not say which process it waited for. Here each process writes a small file
into a shared folder and reads the others' files.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

from saflex_jax import checks
from saflex_jax.files import renamed
from saflex_jax.parallel import witness


class Watch:
    """Context in which the processes of a run watch each other; a single process does nothing.

    A process is lost if its file has not changed for `lost_after` seconds. It hangs if it is behind
    another process and has taken no step for `hung_after` seconds. Every process that notices
    reports it on stderr and exits with status 1. An error inside the context ends the process at
    once, where JAX would first wait for the others; after an error of JAX it first waits to see
    which process was lost, since that is what breaks a collective. If process 0 is lost, JAX ends
    all others at once, and a small helper process of each reports it.

    >>> with Watch("no such folder") as watch:
    ...     watch.step(1)

    Args:
      folder: writable by all processes; created if it is missing.
      lost_after: seconds without a change of its file after which a process is lost.
      hung_after: seconds without a step after which a process that is behind hangs. Must exceed the
        difference between processes in the time of a step, compilation included.
      end: ends the process; takes the exit status.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        lost_after: float = 60.0,
        hung_after: float = 900.0,
        end: Callable[[int], None] = os._exit,
    ):
        checks.positive(lost_after=lost_after, hung_after=hung_after)
        self._folder, self._end = pathlib.Path(folder), end
        self._lost_after, self._hung_after = lost_after, hung_after
        self._mine, self._count = jax.process_index(), jax.process_count()
        self._step, self._turn, self._silent, self._done = 0, 0, False, threading.Event()

    def step(self, number: int) -> None:
        """Notes the step that this process has reached.

        Args:
          number: of the step.
        """
        self._step = number

    def __enter__(self) -> Watch:
        if self._count > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            now = time.monotonic()
            others = set(range(self._count)) - {self._mine}
            # process -> its file, and since when; its step, and since when; what its file says
            self._seen: dict[int, tuple[str | None, float]] = {i: (None, now) for i in others}
            self._moved = {i: (0, now) for i in others}
            self._about: dict[int, dict[str, Any]] = {i: {} for i in others}
            self._write()
            script = [sys.executable, "-ES", witness.__file__]
            about = [str(self._folder), str(self._mine), str(self._lost_after)]
            self._witness = subprocess.Popen([*script, *about], stdin=subprocess.PIPE)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, _) -> None:
        if self._count == 1:
            return
        if _from_jax(error):
            self._done.wait(1.5 * self._lost_after)  # the thread says who is lost, and ends
        self._done.set()
        self._thread.join()
        stopped = isinstance(error, SystemExit) and not isinstance(error.code, str)
        if error is None or stopped:  # as all others do
            self._write(done=True)
            self._dismiss()
            return
        expected = isinstance(error, SystemExit)
        text = error.code if expected else "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
        self._dismiss()
        self._end(1)

    def _watch(self) -> None:
        pause = min(self._lost_after, self._hung_after) / 8
        while not self._done.wait(pause):
            self._write()
            if reason := self._who():
                self._say(f"{reason}; it ends. Start all processes again: they go on from the last "
                          "checkpoint")  # fmt: skip
                self._dismiss()
                self._end(1)
                return

    def _who(self) -> str | None:
        """Who is lost or hangs, and for how long."""
        now = time.monotonic()
        for i, (before, since) in self._seen.items():
            text = before
            with contextlib.suppress(OSError, ValueError):  # not there, or not for the moment
                text = (self._folder / str(i)).read_text()
                self._about[i] = json.loads(text)
            about = self._about[i]
            if about.get("done"):
                continue
            who = f"process {i} (pid {about.get('pid')} on {about.get('host')})"
            if text != before:
                self._seen[i] = text, now
            elif now - since > self._lost_after:
                return f"{who} is lost: no sign of life for {now - since:.0f} s"
            step = about.get("step", 0)
            if step != self._moved[i][0]:
                self._moved[i] = step, now
            behind, waits = step < self._step, now - self._moved[i][1]
            if behind and waits > self._hung_after:
                return f"{who} hangs: it has been at step {step} for {waits:.0f} s"
        return None

    def _write(self, done: bool = False) -> None:
        self._turn += 1
        about: dict[str, Any] = {
            "turn": self._turn,
            "step": self._step,
            "done": done,
            "pid": os.getpid(),
        }
        about["host"] = socket.gethostname()
        mine = self._folder / str(self._mine)
        try:
            with renamed(mine) as part:
                part.write_text(json.dumps(about))
        except OSError as error:  # a full disk, for instance; the others will miss this process
            if not self._silent:
                self._say(f"it cannot write {mine}: {error.strerror}")
            self._silent = True

    def _dismiss(self) -> None:
        """Tells the witness that this process has said itself why it ends."""
        with contextlib.suppress(OSError, ValueError):  # it was killed, or told before
            told = self._witness.stdin
            assert told is not None  # it is a pipe
            told.write(b".")
            told.close()
        self._witness.wait()

    def _say(self, what: str) -> None:
        print(f"process {self._mine} at step {self._step}: {what}", file=sys.stderr, flush=True)


def _from_jax(error: BaseException | None) -> bool:
    """Whether an error of JAX is among its reasons."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None
