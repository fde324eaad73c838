"""Checkpoints of state, data position and config; the only file that knows Orbax.

A checkpoint is written beside the others and renamed when complete, so a process killed at any
moment leaves the last complete one. `load` compares names and shapes before it reads an array.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from saflex_jax.types import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable, or of another run."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: created if need be.
      config: JSON-able settings of the run; a resume with other settings is refused.
      every: steps between checkpoints.
      keep: how many of the latest stay.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        config: dict[str, Any] | None = None,
        every: int = 1000,
        keep: int = 2,
    ):
        policies = ocp.training.save_decision_policies
        self.directory = epath.Path(directory).resolve()
        self.config = json.loads(json.dumps(config or {}))  # as a checkpoint will give it back
        self.directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=policies.AnySavePolicy(
                [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
            ),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def due(self, step: int) -> bool:
        """Whether `save` would write at this step (an interval, or a pre-emption notice)."""
        return self._checkpointer.should_save(step)

    def save(self, step: int, state: TrainState, stream: dict[str, Any], *, force: bool = False):
        """Starts writing; returns once the arrays are copied, so the state may be donated."""
        if step != self.latest:
            self._checkpointer.save_async(
                step, state, force=force, custom_metadata={"stream": stream, "config": self.config}
            )

    @contextlib.contextmanager
    def settled(self):
        """Context that waits for what is being written when it is left, also by an exception."""
        try:
            yield
        finally:
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits for what is being written and frees the threads."""
        self._checkpointer.close()

    def load(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The latest (or given) checkpoint, placed on devices as `like` is.

        Args:
          like: a state of the same shapes; its arrays are not read.
          step: None = latest.

        Returns:
          (state, data position).

        Raises:
          CheckpointError: no checkpoint; one of another model (names the first difference) or
            config (names the fields); one that cannot be read.
        """
        steps = [c.step for c in self._checkpointer.checkpoints]
        step = self.latest if step is None else step
        if step not in steps:
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.directory}; "
                f"complete ones: {steps or 'none'}"
            )
        where = f"checkpoint of step {step} in {self.directory}"
        others = [s for s in steps if s != step]
        try:
            found = self._checkpointer.metadata(step)
            saved = found.custom_metadata
            if found.metadata is None:  # what Orbax returns where it cannot read names and shapes
                raise ValueError("no array metadata")
            _check_config(where, saved["config"], self.config)
            _check_arrays(where, found.metadata, like)
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
            )
            state = self._checkpointer.load(step, abstract)
        except CheckpointError:
            raise
        except Exception as e:  # Orbax and TensorStore raise many types for a damaged file
            raise CheckpointError(
                f"{where} cannot be read, it may be truncated ({type(e).__name__}); "
                f"delete its folder to resume from another; others: {others or 'none'}"
            ) from e
        return state, saved["stream"]


def _fields(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in config.items():
        found |= (
            _fields(value, f"{prefix}{name}.")
            if value and isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return found


def _check_config(where: str, saved: dict[str, Any], given: dict[str, Any]) -> None:
    saved, given = _fields(saved), _fields(given)
    differing = sorted(k for k in saved.keys() | given.keys() if saved.get(k) != given.get(k))
    if differing:
        changes = ", ".join(f"{k}: {saved.get(k)!r} -> {given.get(k)!r}" for k in differing)
        raise CheckpointError(
            f"{where} was written by another config ({changes}); use another folder or that config"
        )


def _arrays(tree) -> dict[str, tuple]:
    def describe(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return tuple(x.shape), str(x.dtype)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): describe(x) for p, x in leaves}


def _check_arrays(where: str, saved, like: TrainState) -> None:
    saved, given = _arrays(saved), _arrays(like)
    for name in sorted(saved.keys() | given.keys()):
        if saved.get(name) != given.get(name):
            raise CheckpointError(
                f"{where} is of another model: {name} is {saved.get(name, 'absent')} there and "
                f"{given.get(name, 'absent')} here"
            )
