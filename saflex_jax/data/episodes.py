"""Few-shot episodes: a few classes, with support samples to learn from and queries to classify."""

from __future__ import annotations

import numpy as np

from saflex_jax import checks
from saflex_jax.data.seeds import generator
from saflex_jax.data.splits import Split
from saflex_jax.data.stream import IndexStream
from saflex_jax.types import Streams


class EpisodeStream(IndexStream):
    """Row numbers of the next global batch of episodes: `next(stream).candidates` is i64[rows].

    An episode has `ways` classes, drawn uniformly, with `shots` support rows and `queries` query
    rows of each, drawn uniformly from the class. Rows are in the order [class, shots + queries], so
    a row's position gives its class within the episode. Episode g of a stream is a function of
    (purpose, seed, g). Batch t holds episodes t E to t E + E - 1, and a process takes a block of
    whole episodes. The runner must hold the candidates: `runner.hold(Streams(candidates))`.

    >>> labels = np.repeat([0, 1, 2], 5)
    >>> stream = EpisodeStream(labels, ways=2, shots=1, queries=2, episodes=1, seed=0)
    >>> rows = labels[next(stream).candidates].reshape(2, 3)
    >>> bool((rows == rows[:, :1]).all())
    True

    Args:
      labels: i[N], classes.
      ways: classes per episode, at least two.
      shots: support rows of each class.
      queries: query rows of each class.
      episodes: E, in a global batch.
      seed: of all draws.
      purpose: streams with one seed and different purposes are independent.
      process_index: of this process, which takes that block of each global batch.
      process_count: number of processes.

    Raises:
      ValueError: labels that are not classes; fewer classes than ways; a class with too few
        samples; episodes that do not divide among the processes; a number out of range.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        ways: int,
        shots: int,
        queries: int,
        episodes: int,
        seed: int,
        purpose: str = "training episodes",
        process_index: int = 0,
        process_count: int = 1,
    ):
        labels = np.asarray(labels)
        checks.integers(np.max(labels, initial=0) + 1, labels=labels)
        checks.whole(2, ways=ways)
        checks.whole(1, shots=shots, queries=queries, episodes=episodes)
        classes, counts = np.unique(labels, return_counts=True)
        if len(classes) < ways:
            raise ValueError(f"labels must be of at least {ways} classes; given {len(classes)}")
        rows_of_class = shots + queries
        if counts.min() < rows_of_class:
            raise ValueError(
                f"labels must have {shots} + {queries} samples of every class; "
                f"class {classes[counts.argmin()]} has {counts.min()}"
            )
        super().__init__(
            Streams(len(labels)),
            batch_size=episodes * ways * rows_of_class,
            repeats=True,  # in another episode
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )
        if episodes % process_count:
            raise ValueError(
                f"episodes must be a multiple of {process_count} processes; given {episodes}"
            )
        self._places = [np.flatnonzero(labels == k) for k in classes]
        self._ways, self._rows_of_class, self._purpose = ways, rows_of_class, purpose
        self._share = episodes // process_count

    def _episode(self, number: int) -> np.ndarray:
        rng = generator(self._purpose, self._seed, number)
        classes = rng.choice(len(self._places), self._ways, replace=False)
        rows = [rng.choice(self._places[k], self._rows_of_class, replace=False) for k in classes]
        return np.concatenate(rows)

    def rows(self, step: int) -> Streams:
        """This process's rows of global batch `step`, a function of (seed, step); thread-safe.

        Args:
          step: number of the batch.
        """
        index, count = self._process
        first = (step * count + index) * self._share
        return Streams(np.concatenate([self._episode(first + n) for n in range(self._share)]))

    batch = rows


def novel_classes(split: Split, labels: np.ndarray, *, novel: int, num_classes: int) -> Split:
    """Trains and validates on the first classes only, and tests on the last `novel` only.

    >>> split = Split(np.arange(0, 8), np.arange(8, 12), np.arange(12, 16))
    >>> known = novel_classes(split, np.arange(16) % 4, novel=2, num_classes=4)
    >>> known.train.tolist(), known.test.tolist()
    ([0, 1, 4, 5], [14, 15])

    Args:
      split: row numbers of a data set.
      labels: i[N], classes of the whole data set.
      novel: number of novel classes.
      num_classes: K.

    Raises:
      ValueError: labels that are not classes; fewer than two classes in train or in test.
    """
    labels = np.asarray(labels)
    checks.integers(num_classes, labels=labels)
    is_novel = labels >= num_classes - novel
    train, val = (index[~is_novel[index]] for index in (split.train, split.val))
    test = split.test[is_novel[split.test]]
    for name, index in {"train": train, "test": test}.items():
        left = len(np.unique(labels[index]))
        if left < 2:
            raise ValueError(
                f"novel must leave at least two classes in {name}; "
                f"{novel} of {num_classes} leave {left}"
            )
    return Split(train, val, test)
