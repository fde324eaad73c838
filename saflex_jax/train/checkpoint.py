"""Checkpoints of state, data position and config; the only file that uses Orbax.

A checkpoint is written beside the others and renamed when it is complete, so a process that is
killed at any moment leaves the last complete one. `load` compares layout, config, names and shapes
before it reads an array.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from saflex_jax import __version__
from saflex_jax.types import TrainState

# The layout of the state's arrays; add one when methods or rules keep theirs in another form.
# 1: before SAFLEX's rules were parts of their own; such checkpoints do not name their layout.
LAYOUT = 2


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable, of another layout, or of another run."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: created if it is missing.
      config: settings of the run, as JSON; a resume with other settings is refused.
      every: steps between checkpoints.
      keep: number of latest checkpoints that stay.

    >>> import tempfile
    >>> state = TrainState(jax.numpy.int32(7), {}, {}, (), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder, config={"seed": 0})
    ...     with checkpoints.settled():
    ...         checkpoints.save(7, state, {"step": 7}, force=True)
    ...     loaded, position = checkpoints.load(state)
    ...     checkpoints.close()
    >>> int(loaded.step), position
    (7, {'step': 7})
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
        self.config = json.loads(json.dumps(config or {}))  # as it is read from a checkpoint
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
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def due(self, step: int) -> bool:
        """Whether `save` writes at this step: after an interval, or on a pre-emption notice."""
        return self._checkpointer.should_save(step)

    def save(self, step: int, state: TrainState, stream: dict[str, Any], *, force: bool = False):
        """Starts writing; returns once the arrays are copied, so the state may be donated."""
        if step != self.latest:
            about = {"layout": LAYOUT, "version": __version__}
            about |= {"stream": stream, "config": self.config}
            self._checkpointer.save_async(step, state, force=force, custom_metadata=about)

    @contextlib.contextmanager
    def settled(self):
        """Context that waits on exit until all is written, also after an exception."""
        try:
            yield
        finally:
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits until all is written and frees the threads."""
        self._checkpointer.close()

    def load(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The latest (or given) checkpoint, placed on devices as `like` is.

        Args:
          like: a state of the same shapes; its arrays are not read.
          step: None = latest.

        Returns:
          (state, data position).

        Raises:
          CheckpointError: no checkpoint; one of another layout (names the version that wrote it),
            config (names the fields) or model (names the first difference); one that cannot be
            read.
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
            checkpoint = self._checkpointer.metadata(step)
            saved = checkpoint.custom_metadata
            if checkpoint.metadata is None:  # Orbax could not read names and shapes
                raise ValueError("no array metadata")
            position, config = saved["stream"], saved["config"]
            _check_layout(where, saved, checkpoint.metadata, like)
            _check_config(where, config, self.config)
            _check_arrays(where, checkpoint.metadata, like)
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
        return state, position


def _check_layout(where: str, saved: dict[str, Any], metadata, like: TrainState) -> None:
    layout = saved.get("layout", 1)
    if layout != LAYOUT:
        writer = f"saflex_jax {saved['version']}" if "version" in saved else "an older saflex_jax"
        difference = _difference(metadata, like)
        raise CheckpointError(
            f"{where} was written by {writer} in layout {layout} of the state and cannot be "
            f"resumed by saflex_jax {__version__}, which reads layout {LAYOUT}"
            f"{f': {difference}' if difference else ''}; use another folder, or the version that "
            "wrote it"
        )


def _fields(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Path -> value of a nested config; {"a": {"b": 1}} is {"a.b": 1}."""
    fields = {}
    for name, value in config.items():
        if value and isinstance(value, dict):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields


def _check_config(where: str, saved: dict[str, Any], given: dict[str, Any]) -> None:
    saved, given = _fields(saved), _fields(given)
    differing = sorted(k for k in saved.keys() | given.keys() if saved.get(k) != given.get(k))
    if differing:
        changes = ", ".join(f"{k}: {saved.get(k)!r} -> {given.get(k)!r}" for k in differing)
        raise CheckpointError(
            f"{where} was written by another config ({changes}); use another folder or that config"
        )


def _arrays(tree) -> dict[str, tuple]:
    """Path -> (shape, dtype)."""

    def describe(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return tuple(x.shape), str(x.dtype)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): describe(x) for p, x in leaves}


def _difference(metadata, like: TrainState) -> str | None:
    """The first array, by name, that differs between a checkpoint and a state."""
    saved, given = _arrays(metadata), _arrays(like)
    for name in sorted(saved.keys() | given.keys()):
        there, here = saved.get(name, "absent"), given.get(name, "absent")
        if there != here:
            return f"{name} is {there} there and {here} here"
    return None


def _check_arrays(where: str, metadata, like: TrainState) -> None:
    if difference := _difference(metadata, like):
        raise CheckpointError(f"{where} is of another model: {difference}")
