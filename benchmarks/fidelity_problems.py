"""The problems of the fidelity benchmark: small enough that what a sample does can be computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import truths
from experiments import task
from experiments.configs import digits, wdbc
from saflex_jax import augment, data, models, parallel
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.tree import under
from saflex_jax.types import Batch, Method, Model, Params, PathPredicate, PyTree, Streams

SETTINGS = {
    "logistic": "softmax regression on WDBC (30 columns, 2 classes), 30 % of 309 labels wrong",
    "mlp": "MLP of widths (16, 16) on the same table",
    "cnn": "SmallCNN of widths (8, 16) on digits (8x8, 10 classes), 40 % of 600 labels wrong",
}
CONFIGS = {"logistic": wdbc, "mlp": wdbc, "cnn": digits}
UPSTREAM = {"wdbc": "feature_noise(0.3)", "digits": "shift(1) | affine(degrees=10, scale=0.1)"}
BACKBONES = {
    "logistic": lambda: models.MLP(()),
    "mlp": lambda: models.MLP((16, 16)),
    "cnn": lambda: models.SmallCNN((8, 16)),
}
LAST_STAGE = {
    "mlp": under("head", "backbone/Dense_1"),
    "cnn": under("head", "backbone/Conv_1", "backbone/Norm_1"),
}
CLASSES = {"logistic": 2, "mlp": 2, "cnn": 10}
DIGITS_TEST = 1047  # leaves 600 to train on, and 150 to validate


class Problem(NamedTuple):
    """One task, one network, one seed.

    Attributes:
      name: one of SETTINGS.
      model: without state; the same object for every seed, so that compiled code is shared.
      pools: candidates (labels partly wrong) and val (trusted).
      test: read once, at the end.
      wrong: bool[N], the candidates whose label is wrong.
      upstream: an augmentation that leaves labels as they are.
      last_stage: selects the last layers; None where there is one layer.
    """

    name: str
    model: Model
    pools: Streams
    test: Batch
    wrong: np.ndarray
    upstream: augment.Augment
    last_stage: PathPredicate | None

    def logits(self, params: Params, inputs: PyTree) -> jax.Array:
        """Of a network without state."""
        return self.model.logits(params, {}, inputs)


@functools.cache
def network(name: str) -> tuple[Model, augment.Augment]:
    """(model, upstream augmentation) of a problem."""
    module = models.Classifier(BACKBONES[name](), CLASSES[name])
    upstream = augment.parse(UPSTREAM[CONFIGS[name].get_config().data.name])
    return models.from_linen(module), upstream


def make(name: str, seed: int) -> Problem:
    """The problem of that name; the seed draws splits and wrong labels."""
    config = CONFIGS[name].get_config()
    config.seed = seed
    if config.data.name == "digits":
        config.data.test = DIGITS_TEST
    made = task.make_data(config)
    model, upstream = network(name)
    return Problem(name, model, made.pools, made.test, made.wrong, upstream, LAST_STAGE.get(name))


class History(NamedTuple):
    """Plain training, every step kept: lists of what was there before each step, and at the end."""

    params: list[Params]
    opt_state: list[PyTree]


@functools.cache
def _step(name: str, tx: optax.GradientTransformation, l2: float) -> Callable:
    """(params, opt_state, pool, rows i[B]) -> (params, opt_state), compiled."""
    model, _ = network(name)
    logits = lambda params, inputs: model.logits(params, {}, inputs)

    def loss(params, batch):
        return truths.training_loss(logits, batch.inputs, l2=l2)(params, (None, batch.labels))

    @jax.jit
    def step(params, opt_state, pool, rows):
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], pool))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def train(
    problem: Problem,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    batch_size: int,
    l2: float,
    seed: int,
) -> History:
    """Plain training on the candidates (prior labels, weight one), without augmentation."""
    pool, step = jax.device_put(problem.pools.candidates), _step(problem.name, tx, l2)
    stream = data.IndexStream(data.sizes(Streams(pool)), batch_size=batch_size, seed=seed)
    params, _ = jax.jit(problem.model.init)(jax.random.key(seed), pool.inputs[:1])
    kept = [(params, tx.init(params))]
    for _ in range(steps):
        kept.append(step(*kept[-1], pool, next(stream).candidates))
    return History(*map(list, zip(*kept)))


def double(tree: PyTree) -> PyTree:
    """Floating-point leaves in double precision; inside `jax.enable_x64`."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


class Training:
    """A method in training on one seed of a problem, a step at a time.

    Attributes:
      steps: taken so far.
      state: the method's.
    """

    def __init__(
        self,
        problem: Problem,
        method: Method,
        runner: parallel.Runner,
        *,
        batch_size: int,
        val_batch_size: int | None = None,
        seed: int,
    ):
        self.problem, self.method, self.key = problem, method, jax.random.key(seed)
        self.placed, self.runner = runner.put_state, runner.hold(problem.pools)
        self.stream = data.IndexStream(
            data.sizes(problem.pools),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            seed=seed,
        )
        self.restart()

    def restart(self) -> None:
        """Back to the first step."""
        self.steps = 0
        first = self.problem.pools.candidates.inputs[:1]
        self.state = self.placed(jax.jit(self.method.init)(self.key, first))
        self.stream.set_state({"step": 0})

    def advance(self) -> None:
        """One step, dispatched."""
        self.state, _ = self.runner.step(self.state, next(self.stream))
        self.steps += 1

    def wait(self) -> None:
        """Until the steps dispatched are done."""
        jax.block_until_ready(self.state)

    def params(self) -> Params:
        """A copy of the present parameters: the next step takes over their buffers."""
        return jax.tree.map(jnp.copy, self.state.params)


def on_one_device(method: Method) -> parallel.Runner:
    """The method's step compiled for the first device."""
    return parallel.jit_runner(method.step, devices=jax.devices()[:1])


@functools.cache
def _evaluator(name: str) -> Callable:
    model, _ = network(name)

    @jax.jit
    def evaluate(params, batch):
        logits = model.logits(params, {}, batch.inputs)
        right = jnp.argmax(logits, -1) == jnp.argmax(batch.labels, -1)
        return masked_mean(weighted_cross_entropy(logits, batch.labels)), jnp.mean(right)

    return evaluate


def evaluate(problem: Problem, params: Params, batch: Batch) -> tuple[float, float]:
    """(loss in nats, accuracy) of these parameters."""
    return tuple(map(float, _evaluator(problem.name)(params, batch)))


def mean_sd(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and sample standard deviation to four digits, and n, how many values count.

    Values that are not finite are left out; no mean of none, no deviation of fewer than two.
    """
    kept = [value for value in values if np.isfinite(value)]
    mean = round(float(np.mean(kept)), 4) if kept else None
    sd = round(float(np.std(kept, ddof=1)), 4) if len(kept) > 1 else None
    return {"mean": mean, "sd": sd, "n": len(kept)}
