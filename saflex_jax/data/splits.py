"""Which samples train, validate and test: sets of indices, functions of a seed."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from saflex_jax import checks
from saflex_jax._compat import optional
from saflex_jax.data.seeds import generator


class Split(NamedTuple):
    """Row numbers of a data set, each i[n], sorted.

    >>> Split(*np.split(np.arange(6), [3, 4])).val.tolist()
    [3]

    Attributes:
      train: samples to augment and train on.
      val: samples that direct the learning of weights and labels.
      test: samples for the reported scores.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def stratified_split(labels: np.ndarray, *, val: int, test: int, seed: int) -> Split:
    """A random split of all samples that keeps the class proportions.

    >>> split = stratified_split(np.arange(12) % 2, val=2, test=4, seed=0)
    >>> [len(rows) for rows in split]
    [6, 2, 4]

    Args:
      labels: i[N], classes.
      val, test: number of samples, each at least one per class.
      seed: of the shuffle.

    Raises:
      ImportError: scikit-learn is not installed.
      ValueError: a split would be empty or smaller than the number of classes; a class with a
        single sample.
    """
    labels = np.asarray(labels)
    checks.whole(val=val, test=test)
    _enough(labels, train=len(labels) - val - test, val=val, test=test)
    rest, test_index = _hold_out(np.arange(len(labels)), labels, test, seed)
    train_index, val_index = _hold_out(rest, labels, val, seed)
    return Split(np.sort(train_index), np.sort(val_index), np.sort(test_index))


def hold_out(
    index: np.ndarray, labels: np.ndarray, *, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out `size` of the given samples in class proportions: (rest, held), sorted.

    >>> rest, held = hold_out(np.arange(8), np.arange(12) % 2, size=2, seed=0)
    >>> len(rest), len(held)
    (6, 2)

    Args:
      index: i[n], rows to take from, such as an official training split.
      labels: i[N], classes of the whole data set.
      size: number of samples to hold out; at least one per class must be held out, and left.
      seed: of the shuffle.

    Raises:
      ImportError: scikit-learn is not installed.
      ValueError: rows out of range; too few samples on either side; a class with a single sample.
    """
    index, labels = np.asarray(index), np.asarray(labels)
    checks.integers(len(labels), index=index)
    checks.whole(size=size)
    _enough(labels[index], rest=len(index) - size, held=size)
    rest, held = _hold_out(index, labels, size, seed)
    return np.sort(rest), np.sort(held)


def few_shot(labels: np.ndarray, *, per_class: int, seed: int) -> np.ndarray:
    """Rows of `per_class` random samples of every class: i[per_class * K], sorted.

    >>> labels = np.array([0, 0, 0, 1, 1, 2])
    >>> labels[few_shot(labels, per_class=1, seed=0)].tolist()
    [0, 1, 2]

    Args:
      labels: i[N], classes; K different ones.
      per_class: samples of each class.
      seed: draws of different seeds are independent.

    Raises:
      ValueError: a class with fewer samples.
    """
    labels = np.asarray(labels)
    checks.rows(len(labels), labels=labels)
    checks.whole(1, per_class=per_class)
    if not labels.size:
        raise ValueError("labels must hold at least one sample; given 0")
    rng, drawn = generator("few_shot", seed), []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if len(places) < per_class:
            raise ValueError(
                f"labels must have {per_class} samples of every class; "
                f"class {label} has {len(places)}"
            )
        drawn.append(rng.choice(places, per_class, replace=False))
    return np.sort(np.concatenate(drawn))


def long_tail(labels: np.ndarray, *, ratio: float, seed: int) -> np.ndarray:
    """Rows of a subset whose class sizes fall off exponentially, in the order of the labels.

        n_k = floor(n_0 ratio^(-k / (K - 1))) ,  n_0 the size of the smallest class

    With one seed, a larger ratio keeps a subset of a smaller ratio's rows.

    >>> labels = np.repeat([0, 1, 2], 16)
    >>> np.bincount(labels[long_tail(labels, ratio=4.0, seed=0)]).tolist()
    [16, 8, 4]

    Args:
      labels: i[N], classes; K different ones, at least two.
      ratio: n_0 / n_(K-1), >= 1.
      seed: draws of different seeds are independent.

    Returns:
      i[sum of n_k], sorted.

    Raises:
      ValueError: a ratio out of range, or one that leaves a class without a sample.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    NeurIPS 2019, where all classes have one size.
    """
    labels = np.asarray(labels)
    checks.rows(len(labels), labels=labels)
    if not 1 <= ratio < math.inf:
        raise ValueError(f"ratio must be >= 1 and finite; given {ratio}")
    classes, sizes = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"labels must be of at least two classes; given {len(classes)}")
    smallest = sizes.min()
    if ratio > smallest:
        raise ValueError(
            f"ratio must be at most {smallest}, the size of the smallest class; given {ratio}"
        )
    shares = float(ratio) ** (-np.arange(len(classes)) / (len(classes) - 1))
    num_kept = np.floor(smallest * shares * (1 + 1e-9)).astype(int)  # 699.9999999999999 is 700
    rng = generator("long_tail", seed)
    drawn = [rng.permutation(np.flatnonzero(labels == k))[:n] for k, n in zip(classes, num_kept)]
    return np.sort(np.concatenate(drawn))


def fingerprints(inputs: Any, *, chunk: int) -> np.ndarray:
    """A hash of each row's bytes, V16[N]: rows with equal hashes are equal bit for bit.

    >>> prints = fingerprints(np.array([[1, 2], [3, 4], [1, 2]]), chunk=2)
    >>> (prints[0] == prints).tolist()
    [True, False, True]

    Args:
      inputs: [N, ...], an array or anything with a length whose slices are arrays.
      chunk: rows in memory at once.

    Raises:
      ValueError: slices of the wrong length, or arrays of Python objects.

    Source: BLAKE2b, RFC 7693, with 16 bytes.
    """
    checks.whole(1, chunk=chunk)
    digests = [
        hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        for rows in chunks(inputs, chunk)
        for row in rows
    ]
    return np.frombuffer(b"".join(digests), "V16")  # S16 would strip trailing zeros


def without_copies(split: Split, prints: np.ndarray) -> tuple[Split, dict[str, int]]:
    """Removes copies of val and test samples from train, and of test samples from val.

    The test split stays whole, and copies within one split stay.

    >>> split = Split(np.array([0, 1]), np.array([2]), np.array([3]))
    >>> rest, removed = without_copies(split, np.array(["a", "b", "c", "a"]))
    >>> rest.train.tolist(), removed
    ([1], {'train': 1, 'val': 0})

    Args:
      split: places in a data set.
      prints: [N], `fingerprints` of the inputs.

    Returns:
      (the split, the number of samples removed: {"train": ..., "val": ...}).

    Raises:
      ValueError: places out of range.
    """
    for name, index in split._asdict().items():
        checks.integers(len(prints), **{name: index})

    def unlike(index, *others):
        return index[~np.isin(prints[index], prints[np.concatenate(others)])]

    train, val = unlike(split.train, split.val, split.test), unlike(split.val, split.test)
    removed = {"train": len(split.train) - len(train), "val": len(split.val) - len(val)}
    return Split(train, val, split.test), removed


def check_split(split: Split, labels: np.ndarray, num_classes: int, *, novel: bool = False) -> None:
    """Raises unless the split can be trained and evaluated on.

    >>> check_split(Split(*np.split(np.arange(6), 3)), np.arange(6) % 2, num_classes=2)

    Args:
      split: places in a data set.
      labels: i[N], classes; or [N, K], soft or several at once, whose classes are not checked.
      num_classes: K.
      novel: whether test may hold classes that train lacks.

    Raises:
      ValueError: an empty split, places out of range, splits that overlap, labels out of range, a
        class of val or test that train lacks.
    """
    labels = np.asarray(labels)
    for name, index in split._asdict().items():
        if not len(index):
            raise ValueError(f"the {name} split must hold at least one sample; given 0")
        checks.integers(len(labels), **{name: index})
    for (a, first), (b, second) in itertools.combinations(split._asdict().items(), 2):
        both = np.intersect1d(first, second)
        if both.size:
            raise ValueError(
                f"{a} and {b} must be disjoint; both hold sample {both[0]} ({both.size} in all)"
            )
    if labels.ndim == 2:
        return
    checks.integers(num_classes, labels=labels)
    train, val, test = (np.bincount(labels[i], minlength=num_classes) for i in split)
    held_out = {"val": val} if novel else {"val": val, "test": test}
    for name, counts in held_out.items():
        missing = np.flatnonzero((train == 0) & (counts > 0))
        if missing.size:
            raise ValueError(
                f"train must hold every class of {name}; class {missing[0]} has "
                f"{counts[missing[0]]} samples in {name} and none in train"
            )


def chunks(inputs: Any, size: int) -> Iterator[np.ndarray]:
    """The rows of `inputs` in order, as arrays of at most `size` rows, read on access.

    >>> [rows.tolist() for rows in chunks(np.arange(5), 2)]
    [[0, 1], [2, 3], [4]]

    Raises:
      ValueError: slices of another length than asked for, or arrays of Python objects.
    """
    for start in range(0, len(inputs), size):
        stop = min(start + size, len(inputs))
        rows = np.asarray(inputs[start:stop])
        if rows.dtype.hasobject or rows.shape[:1] != (stop - start,):
            raise ValueError(
                f"inputs[{start}:{stop}] must be an array of {stop - start} rows; "
                f"given {rows.dtype}{list(rows.shape)}"
            )
        yield rows


def _enough(labels: np.ndarray, **sizes: int) -> None:
    """Raises unless splits of these sizes can hold every class of labels i[N] once."""
    checks.rows(len(labels), labels=labels)
    classes = len(np.unique(labels))
    for name, size in sizes.items():
        if size < classes:
            raise ValueError(
                f"the {name} split must hold at least one sample for each of {classes} classes; "
                f"given {size} of {len(labels)}"
            )


def _hold_out(
    index: np.ndarray, labels: np.ndarray, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Stratified (rest, held), shuffled: a second draw from `rest` depends on its order."""
    with optional("scikit-learn"):
        from sklearn.model_selection import train_test_split

    classes, counts = np.unique(labels[index], return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            "labels must have two samples of every class to be split in proportion; "
            f"class {classes[counts.argmin()]} has {counts.min()}"
        )
    rest, held = train_test_split(index, test_size=size, random_state=seed, stratify=labels[index])
    return rest, held
