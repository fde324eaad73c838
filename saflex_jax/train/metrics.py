"""Metrics as JSON lines, and optionally TensorBoard (through tensorboardX, without TensorFlow)."""

from __future__ import annotations

import json
import os
import pathlib

import jax

from saflex_jax._compat import optional


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
      resume_from: records after this step are removed first, so that no step is recorded twice. (A
        stop within a window leaves two shorter records of it.) None removes all records: a new run.
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
        self._board = None
        if not self._active:
            return
        path = pathlib.Path(directory) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        if resume_from is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the last line of a process that was killed
                    continue
                if record["step"] <= resume_from:
                    lines.append(line + "\n")
        partial = path.with_suffix(".partial")
        partial.write_text("".join(lines))
        os.replace(partial, path)
        self._file = path.open("a", buffering=1)
        if tensorboard:
            with optional("tensorboardX", extra="experiments"):
                from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(path.parent), purge_step=resume_from)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends {"step": step, **values}."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        if self._active:
            self._file.close()
            if self._board is not None:
                self._board.close()
