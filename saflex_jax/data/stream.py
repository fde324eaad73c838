"""Shuffled, endless, resumable streams of aligned batches.

Batch t is a function of (seed, t): the position is one number, any number of processes sees the
same global batches, and grain can make batches ahead in any order. Indices come from one NumPy
permutation per epoch, because a per-sample pipeline costs more than the step of a small model
(docs/design.md). Anything with the same three methods, such as grain's iterators, can replace them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from saflex_jax import checks
from saflex_jax._compat import optional
from saflex_jax.batches import stack, take
from saflex_jax.data.pool import Pool
from saflex_jax.data.seeds import generator
from saflex_jax.types import Batch, Streams, Trace


def sizes(pools: Streams) -> Streams:
    """The number of rows of each data set; None for none.

    >>> sizes(Streams(Batch(np.zeros((3, 2)), np.eye(3), np.ones(3, bool), np.arange(3))))
    Streams(candidates=3, val=None, clean=None)

    Args:
      pools: whole data sets.
    """
    return Streams(*(None if pool is None else len(pool.labels) for pool in pools))


class _Stream:
    """An endless iterator; its position is the number of batches it gave."""

    _step = 0

    def _next(self) -> Streams:
        """The batch at the position."""
        return self.batch(self._step)

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Streams:
        batch = self._next()
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position."""
        self._step = int(state["step"])


class IndexStream(_Stream):
    """Row numbers of the next global batch: `next(stream)` is Streams of i64[B / processes].

    With a runner that keeps the data on its devices (`parallel.jit_runner(step).hold(pools)`) this
    is the whole input pipeline. Epochs follow each other without a gap: every sample comes once per
    epoch, no remainder is dropped, and all batches have one shape.

    >>> stream = IndexStream(Streams(candidates=6, val=4), batch_size=3, seed=0)
    >>> epoch = np.concatenate([next(stream).candidates for _ in range(2)])
    >>> sorted(epoch.tolist()), stream.get_state()
    ([0, 1, 2, 3, 4, 5], {'step': 2})

    Args:
      sizes: of the data sets, as `sizes` returns them; each is shuffled separately.
      batch_size: global rows of candidates (and of clean samples).
      val_batch_size: global rows of validation samples; None = all of them.
      seed: of the order.
      repeats: whether a batch may be larger than its data set and repeat rows.
      process_index: of this process, which takes that block of each global batch. All blocks have
        one size; if they do not divide the batch, the last ones end in -1, which is padding.
      process_count: number of processes.

    Raises:
      ValueError: an empty data set, or one smaller than its batch; a process_index out of range.
    """

    def __init__(
        self,
        sizes: Streams,
        *,
        batch_size: int,
        val_batch_size: int | None = None,
        seed: int,
        repeats: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        checks.whole(1, batch_size=batch_size)
        if val_batch_size is not None:
            checks.whole(1, val_batch_size=val_batch_size)
        checks.whole(1, process_count=process_count)
        if process_index not in range(process_count):
            raise ValueError(
                f"process_index must lie in [0, {process_count}); given {process_index}"
            )
        rows = {"candidates": batch_size, "val": val_batch_size or sizes.val, "clean": batch_size}
        for name, size in sizes._asdict().items():
            if size is None:
                continue
            checks.whole(1, **{f"the number of {name}": size})
            if rows[name] > size and not repeats:
                argument = "val_batch_size" if name == "val" else "batch_size"
                raise ValueError(
                    f"{argument} must be at most the {size} rows of {name}, or rows would come "
                    f"twice in a batch; given {rows[name]}"
                )
        self._sizes, self._rows, self._seed = sizes, rows, seed
        self._process = process_index, process_count
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # name -> (last epoch, its order)

    def _order(self, name: str, epoch: int, size: int) -> np.ndarray:
        last_epoch, order = self._orders.get(name, (None, None))
        if last_epoch != epoch:
            order = generator(f"order of {name}", self._seed, epoch).permutation(size)
            self._orders[name] = epoch, order
        return order

    def rows(self, step: int) -> Streams:
        """This process's rows of global batch `step`, a function of (seed, step); thread-safe.

        Args:
          step: number of the batch.
        """
        index, count = self._process

        def rows_of(name, size):
            if size is None:
                return None
            total = self._rows[name]
            share = -(-total // count)
            first, end = (step * total + min(i * share, total) for i in (index, index + 1))
            parts, missing = [], share - (end - first)  # where processes do not divide the batch
            while first < end:  # an epoch may end inside a batch
                epoch, place = divmod(first, size)
                parts.append(self._order(name, epoch, size)[place : place + end - first])
                first += len(parts[-1])
            return np.concatenate([*parts, np.full(missing, -1)])

        return Streams(*(rows_of(*item) for item in self._sizes._asdict().items()))

    batch = rows  # what `next` gives; `ArrayStream` gives the samples themselves


class PartStream(_Stream):
    """An `IndexStream` over a part of the data; its batches are rows of the whole.

    >>> batch = next(PartStream(Streams(np.array([3, 5, 7, 9])), batch_size=2, seed=0))
    >>> bool(np.isin(batch.candidates, [3, 5, 7, 9]).all())
    True

    Args:
      part: rows i[n] of each data set; None for none.
      **options: see `IndexStream`.

    Raises:
      ValueError: as `IndexStream`.
    """

    def __init__(self, part: Streams, **options):
        sizes = Streams(*(None if rows is None else len(rows) for rows in part))
        self._part, self._stream = part, IndexStream(sizes, **options)

    def rows(self, step: int) -> Streams:
        """This process's rows of global batch `step`, a function of (seed, step); thread-safe.

        Args:
          step: number of the batch.
        """
        places = self._stream.rows(step)
        return Streams(
            *(None if i is None else np.where(i < 0, -1, rows[i])  # -1 is padding
              for rows, i in zip(self._part, places))
        )  # fmt: skip

    batch = rows


class FoldStream(_Stream):
    """Cross-fitted rows: a validation sample is never in the batch that it validates.

    The validation samples are also candidates. They are split into K folds; batch t takes its
    validation rows from fold t mod K and its candidates from everything else. In K batches every
    sample of a fold may train K - 1 times and validates once.

    >>> stream = FoldStream(
    ...     Streams(10, 4), trusted=np.array([6, 7, 8, 9]), folds=2, seed=0, batch_size=8
    ... )
    >>> batch = next(stream)
    >>> bool(np.isin(6 + batch.val, batch.candidates).any())
    False

    Args:
      sizes: as for `IndexStream`, without clean samples.
      trusted: i[M], the validation samples' rows among the candidates, in their order.
      folds: K, 2 to M.
      seed: of the folds and of all orders.
      val_batch_size: global rows of validation samples; None = the size of the smallest fold.
      **options: see `IndexStream`.

    Raises:
      ValueError: folds out of range, `trusted` of another length, clean samples, or as
        `IndexStream`.

    Source: the idea of Chernozhukov et al., "Double/debiased machine learning for treatment and
    structural parameters", The Econometrics Journal 2018, section 3.
    """

    def __init__(
        self,
        sizes: Streams,
        *,
        trusted: np.ndarray,
        folds: int,
        seed: int,
        val_batch_size: int | None = None,
        **options,
    ):
        number = sizes.val or 0
        checks.whole(2, folds=folds)
        if sizes.clean is not None:
            raise ValueError("clean samples are not supported by folds; given some")
        if len(trusted) != number or folds > number:
            raise ValueError(
                "trusted must be the rows of all validation samples, at least one a fold; given "
                f"{len(trusted)} of {number} in {folds} folds"
            )
        fold = np.empty(number, np.int64)
        fold[generator("folds", seed).permutation(number)] = np.arange(number) % folds
        val = [np.flatnonzero(fold == k) for k in range(folds)]
        rest = [np.setdiff1d(np.arange(sizes.candidates), trusted[rows]) for rows in val]
        self._streams = [
            PartStream(
                Streams(*rows),
                seed=int(generator("fold", seed, k).integers(2**31)),
                # One shape for all folds, whose sizes may differ by one.
                val_batch_size=val_batch_size or number // folds,
                repeats=True,  # a fold may be smaller than the batch that the others fill
                **options,
            )
            for k, rows in enumerate(zip(rest, val))
        ]

    def rows(self, step: int) -> Streams:
        """This process's rows of global batch `step`, a function of (seed, step); thread-safe.

        Args:
          step: number of the batch.
        """
        turn, fold = divmod(step, len(self._streams))
        return self._streams[fold].rows(turn)

    batch = rows


class ArrayStream(IndexStream):
    """Host batches: `next(stream)` is this process's samples of the next global batch.

    >>> pool = Batch(np.eye(4, 2, dtype="f4"), np.eye(4), np.ones(4, bool), np.arange(4))
    >>> next(ArrayStream(Streams(pool), batch_size=2, seed=0)).candidates.inputs.shape
    (2, 2)

    Args:
      pools: Streams of whole data sets, each a Batch of N rows; inputs may be arrays, memory maps
        or `images.Rows`; 8-bit ones become floats in [0, 1].
      generated: generated candidates, by the rows' `index`. If a source has some, one of them
        replaces the row's inputs, label and trace, drawn uniformly by (seed, step, index). Other
        rows stay.
      **options: see `IndexStream`.

    Raises:
      ValueError: as `IndexStream`; a malformed pool; generated candidates that do not fit.
    """

    def __init__(self, pools: Streams, *, generated: Pool | None = None, **options):
        checks.streams(pools)
        super().__init__(sizes(pools), **options)
        if generated is not None:
            _fits(generated, pools.candidates)
        self._pools, self._generated = pools, generated

    def batch(self, step: int) -> Streams:
        """This process's samples of global batch `step`; thread-safe.

        Args:
          step: number of the batch.
        """
        batch = take(self._pools, self.rows(step))
        if self._generated is None:
            return batch
        return batch._replace(candidates=self._replaced(step, batch.candidates))

    def _replaced(self, step: int, rows: Batch) -> Batch:
        """The rows; where the source has generated candidates one of them replaces the row."""
        counts = self._generated.draws(rows.index)
        # One number for every source: a row does not depend on the other rows of the batch.
        rng = generator("generated", self._seed, step)
        draws = (rng.random(len(self._generated))[rows.index] * counts).astype(np.int64)
        places = np.flatnonzero(counts)
        inputs, labels = np.array(rows.inputs), np.array(rows.labels)
        drawn = rows.index[places], draws[places]
        inputs[places], labels[places] = self._generated(*drawn)
        rows = rows._replace(inputs=inputs, labels=labels)
        if self._generated.trace is None:
            return rows
        return rows._replace(trace=_traced(rows.index, places, self._generated, *drawn))


class StackedStream(_Stream):
    """The batches of several streams side by side, for the members of a sweep.

    Every array has a leading axis with one entry per member (`parallel.sweep_runner`).

    >>> streams = [IndexStream(Streams(6), batch_size=3, seed=seed) for seed in (0, 1)]
    >>> next(StackedStream(streams)).candidates.shape
    (2, 3)

    Args:
      streams: one per member, at their start; their `batch(step)` is called.

    Raises:
      ValueError: no stream; at a batch, members whose shapes differ.
    """

    def __init__(self, streams: Sequence[IndexStream | PartStream | FoldStream]):
        checks.whole(1, **{"the number of streams": len(streams)})
        self._streams = streams

    def batch(self, step: int) -> Streams:
        """All members' batches `step`; thread-safe if the streams are.

        Args:
          step: number of the batch.
        """
        return stack([stream.batch(step) for stream in self._streams])


class Prefetched(_Stream):
    """A stream whose batches grain's threads make ahead and may place on the devices.

    It gives the same batches as `stream` and shares its position: a checkpoint of one continues
    with the other. Batches made ahead when a run stops are made again.

    >>> plain, ahead = (IndexStream(Streams(6), batch_size=3, seed=0) for _ in range(2))
    >>> bool((next(Prefetched(ahead)).candidates == next(plain).candidates).all())
    True

    Args:
      stream: its `batch(step)` is called from several threads.
      threads: number of threads that make batches.
      ahead: number of batches to make ahead.
      place: applied to each batch in its thread: a runner's `put_batch` copies it to the devices
        while the previous step runs.

    Raises:
      ImportError: grain is not installed.
    """

    def __init__(
        self,
        stream: IndexStream,
        *,
        threads: int = 2,
        ahead: int = 4,
        place: Callable[[Streams], Streams] | None = None,
    ):
        checks.whole(1, threads=threads, ahead=ahead)
        with optional("grain"):
            import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)

        def placed_batch(step):
            batch = stream.batch(step)
            return batch if place is None else place(batch)

        def batches_from(step):
            steps = grain.MapDataset.range(step, sys.maxsize)
            return iter(steps.map(placed_batch).to_iter_dataset(options))

        self._batches_from = batches_from
        self.set_state(stream.get_state())

    def _next(self) -> Streams:
        try:
            return next(self._batches)
        except Exception:
            self.set_state(self.get_state())  # or grain would skip the batch that failed
            raise

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position.

        Args:
          state: what `get_state` returned.
        """
        super().set_state(state)
        self._batches = self._batches_from(self._step)


def _traced(index, places, generated, *drawn) -> Trace:
    """The trace of a batch: the candidate's where there is one, else the identity's, place 0."""
    of_pool, at = generated.trace, generated.places(*drawn)
    shape = len(index), of_pool.operation.shape[1]
    trace = Trace(np.zeros(shape, np.int32), np.zeros(shape, np.float32),
                  np.repeat(index[:, None], shape[1], 1))  # fmt: skip
    trace.operation[places], trace.magnitude[places] = of_pool.operation[at], of_pool.magnitude[at]
    return trace


def _fits(generated: Pool, candidates: Batch) -> None:
    """Raises unless generated candidates can replace the others."""
    inputs = candidates.inputs
    if getattr(inputs, "dtype", None) not in (np.float32, np.uint8):
        given = getattr(inputs, "dtype", type(inputs).__name__)
        raise ValueError(f"candidates.inputs must be float32 or uint8; given {given}")
    for name, given, expected in (
        ("shape", generated.shape, inputs.shape[1:]),
        ("num_classes", generated.num_classes, candidates.labels.shape[1]),
    ):
        if given != expected:
            raise ValueError(f"generated.{name} must be {expected}; given {given}")
    if not 0 <= np.min(candidates.index) <= np.max(candidates.index) < len(generated):
        raise ValueError(
            f"candidates.index must lie in [0, {len(generated)}), the sources of generated; given "
            f"{np.min(candidates.index)} to {np.max(candidates.index)}"
        )
