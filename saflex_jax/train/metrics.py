"""Metrics as JSON lines, and optionally TensorBoard (through tensorboardX, without TensorFlow)."""

from __future__ import annotations

import json
import os
import pathlib

import jax


class MetricsWriter:
    """Appends JSON objects to `directory/metrics.jsonl`; silent on hosts but the first.

    Args:
      directory: created if need be.
      resume_from: records after this step are removed first, so that no step stands twice. (The
        window that a stop cuts in two leaves two shorter records.) None keeps nothing (a new run).
      tensorboard: also write event files; needs the `experiments` extra.
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
        kept = []
        if resume_from is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the line a killed process was writing
                    continue
                if record["step"] <= resume_from:
                    kept.append(line + "\n")
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self._file = path.open("a", buffering=1)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(path.parent), purge_step=resume_from)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes {"step": step, **values}."""
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
