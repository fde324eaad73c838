"""Metrics as JSON lines, and optionally TensorBoard (through tensorboardX, without TensorFlow)."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any, TextIO

import jax

from saflex_jax._compat import optional
from saflex_jax.files import write_whole


class MetricsWriter:
    """Appends JSON objects to `directory/metrics.jsonl`; writes on the first host only.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     writer = MetricsWriter(folder)
    ...     writer.write(50, {"loss": 0.25})
    ...     writer.close()
    ...     text = (pathlib.Path(folder) / "metrics.jsonl").read_text()
    >>> text
    '{"step": 50, "loss": 0.25}\\n'

    Args:
      directory: created if it is missing.
      resume_from: remove records after this step first, so that no step is recorded twice. None
        removes all records, for a new run.
      tensorboard: also write event files; needs the extra "experiments".

    Raises:
      ImportError: tensorboardX is not installed.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        resume_from: int | None = None,
        tensorboard: bool = False,
    ):
        self._active = jax.process_index() == 0
        self._file: TextIO | None = None
        self._board = None
        if not self._active:
            return
        self._path = pathlib.Path(directory) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.keep_until(-1 if resume_from is None else resume_from)
        if tensorboard:
            with optional("tensorboardX", extra="experiments"):
                from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self._path.parent), purge_step=resume_from)

    def keep_until(self, step: int) -> None:
        """Removes the records after a step, and half-written lines of a killed process.

        `fit` calls it with the step from which it resumes.

        Args:
          step: the last step to keep.
        """
        if not self._active:
            return
        lines = []
        if self._path.exists():
            for line in self._path.read_text(errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the last line of a process that was killed
                    continue
                if record["step"] <= step:
                    lines.append(line + "\n")
        if self._file is not None:
            self._file.close()
        write_whole(self._path, "".join(lines))
        self._file = self._path.open("a", buffering=1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends {"step": step, **values}.

        Args:
          step: number of steps taken.
          values: name -> number; of a sweep a list with one number per member, None where it has
            none. TensorBoard gets them as "name/member".
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise OSError(
                error.errno,
                f"the record of step {step} cannot be written to {self._path} ({error.strerror}); "
                "make room there, and the same command goes on",
            ) from error
        if self._board is not None:
            for name, value in values.items():
                each = {name: value}
                if isinstance(value, list):
                    each = {f"{name}/{m}": v for m, v in enumerate(value) if v is not None}
                for tag, number in each.items():
                    self._board.add_scalar(tag, number, step)

    def close(self) -> None:
        """Flushes and closes."""
        if self._file is not None:
            self._file.close()
            if self._board is not None:
                self._board.close()
