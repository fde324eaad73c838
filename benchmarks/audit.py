"""How well wrong labels and samples of no class are found, beside cleanlab.

    python -m benchmarks.audit [--json] [--out FILE] [--seeds=3] [--data_dir=data] [--parts=pools]
                               [--pools="cifar10n@crop, both"]

"labels": human labels of CIFAR-10N on ResNet-18 features, by `saflex_jax.audit` with 500 trusted
samples and without any, and by cleanlab as its documents say: logistic regression (C = .01, 5-fold
cross-validated), `get_label_quality_scores`, `find_label_issues`. cleanlab has no trusted samples
to read. "fair" is cleanlab with the trusted labels put right and left out of the count. Measured on
the samples that are not trusted. "at .74" is the precision where .74 of the wrong labels are found.

"pools": a generator's pool of which 40 % is bad: images of another data set, wrong labels, or both.
Dropped is what has a utility below zero. The right labels are read to measure alone.

"evidence": whether an audit knows that labels are wrong, of some samples of CIFAR-10N and of few:
its evidence in standard errors, the share of labels that it flags, and its noise rate.

"size": 50,000 random samples of 512 features. Seconds are of the clock, compilation included;
"CPU s" those of all cores together, which a busy machine changes little.

Needs features: `python -m experiments.features NAME --tag=TAG`, of PEOPLE and POOLS; and
`pip install -e ".[bench]"` for cleanlab, which is left out where it is missing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.preprocessing import StandardScaler

from benchmarks import reporting
from experiments.feature_sets import feature_set
from saflex_jax import checks
from saflex_jax.audit import audit
from saflex_jax.data.seeds import generator

SIZE, TRUSTED, RECALL = 12_000, 500, 0.74
LABELS = ("worst", "random1")
PEOPLE = "cifar10n@crop"  # whose labels people gave
# data set -> where what is outside comes from
POOLS = {
    PEOPLE: "fashion_mnist@crop",
    "fashion_mnist@crop": "mnist@plain",
    "mnist@plain": "usps@crop",
}
BAD = {"outside": (0.4, 0.0), "mislabelled": (0.0, 0.4), "both": (0.2, 0.2)}
PARTS = ("labels", "pools", "evidence", "size")
# Name -> samples, how many of them are trusted.
SAMPLES = {
    f"{size:,}, {trusted} trusted": (size, trusted)
    for size, trusted in ((SIZE, TRUSTED), (SIZE, 0), (600, 100), (600, 0), (150, 50))
}
LARGE, WIDE = 50_000, 512


def opened(name: str, folder: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(features f32[N, D] of the first rows as they are, right labels, other label sets)."""
    source = feature_set(name, folder, "").source
    size = min(SIZE, len(source.views))
    extra = {key: values[:size] for key, values in source.extra.items()}
    return np.array(source.views[:size, 0], np.float32), source.labels[:size], extra


def trusted_rows(labels: np.ndarray, seed: int) -> np.ndarray:
    """bool[N]: TRUSTED samples, as many of each class."""
    rng, known = generator("audit trusted", seed), np.zeros(len(labels), bool)
    classes = np.unique(labels)
    for k in classes:
        known[rng.permutation(np.flatnonzero(labels == k))[: TRUSTED // len(classes)]] = True
    return known


def measured(bad: np.ndarray, quality: np.ndarray, flagged: np.ndarray) -> dict[str, float]:
    """How well a quality, and flags, find what is bad."""
    found = np.sort(quality[bad])[int(np.ceil(RECALL * bad.sum())) - 1]
    return {
        "AUC": roc_auc_score(bad, -quality),
        "precision": bad[flagged].mean(),
        "recall": flagged[bad].mean(),
        "at .74": bad[quality <= found].mean(),
    }


def with_cleanlab(x: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(quality, flagged)."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    model = LogisticRegression(C=0.01, max_iter=1000)
    x = StandardScaler().fit_transform(x)
    probs = cross_val_predict(model, x, given, cv=5, method="predict_proba")
    return get_label_quality_scores(given, probs), find_label_issues(given, probs, n_jobs=1)


def with_audit(x, given, known, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """(quality, flagged)."""
    found = audit(x, given, trusted=known, seed=seed)
    return found.quality, found.wrong


def timed(job: Callable, *arrays: np.ndarray) -> tuple[Any, dict[str, float]]:
    """What a job returns, and how long it took."""
    start, used = time.perf_counter(), time.process_time()
    found = job(*arrays)
    return found, {"seconds": time.perf_counter() - start, "CPU s": time.process_time() - used}


def of_labels(name: str, seed: int, folder: str) -> dict[str, dict[str, float]]:
    """Who -> what was measured, of one label set."""
    x, right, extra = opened(PEOPLE, folder)
    known = trusted_rows(right, seed)
    corrected = np.where(known, right, extra[name])
    nobody = np.zeros(len(right), bool)
    jobs: dict[str, tuple[Callable, np.ndarray, np.ndarray]] = {
        "audit, 500 trusted": (partial(with_audit, known=known, seed=seed), corrected, ~known),
        "audit": (partial(with_audit, known=nobody, seed=seed), extra[name], ~nobody),
        "cleanlab, fair": (with_cleanlab, corrected, ~known),
    }
    if seed == 0:  # it draws nothing
        jobs["cleanlab"] = (with_cleanlab, extra[name], ~nobody)
    rows = {}
    for who, (job, given, counted) in jobs.items():
        try:
            (quality, flagged), times = timed(job, x, given)
        except ImportError:
            continue
        bad = (given != right)[counted]
        rows[who] = measured(bad, quality[counted], flagged[counted]) | times
    return rows


def of_pool(name: str, kind: str, seed: int, folder: str) -> dict[str, float]:
    """What dropping by utility finds in a pool of which 40 % is bad."""
    (x, right, _), other = opened(name, folder), opened(POOLS[name], folder)[0]
    known, rng = trusted_rows(right, seed), generator("audit pool", seed)
    places = rng.permutation(np.flatnonzero(~known))
    outside, wrong = (int(share * len(places)) for share in BAD[kind])
    replaced, mislabelled = places[:outside], places[outside : outside + wrong]
    x[replaced] = other[rng.permutation(len(other))[np.arange(outside) % len(other)]]
    given, classes = right.copy(), right.max() + 1
    given[mislabelled] = (right[mislabelled] + rng.integers(1, classes, wrong)) % classes
    found = audit(x, given, trusted=known, seed=seed)
    dropped = (found.utility < 0) & ~known
    row = {}
    for what, flagged, bad in (
        ("outside", dropped & found.outside, replaced),
        ("mislabelled", dropped & ~found.outside, mislabelled),
        ("all", dropped, places[: outside + wrong]),
    ):
        if len(bad):
            row[f"{what} precision"] = np.isin(np.flatnonzero(flagged), bad).mean()
            # Whatever the reason for which it is dropped.
            row[f"{what} recall"] = dropped[bad].mean()
    return row


def of_evidence(size: int, trusted: int, seed: int, folder: str) -> dict[str, float]:
    """What is found in right labels, and in those of people."""
    x, right, extra = opened(PEOPLE, folder)
    rows = generator("audit samples", seed).permutation(len(right))[:size]
    known, row = np.arange(size) < trusted, {}
    for name in ("right", "aggregate", *LABELS):
        labels = right if name == "right" else extra[name]
        given = np.where(known, right[rows], labels[rows])
        found = audit(x[rows], given, trusted=known, num_classes=right.max() + 1, seed=seed)
        row[f"{name} evidence"] = found.evidence
        row[f"{name} flagged"] = found.wrong[~known].mean()
        row[f"{name} noise rate"] = found.noise_rate
    return row


def of_size(trusted: int) -> dict[str, float]:
    """Seconds of a large audit, a tenth of whose labels are wrong."""
    rng = generator("audit size", 0)
    right = rng.integers(10, size=LARGE)
    x = rng.normal(size=(10, WIDE))[right] + 2 * rng.normal(size=(LARGE, WIDE))
    known = np.arange(LARGE) < trusted
    wrong = ~known & (rng.random(LARGE) < 0.1)
    given = np.where(wrong, (right + 1) % 10, right)
    return timed(with_audit, x.astype(np.float32), given, known)[1]


class Audit(reporting.Benchmark):
    """Accuracy of audits, over seeds."""

    packages = ("jax", "flax", "numpy", "scikit-learn", "cleanlab")
    series = ()
    rounds = None

    def __init__(self, options):
        self.seeds, self.folder = options.seeds, options.data_dir
        checks.whole(1, **{"--seeds": self.seeds})
        self.parts = options.parts.split(",")
        for part in self.parts:
            checks.choice(PARTS, **{"--parts": part})
        self.labels: dict[str, list] = {name: [] for name in LABELS}
        every = [f"{name}, {kind}" for name in POOLS for kind in BAD]
        self.pools: dict[str, list] = {name: [] for name in every if options.pools in name}
        if not self.pools:
            raise ValueError(f"--pools must be part of one of {every}; given {options.pools!r}")
        self.evidence: dict[str, list] = {name: [] for name in SAMPLES}
        self.sizes: dict[str, dict] = {}
        for name in self._sets():  # a missing one is said first
            feature_set(name, self.folder, "")

    def _sets(self) -> set[str]:
        """Those that the parts read."""
        read = {PEOPLE} if {"labels", "evidence"} & {*self.parts} else set()
        for name in self.pools if "pools" in self.parts else ():
            candidates, _ = name.split(", ")
            read |= {candidates, POOLS[candidates]}
        return read

    @staticmethod
    def add_options(parser):
        """Seeds and the folder of the features."""
        parser.add_argument("--seeds", type=int, default=3, help="of trusted samples and pools")
        parser.add_argument("--pools", default="", help="only those whose name has this in it")
        parser.add_argument("--data_dir", default="data", help="where feature sets are")
        parser.add_argument("--parts", default=",".join(PARTS), help="those to measure")

    @property
    def length(self):
        """One unit: all audits of a label set, of a pool, of some samples, or of a size."""
        units = {
            "labels": self.seeds * len(LABELS),
            "pools": self.seeds * len(self.pools),
            "evidence": self.seeds * len(self.evidence),
            "size": 2,
        }
        return sum(units[part] for part in self.parts)

    def measure(self, bar):
        """Part by part, seed by seed."""
        if "size" in self.parts:
            for trusted in (TRUSTED, 0):
                self.sizes[f"{trusted} trusted"] = of_size(trusted)
                bar.update()
        for seed in range(self.seeds if "labels" in self.parts else 0):
            for name, runs in self.labels.items():
                runs.append(of_labels(name, seed, self.folder))
                bar.update()
        for seed in range(self.seeds if "pools" in self.parts else 0):
            for name, runs in self.pools.items():
                runs.append(of_pool(*name.split(", "), seed, self.folder))
                bar.update()
        for seed in range(self.seeds if "evidence" in self.parts else 0):
            for name, runs in self.evidence.items():
                runs.append(of_evidence(*SAMPLES[name], seed, self.folder))
                bar.update()

    def report(self):
        """Means over seeds and standard deviations; "measured": of how many seeds."""
        labels, spread = {}, {}
        measured_seeds = {
            name: len(runs)
            for name, runs in (self.labels | self.pools | self.evidence).items()
            if runs
        }
        for name, runs in self.labels.items():
            labels[name] = {}
            for who in runs[0] if runs else ():
                own = [run[who] for run in runs if who in run]
                labels[name][who], spread[f"{name}, {who}"] = _over(own)
        pools, evidence = {}, {}
        for found, parts in ((pools, self.pools), (evidence, self.evidence)):
            for name, runs in parts.items():
                if runs:
                    found[name], spread[name] = _over(runs)
        return {"measured": measured_seeds, "labels": labels, "pools": pools, "evidence": evidence,
                "size": self.sizes, "standard_deviation": spread}  # fmt: skip


def _over(runs: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard deviation of each column."""
    columns = {key: [run[key] for run in runs] for key in runs[0]}
    deviation = {
        key: float(np.std(v, ddof=1)) if len(v) > 1 else None for key, v in columns.items()
    }
    return {key: float(np.mean(v)) for key, v in columns.items()}, deviation


main = partial(reporting.command, Audit)

if __name__ == "__main__":
    sys.exit(main())
