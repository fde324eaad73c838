"""Checkpoints of state, data position and config; the only file that uses Orbax.

A checkpoint is written under a temporary name and renamed when it is complete, so killing the
process at any moment leaves the last complete one. `load` compares layout, config, names and shapes
before it reads an array, and afterwards each array's digest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from saflex_jax import __version__, checks
from saflex_jax.core.tree import paths
from saflex_jax.train import digest
from saflex_jax.types import PyTree, TrainState

# The layout of the state's arrays; add one when methods or rules keep theirs in another form.
# 1: before SAFLEX's rules were parts of their own; such checkpoints do not name their layout.
LAYOUT = 2
# What a checkpoint says of itself: since there are digests, and before.
ABOUT = {"layout", "version", "stream", "config", "arrays", "seal"}
ABOUT_BEFORE = ABOUT - {"arrays", "seal"}, {"stream", "config"}  # of two layouts
# What a file system says when it takes no more.
DISK = [
    os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
]


class CheckpointError(RuntimeError):
    """A checkpoint is missing, unreadable, of another layout, or of another run."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint cannot be read, or its bits differ from those that were saved."""


class NotWritten(CheckpointError):
    """A checkpoint could not be written; earlier ones are unchanged."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: created if it is missing.
      config: settings of the run, as JSON; a resume with other settings is refused.
      every: steps between checkpoints.
      keep: number of latest checkpoints to keep.
      grows: names of numbers in the config that a resume may increase, for instance "train.steps"
        to extend the run.
      skip_damaged: whether `load` renames a damaged newest checkpoint to STEP.damaged (then
        STEP.damaged1, ...), reports it on stderr and loads the one before.

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
        grows: Sequence[str] = (),
        skip_damaged: bool = False,
    ):
        checks.whole(1, every=every, keep=keep)
        self.directory = epath.Path(directory).resolve()
        self.config = json.loads(json.dumps(config or {}))  # as it is read from a checkpoint
        self._grows, self._skip_damaged = tuple(grows), skip_damaged
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._checkpointer = _opened(self.directory, every, keep)
        except Exception as error:  # Orbax reads what checkpoints say of themselves
            self._set_aside(*self._unreadable(error))
            self._checkpointer = _opened(self.directory, every, keep)
        self._writing: tuple[int, Any] | None = None  # (step, Orbax' response)
        self._failed = False

    def _unreadable(self, error: Exception) -> list[int]:
        """Steps of the checkpoints that do not let Orbax open the folder.

        Raises:
          DamagedCheckpoint: names them, unless damaged ones are skipped.
        """
        found = []
        steps = {int(p.name) for p in self.directory.iterdir() if p.name.isdigit()}
        for step in sorted(steps):
            try:
                ocp.checkpointables_metadata(self.directory / str(step))
            except Exception:  # many types
                found.append(step)
        message = f"checkpoints of steps {found} in {self.directory} cannot be read"
        if not found or not self._skip_damaged:
            raise DamagedCheckpoint(
                f"{message} ({_reason(error)}); delete their folders, or skip damaged ones; "
                f"others: {sorted(steps - set(found)) or 'none'}"
            ) from error
        print(f"{message} ({_reason(error)}) and are skipped", file=sys.stderr)
        return found

    def _set_aside(self, *steps: int) -> None:
        """Renames folders, so that the run can come to these steps again."""
        if jax.process_index() != 0:
            return
        for step in steps:
            # The run may have come back to a step that was damaged before.
            places = (self.directory / f"{step}.damaged{n or ''}" for n in itertools.count())
            (self.directory / str(step)).rename(next(p for p in places if not p.exists()))

    def sibling(self, name: str, *, every: int, keep: int) -> Checkpoints:
        """Checkpoints of the same run in another folder next to this one.

        Args:
          name: of the folder.
          every: steps between checkpoints.
          keep: number of latest checkpoints to keep.
        """
        return Checkpoints(
            self.directory.parent / name,
            config=self.config,
            every=every,
            keep=keep,
            grows=self._grows,
            skip_damaged=self._skip_damaged,
        )

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def due(self, step: int) -> bool:
        """Whether `save` writes at this step: after an interval, or on a pre-emption notice.

        Args:
          step: number of steps taken.
        """
        return self._checkpointer.should_save(step)

    def save(self, step: int, state: TrainState, stream: dict[str, Any], *, force: bool = False):
        """Starts writing; returns once the arrays are copied, so the state may be donated.

        Args:
          step: number of steps taken.
          state: TrainState.
          stream: the data position, JSON-able.
          force: write even if no checkpoint is due.

        Raises:
          NotWritten: this checkpoint or the previous one, which was still being written.
        """
        self._finish()
        if step == self.latest:
            return
        about = {"layout": LAYOUT, "version": __version__, "stream": stream}
        about |= {"config": self.config, "arrays": digest.digests(state)}
        about["seal"] = _seal(step, about)
        with self._written(step):
            response = self._checkpointer.save_async(
                step, state, force=force, custom_metadata=about
            )
        self._writing = None if response is None else (step, response)

    def _finish(self) -> None:
        """Waits for the checkpoint in writing, and ends the thread that wrote it."""
        if self._writing is not None:
            (step, response), self._writing = self._writing, None
            with self._written(step):
                response.result()

    @contextlib.contextmanager
    def _written(self, step: int) -> Iterator[None]:
        """Turns what goes wrong in writing into `NotWritten`."""
        try:
            yield
        except Exception as error:  # of Orbax, TensorStore or the file system
            self._failed = True
            with contextlib.suppress(Exception):
                self._checkpointer.reload()  # or it lists the checkpoint that failed
            reason, last = _reason(error), self.latest
            advice = "; make room there, and the same command goes on" if reason in DISK else ""
            raise NotWritten(
                f"the checkpoint of step {step} in {self.directory} cannot be written ({reason}); "
                f"the last complete one is of step {'none' if last is None else last}{advice}"
            ) from error

    @contextlib.contextmanager
    def settled(self):
        """Context that waits on exit until all is written, also after an exception."""
        try:
            yield
        finally:
            self._finish()

    def close(self) -> None:
        """Waits until all is written and frees the threads."""
        try:
            self._finish()
        finally:
            # Orbax raises again what failed before.
            with contextlib.suppress(*[Exception] if self._failed else []):
                self._checkpointer.close()

    def load(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The latest (or given) checkpoint, placed on devices as `like` is.

        Args:
          like: a state of the same shapes; its arrays are not read.
          step: None = latest.

        Returns:
          (state, data position).

        Raises:
          CheckpointError: no checkpoint, or one of another layout (names the version that wrote
            it), config (names the fields) or model (names the first difference).
          DamagedCheckpoint: the checkpoint cannot be read, or its bits have changed.
        """
        steps = [c.step for c in self._checkpointer.checkpoints]
        if step is not None or not steps:
            return self._load(step, steps, like)
        skipped = []
        for step in reversed(steps):
            try:
                loaded = self._load(step, steps, like)
                break
            except DamagedCheckpoint as error:
                if not self._skip_damaged or step == steps[0]:
                    raise
                print(f"{error}; going on from the one before", file=sys.stderr)
                skipped.append(step)
        self._set_aside(*skipped)
        if skipped:
            self._checkpointer.reload()
        return loaded

    def _load(self, step: int | None, steps: list[int], like: TrainState):
        """One checkpoint of those that are there."""
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
            _check_seal(step, saved)
            _check_layout(where, saved, checkpoint.metadata, like)
            _check_config(where, saved["config"], self.config, self._grows)
            _check_arrays(where, checkpoint.metadata, like)
            state = self._arrays_of(step, checkpoint.metadata, like)
            _check_digests(state, saved.get("arrays"))
        except CheckpointError:
            raise
        except Exception as e:  # Orbax and TensorStore raise many types for a damaged file
            raise DamagedCheckpoint(
                f"{where} cannot be read, it may be truncated or damaged ({_reason(e)}); delete "
                f"its folder, or skip damaged ones, to resume from another; "
                f"others: {others or 'none'}"
            ) from e
        return state, saved["stream"]

    def _arrays_of(self, step: int, metadata, like: TrainState) -> TrainState:
        """The arrays, by their names: fields without an array may have come or gone since."""
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in digest.by_name(like).items()
        }
        found = self._checkpointer.load(step, _arranged(wanted, metadata))
        return _arranged(digest.by_name(found), like)


def _arranged(leaves: dict[str, Any], like: PyTree) -> PyTree:
    """Leaves by their names, in the structure of another tree that has the same names."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in paths(like)])


def _opened(directory: epath.Path, every: int, keep: int) -> ocp.training.Checkpointer:
    policies = ocp.training.save_decision_policies
    return ocp.training.Checkpointer(
        directory,
        save_decision_policy=policies.AnySavePolicy(
            [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
        ),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def _reason(error: BaseException) -> str:
    """What went wrong in a line: the system's words where there are some, else the error's."""
    while error.__cause__ is not None and not isinstance(error, OSError):
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    for words in DISK:
        if words in text:  # TensorStore's errors are texts of many lines
            return words
    line = next(iter(text.splitlines()), "")
    return f"{type(error).__name__}: {line:.120}" if line else type(error).__name__


# --- what a checkpoint says of itself


def _seal(step: int, about: dict[str, Any]) -> str:
    """A digest of the step and of all but the seal, as JSON."""
    sealed = {"step": step} | {name: value for name, value in about.items() if name != "seal"}
    text = json.dumps(sealed, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_seal(step: int, about: dict[str, Any]) -> None:
    """Raises ValueError on what is not as it was saved; checkpoints without a seal pass."""
    if about.keys() == ABOUT:
        if about["seal"] != _seal(step, about):
            raise ValueError("what it says of itself is not what was saved")
    elif about.keys() not in ABOUT_BEFORE:
        raise ValueError(f"it must say {sorted(ABOUT)} of itself; given {sorted(about)}")


def _check_digests(state: TrainState, saved: dict[str, str] | None) -> None:
    """Raises ValueError unless the arrays have the bits that were saved; names the first."""
    if saved is None:  # before there were digests
        return
    found = digest.digests(state)
    for name in sorted(saved.keys() | found.keys()):
        if saved.get(name) != found.get(name):
            raise ValueError(f"the bits of {name} are not those that were saved")


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
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if value and isinstance(value, dict):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields


def _check_config(
    where: str, saved: dict[str, Any], given: dict[str, Any], grows: Sequence[str]
) -> None:
    saved, given = _fields(saved), _fields(given)
    differing = sorted(k for k in saved.keys() | given.keys() if saved.get(k) != given.get(k))
    grown = [k for k in differing if k in grows and k in saved and given.get(k, 0) > saved[k]]
    differing = [k for k in differing if k not in grown]
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

    return {name: describe(x) for name, x in digest.by_name(tree).items()}


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
