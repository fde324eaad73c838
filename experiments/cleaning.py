"""Given labels cleaned before training, without a share of wrong labels.

`config.data.cleaning` names one of KINDS. By CLEANINGS, what people try first, samples whose label
is probably wrong are left out, so that every batch is full of the others; how many are left differs
by the seed. By "audit" (`saflex_jax.audit`) all samples stay that are like the trusted ones, with
learned soft labels; with labels as given if there is no sure evidence that some are wrong. By
"audit_first" the same ones stay, with labels as given, and where there is evidence SAFLEX's rule
starts from what the audit believes. Trusted samples that train, too, are never left out, and they
help to judge the others. No right label is read otherwise.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
from sklearn import linear_model, neighbors, preprocessing
from threadpoolctl import threadpool_limits

from saflex_jax.audit import SURE, audit
from saflex_jax.batches import floats
from saflex_jax.data.seeds import generator
from saflex_jax.files import renamed

_CLEANED: dict[tuple, Any] = {}  # arms that differ in other options clean the same samples
FILE = "audit.npz"  # in the folder of a run: what an audit learned before it
FOLDS = 5
C = 0.01  # 1 / regularisation of the logistic regression
NEIGHBOURS = 50
WIDEST = 2**14  # numbers of an input that an audit reads: it makes matrices of their square


class Start(NamedTuple):
    """What an audit believes of N samples, for a rule to start from (`rules.started`).

    Attributes:
      beliefs: f32[N, K].
      noise_rate: share of wrong labels.
    """

    beliefs: np.ndarray
    noise_rate: float


class Cleaned(NamedTuple):
    """What is made of N samples.

    Attributes:
      stay: bool[N], which of them train.
      labels: of all N, as given or learned ones f32[N, K].
      start: of a rule; None where nothing is known.
    """

    stay: np.ndarray
    labels: np.ndarray
    start: Start | None = None


def cleaned(
    kind: str, inputs: Any, labels: np.ndarray, num_classes: int, *, trusted: int, seed: int,
    folder: pathlib.Path | None = None,
) -> Cleaned:  # fmt: skip
    """What `kind` makes of the samples.

    Args:
      kind: of KINDS.
      inputs, labels, trusted, seed: as of `kept`.
      num_classes: K.
      folder: of a run; what an audit learned is written there, and read when the run goes on.
    """
    if kind not in AUDITS:
        return Cleaned(kept(kind, inputs, labels, trusted=trusted, seed=seed), labels)
    found = audited(inputs, labels, num_classes, trusted=trusted, seed=seed, folder=folder)
    return found._replace(start=None) if kind == "audit" else found._replace(labels=labels)


def audited(
    inputs: Any, labels: np.ndarray, num_classes: int, *, trusted: int, seed: int,
    folder: pathlib.Path | None = None,
) -> Cleaned:  # fmt: skip
    """What `saflex_jax.audit` makes of the samples, of what `matrix` makes of the inputs.

    Raises:
      ValueError: several processes; inputs of more than WIDEST numbers; as `audit`.
    """
    x, name = matrix(inputs), "the audit of config.data.cleaning"
    if jax.process_count() > 1:
        raise ValueError(f"{name} runs in one process; given {jax.process_count()}")
    if x.shape[1] > WIDEST:
        raise ValueError(
            f"{name} takes inputs of at most {WIDEST} numbers, such as features; given {x.shape[1]}"
        )
    key = "audit", num_classes, trusted, seed, _digest(x, labels)
    if key not in _CLEANED and folder is not None and (folder / FILE).exists():
        with np.load(folder / FILE) as learned:
            if learned["of"] == repr(key):
                _CLEANED[key] = _read(learned)
    if key not in _CLEANED:
        known = np.arange(len(labels)) >= len(labels) - trusted
        try:
            found = audit(x, labels, trusted=known, num_classes=num_classes, seed=seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        stay = ~found.outside
        if found.evidence > SURE:
            start = Start(found.beliefs, found.noise_rate)
            _CLEANED[key] = Cleaned(stay, found.labels, start)
        else:
            _CLEANED[key] = Cleaned(stay, labels)
        if folder is not None:
            with renamed(folder / FILE, sync=True) as part, part.open("wb") as file:
                _write(file, _CLEANED[key], of=repr(key))
    return _CLEANED[key]


def _write(file: BinaryIO, found: Cleaned, *, of: str) -> None:
    start = {} if found.start is None else found.start._asdict()
    np.savez(file, of=of, stay=found.stay, labels=found.labels, **start)


def _read(learned: Mapping[str, np.ndarray]) -> Cleaned:
    """What `_write` wrote; files from before rules could start have no beliefs."""
    start = None
    if "beliefs" in learned:
        start = Start(learned["beliefs"], float(learned["noise_rate"]))
    return Cleaned(learned["stay"], learned["labels"], start)


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()


def kept(kind: str, inputs: Any, labels: np.ndarray, *, trusted: int, seed: int) -> np.ndarray:
    """Which samples stay, bool[N]; a class of which nothing would stay does as a whole.

    Args:
      kind: of CLEANINGS.
      inputs: of N samples: features [N, D], or [N, V, D] of V views, of which the first is read;
        images; a table {"numeric", "categorical"}.
      labels: the given ones, i[N].
      trusted: the last so many samples have right labels and stay.
      seed: of the folds.
    """
    labels = np.unique(labels, return_inverse=True)[1]  # from 0 on, each with a sample
    if labels.max() == 0:
        return np.ones(len(labels), bool)
    x = preprocessing.StandardScaler().fit_transform(matrix(inputs))
    key = kind, trusted, seed, _digest(x, labels)
    if key not in _CLEANED:
        with threadpool_limits(1):  # of small products; beside other work two threads are slower
            stay = CLEANINGS[kind](x, labels, trusted, seed)
        stay[len(labels) - trusted :] = True
        _CLEANED[key] = stay | np.isin(labels, np.setdiff1d(labels, labels[stay]))
    return _CLEANED[key]


def matrix(inputs: Any) -> np.ndarray:
    """f32[N, D]: of views the first, images flattened, categories as indicators."""
    columns = []
    for x in map(np.asarray, jax.tree.leaves(inputs)):
        if np.issubdtype(x.dtype, np.signedinteger):  # codes [N, E], -1 = missing
            columns += [np.eye(max(c.max(), 0) + 1)[c] * (c >= 0)[:, None] for c in x.T]
        else:
            columns.append(flat(x))
    return np.hstack(columns).astype(np.float32)


def flat(x: np.ndarray) -> np.ndarray:
    """[N, D] of one input: of views the first, images flattened."""
    x = floats(x[:, 0] if x.ndim == 3 else x)
    return x.reshape(len(x), -1)


# --- confident learning --------------------------------------------------------------------------


def confident(x: np.ndarray, labels: np.ndarray, trusted: int, seed: int) -> np.ndarray:
    """Confident learning with a logistic regression, as users of the package cleanlab do it.

    A sample is judged by a model that was trained on the other folds, and on all trusted samples.

    Source: Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset
    Labels", JAIR 2021; regularisation and folds by this project.
    """
    number = len(labels) - trusted
    probs = np.zeros((number, labels.max() + 1))
    fold = np.append(folds(labels[:number], seed), np.full(trusted, FOLDS))  # never held out
    for held_out in np.unique(fold[:number]):
        rest, own = fold != held_out, np.flatnonzero(fold == held_out)
        model = linear_model.LogisticRegression(C=C, max_iter=1000).fit(x[rest], labels[rest])
        probs[np.ix_(own, model.classes_)] = model.predict_proba(x[own])
    return np.append(~label_issues(labels[:number], probs), np.ones(trusted, bool))


def folds(labels: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each sample, i[N] in [0, FOLDS), with as many of each class as can be."""
    order = generator("cleaning", seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(labels)) % FOLDS
    return fold


def label_issues(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Samples whose given label is probably wrong, bool[N].

        t_j = mean of p_ij over the samples i given j
        J_kj = number of samples given k whose largest p_ij among those >= t_j is that of j
        n_kj = J_kj / sum_j J_kj * number given k         how many given k are of j

    flagged are, for all k != j, the n_kj samples given k with the largest p_ij - p_ik, unless the
    given label is what the model predicts.

    Args:
      labels: i[N].
      probs: p, f[N, K], of models that did not see the sample.

    Source: Northcutt et al. 2021, equations 1 to 3 and "prune by noise rate".
    """
    size, num_classes = probs.shape
    given = np.eye(num_classes, dtype=bool)[labels]
    number = given.sum(0)
    thresholds = np.where(number > 0, (probs * given).sum(0) / np.maximum(number, 1), np.inf)
    above = np.where(probs >= thresholds, probs, -1.0)
    sure = above.max(1) >= 0
    joint = np.zeros((num_classes, num_classes))
    np.add.at(joint, (labels[sure], above.argmax(1)[sure]), 1)
    joint *= (number / np.maximum(joint.sum(1), 1))[:, None]
    flagged = np.zeros(size, bool)
    for k, j in zip(*np.nonzero(np.rint(joint))):
        if k != j:
            rows = np.flatnonzero(labels == k)
            margin = probs[rows, j] - probs[rows, k]
            flagged[rows[np.argsort(-margin)[: int(np.rint(joint[k, j]))]]] = True
    return flagged & (probs.argmax(1) != labels)


# --- neighbours ----------------------------------------------------------------------------------


def confirmed(x: np.ndarray, labels: np.ndarray, trusted: int, seed: int) -> np.ndarray:
    """Samples of whose neighbours no other label is more frequent than their own.

    They are the NEIGHBOURS nearest others by the cosine, fewer where half of a class has fewer.
    """
    del trusted, seed
    num_classes = labels.max() + 1
    k = min(NEIGHBOURS, max(1, len(labels) // (2 * num_classes)))
    found = neighbors.NearestNeighbors(n_neighbors=k, metric="cosine").fit(x)
    votes = np.eye(num_classes, dtype=np.int16)[labels[found.kneighbors(return_distance=False)]]
    votes = votes.sum(1)
    return votes[np.arange(len(labels)), labels] == votes.max(1)


CLEANINGS: dict[str, Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]] = {
    "confident": confident,
    "neighbours": confirmed,
}
AUDITS = ("audit", "audit_first")
KINDS = (*CLEANINGS, *AUDITS)
