"""The training loop of the package."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, cast

import jax
import numpy as np
from tqdm import tqdm

from saflex_jax import checks
from saflex_jax.parallel.distributed import preempted
from saflex_jax.parallel.runners import Runner
from saflex_jax.train.checkpoint import Checkpoints
from saflex_jax.train.metrics import MetricsWriter
from saflex_jax.train.stop import StopRequest
from saflex_jax.types import Batch, Metrics, Streams, TrainState

WINDOW = "window"  # in a checkpoint's position: the metrics since the last record


class Stream(Protocol):
    """An endless, resumable source of host batches; grain's iterators have the same methods."""

    def __next__(self) -> Streams:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position."""
        ...


class FitResult(NamedTuple):
    """How a run ended.

    >>> result = FitResult(state=None, history=[{"step": 50, "loss": 0.25}], stopped_by=None)
    >>> result.history[-1]["loss"]
    0.25

    Attributes:
      state: the last TrainState.
      history: the logged records, [{"step": ..., name: value}]; for a sweep, values are lists with
        one number per member (`of_members`).
      stopped_by: the signal that ended the run early (a checkpoint was written), or None.
    """

    state: TrainState
    history: list[dict[str, float]]
    stopped_by: signal.Signals | None

    def completed(self) -> TrainState:
        """The state, of a run that went to its end: a signal that ended it early is raised again.

        Raises:
          KeyboardInterrupt: after Ctrl-C, and after a signal that this process ignores otherwise,
            as it does Ctrl-C where a shell started it in the background.
        """
        if self.stopped_by is not None:
            signal.raise_signal(self.stopped_by)
            raise KeyboardInterrupt
        return self.state


class Diverged(FloatingPointError):
    """A metric was not finite; the message names step, terms and the last good checkpoint.

    For a sweep it names the members, and the terms of the first of them.
    """


def _stop_request() -> StopRequest:
    """SIGINT and SIGTERM; with several processes JAX's pre-emption service takes SIGTERM."""
    several = jax.process_count() > 1
    return StopRequest([signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM])


def _shapes(batch: Streams) -> list[tuple[str, tuple, str]]:
    """(name, shape, dtype) of every array."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    return [(jax.tree_util.keystr(p), np.shape(x), str(x.dtype)) for p, x in leaves]


def _check_batch(step: int, batch: Streams, first: list[tuple] | None) -> list[tuple]:
    """Raises on a malformed first batch, and on a later one that would compile again.

    Args:
      step: of the batch.
      batch: samples, or rows of data that the runner holds.
      first: what this function returned for the first batch; None for the first batch.

    Returns:
      (name, shape, dtype) of every array.
    """
    if first is None:
        # Rows of held data, and batches that are on devices already, are checked elsewhere.
        candidates = batch.candidates
        if isinstance(candidates, Batch) and not getattr(candidates.mask, "committed", False):
            of_sweep = np.ndim(candidates.mask) == 2  # an axis of members in front
            for member in range(len(candidates.mask)) if of_sweep else [...]:
                checks.streams(jax.tree.map(lambda x, m=member: x[m], batch))
        return _shapes(batch)
    now = _shapes(batch)
    if now != first:
        changed = [pair for pair in zip(first, now) if pair[0] != pair[1]]
        raise ValueError(
            f"the batch of step {step} must have the first one's shapes and dtypes; "
            f"(name, shape, dtype) first and now: {changed or 'another structure'}"
        )
    return first


def _check_finite(step: int, metrics: dict[str, tuple], checkpoints: Checkpoints | None) -> None:
    values = {name: total for name, (total, _) in metrics.items()}
    bad = ~np.isfinite(np.array([*values.values()])).all(0)
    if not np.any(bad):
        return
    who = ""
    if np.ndim(bad):  # of a sweep
        members = np.flatnonzero(bad).tolist()
        values = {name: value[members[0]] for name, value in values.items()}
        who = f" of members {members}"
    last = "none"
    if checkpoints is not None and checkpoints.latest is not None:
        last = f"step {checkpoints.latest} in {checkpoints.directory}"
    terms = ", ".join(f"{name} {float(value):.6g}" for name, value in sorted(values.items()))
    raise Diverged(f"step {step}{who} is not finite: {terms}; last good checkpoint: {last}")


def _shown(value: float | list[float | None]) -> str:
    """A value for the progress bar; of a sweep the mean of the members that have one."""
    values = value if isinstance(value, list) else [value]
    return f"{np.mean([v for v in values if v is not None]):.4g}"


def _filled(value: float | list[float | None]) -> float | list[float]:
    """A value of an evaluation; 0 for a member of a sweep that has none."""
    return [v or 0.0 for v in value] if isinstance(value, list) else value


class _Window:
    """Sums of the metrics since the last record, in f64, so that averages are exact.

    A checkpoint holds them: the record that a resume completes is that of a run without one.
    """

    def __init__(self, sums: dict[str, Any] | None = None):
        self._sums = {name: np.array(pair) for name, pair in (sums or {}).items()}
        self._began, self._timed = time.perf_counter(), 0

    def add(self, metrics: Metrics) -> None:
        for name, pair in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.array(pair, np.float64)
        self._timed += 1

    def state(self) -> dict[str, Any]:
        """The sums, JSON-able."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def record(self) -> dict[str, Any]:
        """Exact means of (sum, count) pairs; a metric that nothing contributed to is left out.

        Of a sweep a list, in which None stands for what a member leaves out. The time is that of
        the steps since a resume.
        """
        means = {name: _mean(*pair) for name, pair in self._sums.items() if np.any(pair[1] > 0)}
        elapsed = time.perf_counter() - self._began
        return means | {"seconds_per_step": elapsed / max(self._timed, 1)}


def _mean(total: np.ndarray, count: np.ndarray) -> Any:
    if np.ndim(total):
        return [_mean(*pair) for pair in zip(total, count)]
    return float(total / count) if count > 0 else None


def _resumed(
    state: TrainState, stream: Any, checkpoints: Checkpoints | None, writer: MetricsWriter | None
) -> tuple[TrainState, _Window]:
    """State and window of the checkpoint, if there is one; moves stream and writer there."""
    if checkpoints is None or checkpoints.latest is None:
        return state, _Window()
    state, position = checkpoints.load(state)
    window = position.pop(WINDOW, {})  # checkpoints had none before
    stream.set_state(position)
    if writer is not None:
        writer.keep_until(int(state.step))
    return state, _Window(window)


def fit(
    runner: Runner,
    state: TrainState,
    stream: Stream | Iterator[Streams],
    *,
    num_steps: int,
    log_every: int = 50,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    eval_every: int | None = None,
    writer: MetricsWriter | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
    description: str = "train",
    on_step: Callable[[int], None] | None = None,
) -> FitResult:
    """Runs steps until `state.step` is `num_steps`, from the checkpoint if there is one.

    Ctrl-C and SIGTERM finish the step, save a checkpoint and return. The same call then continues
    bit for bit, also after SIGKILL; only the records' times differ. A second Ctrl-C raises
    KeyboardInterrupt. Metrics stay on the device until they are logged or a checkpoint is due. A
    step whose metrics are not finite is never saved.

    >>> from saflex_jax import data, parallel
    >>> def step(state, streams, *, reduce):
    ...     mean = reduce(jax.numpy.mean(streams.candidates.inputs))
    ...     return state._replace(step=state.step + 1), {"mean": (mean, 1.0)}
    >>> pool = Batch(np.arange(4.0), np.eye(4), np.ones(4, bool), np.arange(4))
    >>> stream = data.ArrayStream(Streams(pool), batch_size=4, seed=0)
    >>> state = TrainState(np.int32(0), {}, {}, (), jax.random.key(0))
    >>> runner = parallel.jit_runner(step, devices=jax.devices()[:1])
    >>> result = fit(runner, state, stream, num_steps=6, log_every=3, progress=False)
    >>> [(record["step"], record["mean"]) for record in result.history]
    [(3, 1.5), (6, 1.5)]

    Args:
      runner: from `saflex_jax.parallel`.
      state: initial TrainState of the run.
      stream: endless; with checkpoints it needs get_state and set_state.
      num_steps: the step to reach; steps before a resume count.
      log_every: >= 1, number of steps that one record averages.
      evaluate: state -> values, logged with the prefix "eval/"; called every `eval_every` steps.
        For a sweep each value is a list (`evaluate_each`).
      eval_every: a multiple of log_every; None = never.
      writer: of the records.
      checkpoints: None = no checkpoint is written or read.
      progress: whether to show a progress bar on stderr.
      description: title of the progress bar.
      on_step: called with the number of each step once it is dispatched (`parallel.Watch.step`).

    Raises:
      Diverged: a metric is not finite.
      ValueError: log_every is no whole number; eval_every is not a multiple of it; a malformed
        first batch; a batch whose shapes or dtypes differ from the first one's (it would compile
        again).
      CheckpointError: the checkpoint is damaged, belongs to another run, or cannot be written.
    """
    checks.whole(1, log_every=log_every)
    if eval_every is not None and eval_every % log_every:
        raise ValueError(
            f"eval_every must be a multiple of log_every = {log_every}; given {eval_every}"
        )
    if eval_every is not None and evaluate is None:
        raise ValueError(f"evaluate must be given with eval_every; given {eval_every} alone")
    state, window = _resumed(runner.put_state(state), stream, checkpoints, writer)
    first = step = int(state.step)
    first_shapes = None
    pending: list[tuple[int, Metrics]] = []  # steps not checked, and so not in the window
    history: list[dict[str, Any]] = []
    show = progress and jax.process_index() == 0

    def check_pending():
        for number, metrics in jax.device_get(pending):
            _check_finite(number, metrics, checkpoints)
            window.add(metrics)
        pending.clear()

    with (
        contextlib.nullcontext() if checkpoints is None else checkpoints.settled(),
        _stop_request() as stop,
        tqdm(
            total=num_steps, initial=first, desc=description, disable=not show, file=sys.stderr
        ) as bar,
    ):
        ending = step >= num_steps
        while not ending:
            batch = next(stream)
            first_shapes = _check_batch(step + 1, batch, first_shapes)
            state, metrics = runner.step(state, runner.put_batch(batch))
            step += 1
            if on_step is not None:
                on_step(step)
            pending.append((step, metrics))
            bar.update()
            if preempted(step):
                stop.signal = signal.SIGTERM
            ending = step == num_steps or stop.signal is not None
            saving = checkpoints is not None and (ending or checkpoints.due(step))
            # A run that stops leaves its window to the checkpoint.
            logging = step % log_every == 0 or step == num_steps or (ending and not saving)
            if saving or logging:
                check_pending()
            if logging:
                record: dict[str, Any] = window.record()
                if (
                    evaluate is not None
                    and eval_every
                    and (step % eval_every == 0 or step == num_steps)
                ):
                    values = {f"eval/{k}": v for k, v in evaluate(state).items()}
                    _check_finite(
                        step, {k: (_filled(v), 1) for k, v in values.items()}, checkpoints
                    )
                    record |= values
                history.append({"step": step, **record})
                if writer is not None:
                    writer.write(step, record)
                names = (k for k in ("loss", "eval/accuracy") if k in record)
                bar.set_postfix({k: _shown(record[k]) for k in names})
                window = _Window()
            if checkpoints is not None and saving:
                position = {**cast(Stream, stream).get_state(), WINDOW: window.state()}
                checkpoints.save(step, state, position, force=ending)
    return FitResult(state, history, stop.signal if step < num_steps else None)
