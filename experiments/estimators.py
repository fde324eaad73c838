"""Arms that scikit-learn fits, beside the networks: what a user would try first.

`config.model.name` names one of ESTIMATORS, the section's other fields are its own:

    "linear_probe": {"model": {"name": "logistic", "C": 0.01}, "method": {"rule": "as_given"}}

An estimator sees every candidate once, as it is. There are no steps: nothing in `config.train`,
`config.optimizer` or `config.augment` reaches it, and no label that a pipeline mixes, since
pipelines run on the device inside a step. Of a soft prior label it takes the largest entry, of a
sample with several views [V, D] the first one.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict
from sklearn import ensemble, linear_model, metrics, pipeline, preprocessing
from threadpoolctl import threadpool_limits

from experiments import cleaning
from experiments.task import Data
from saflex_jax import checks
from saflex_jax.data import category_sizes
from saflex_jax.types import Batch, Method, TrainState

# Inputs -> probabilities f64[N, C] of the classes that the labels had, in their order.
Predict = Callable[[np.ndarray], np.ndarray]


class Estimator(Protocol):
    """A frozen dataclass whose fields a config may set."""

    def fit(
        self, x: np.ndarray, y: np.ndarray, held_out: tuple[np.ndarray, np.ndarray] | None,
        categorical: np.ndarray, seed: int,
    ) -> Predict:  # fmt: skip
        """Fits f32[N, D] to classes i[N].

        Args:
          x, y: the candidates.
          held_out: trusted samples that are not among them; None = there are none.
          categorical: bool[D], columns of codes from 0 on, -1 = missing.
          seed: of what is drawn.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression on standardised columns, categories as indicators.

        min_W,b  1/2 |W|^2 + C sum_i CE(W x_i + b, y_i)

    Attributes:
      C: the less, the more the weights are shrunk; as the loss is a sum, 1 / N is its unit.
    """

    C: float = 1.0

    def __post_init__(self):
        checks.positive(C=self.C)

    def fit(self, x, y, held_out, categorical, seed):
        sizes = x[:, categorical].max(0, initial=-1).astype(int) + 1

        def indicated(x):
            codes = x[:, categorical].astype(int).T
            parts = [np.eye(n + 1, n)[np.where(c < n, c, -1)] for c, n in zip(codes, sizes)]
            return np.hstack([x[:, ~categorical], *parts])  # nothing of what is missing or new

        model = pipeline.make_pipeline(
            preprocessing.FunctionTransformer(indicated),
            preprocessing.StandardScaler(),
            linear_model.LogisticRegression(C=self.C, max_iter=MAX_ITERATIONS),
        )
        return model.fit(x, y).predict_proba


@dataclasses.dataclass(frozen=True)
class BoostedTrees:
    """Gradient-boosted trees on histograms.

    With trusted samples that are held out, the number of trees is the one with the least loss on
    them (early stopping), at most `iterations`; else it is `iterations`.

    Attributes:
      learning_rate: what a tree is multiplied by.
      iterations: trees a class.
      leaves: of a tree, at most.
    """

    learning_rate: float = 0.1
    iterations: int = 100
    leaves: int = 31

    def __post_init__(self):
        checks.positive(learning_rate=self.learning_rate)
        checks.whole(1, iterations=self.iterations)
        checks.whole(2, leaves=self.leaves)

    def fit(self, x, y, held_out, categorical, seed):
        model = ensemble.HistGradientBoostingClassifier(
            learning_rate=self.learning_rate,
            max_iter=self.iterations,
            max_leaf_nodes=self.leaves,
            categorical_features=categorical,
            early_stopping=False,
            random_state=seed,
        ).fit(x, y)
        if held_out is None:
            return model.predict_proba
        inputs, labels = held_out
        known = np.isin(labels, model.classes_)
        losses = [
            metrics.log_loss(labels[known], p, labels=model.classes_)
            for p in model.staged_predict_proba(inputs[known])
        ]
        best = int(np.argmin(losses))
        return lambda x: next(itertools.islice(model.staged_predict_proba(x), best, None))


ESTIMATORS: dict[str, type[Estimator]] = {"logistic": Logistic, "boosted_trees": BoostedTrees}
MAX_ITERATIONS = 10_000  # of a logistic regression, which has converged by then


def fits(config: ConfigDict) -> bool:
    """Whether scikit-learn fits the config's model."""
    return config.model.name in ESTIMATORS


def check(config: ConfigDict) -> None:
    """Raises ValueError unless the section has fields of its estimator, and nothing asks for steps.

    Args:
      config: with `config.model.name` of ESTIMATORS.
    """
    _make(config.model.to_dict())
    name = config.model.name
    for field, given, only in (
        ("method.name", config.method.name, "supervised"),
        ("method.rule", config.method.rule, "as_given"),
        ("data.unlabelled", config.data.unlabelled, False),
        ("data.folds", config.data.folds, 0),
        ("data.pool", config.data.pool, ""),
    ):
        if given != only:
            raise ValueError(f"config.{field} must be {only!r} with {name}; given {given!r}")


def _make(section: Mapping[str, Any]) -> Estimator:
    """The estimator of a model's section."""
    fields = {name: value for name, value in section.items() if name != "name"}
    kind = ESTIMATORS[section["name"]]
    checks.known("config.model", fields, {field.name for field in dataclasses.fields(kind)})
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"config.model: {error}") from error


# --- Fits


def run(
    arms: dict[str, ConfigDict],
    data: Data,
    measure: Callable[[Method, TrainState | None, Data], dict[str, float]],
) -> dict[str, dict]:
    """Fits the arms' model, on their seed, and measures it for each.

    Args:
      arms: one, or several that share a training.
      data: of their seed.
      measure: as of `experiments.arms.run`.

    Returns:
      Arm -> record, with the fields of a network's; nothing took steps, so "seconds_per_step" is
      None and "history" empty. "seconds" are those of the fit.

    Raises:
      ValueError: labels that are no classes.
    """
    config, *_ = arms.values()
    if data.source.task == "multilabel":
        raise ValueError(
            f"config.data.name must be of classes for {config.model.name}; {config.data.name} has "
            "several labels at once"
        )
    start = time.perf_counter()
    predict = fit(config, data)
    seconds = time.perf_counter() - start
    said = data._replace(
        **{name: batch._replace(inputs=np.log(predict(batch)))
           for name, batch in (("held_out", data.held_out), ("test", data.test))}
    )  # fmt: skip
    # The network that is measured returns its inputs, which are logits.
    identity = Method(None, None, _given)
    record = {"seconds_per_step": None, "seconds": seconds, "history": []}
    return {arm: measure(identity, None, said) | record for arm in arms}


def _given(state, inputs):
    del state
    return inputs


def fit(config: ConfigDict, data: Data) -> Callable[[Batch], np.ndarray]:
    """Fits the config's estimator; returns batch -> probabilities f32[N, K] > 0."""
    trusted = config.data.trusted_only
    # `data` repeats these to fill batches, which would change how strong a regularisation is.
    candidates = data.held_out if trusted else data.pools.candidates
    held_out = None
    if not trusted and not config.data.train_on_val:
        held_out = _matrix(data.held_out), data.held_out.labels.argmax(1)
    x, y = _matrix(candidates), candidates.labels.argmax(1)
    categorical = np.arange(x.shape[1]) < len(category_sizes(data.source.columns or ()))
    with threadpool_limits(1):  # where workers share the cores, more threads take 20 times as long
        predict = _make(config.model.to_dict()).fit(x, y, held_out, categorical, config.seed)
    present, num_classes = np.unique(y), candidates.labels.shape[1]

    def probabilities(batch):
        known = predict(_matrix(batch))
        every = np.zeros((len(known), num_classes), np.float32)
        every[:, present] = known  # a class that no candidate has is never expected
        return np.maximum(every, np.finfo(np.float32).tiny)

    return probabilities


def _matrix(batch: Batch) -> np.ndarray:
    """The inputs f32[N, D]: images flattened, of views the first, categories before numbers."""
    leaves = [cleaning.flat(np.asarray(x)) for x in jax.tree.leaves(batch.inputs)]
    return np.hstack([x.astype(np.float32) for x in leaves])
