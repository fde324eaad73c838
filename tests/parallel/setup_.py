"""One small bilevel problem per variant of the step, run by whichever runner is given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from saflex_jax import Batch, Method, Model, Rule, RunInfo, Streams, TrainState
from saflex_jax.augment import shift
from saflex_jax.core.steps import init_state
from saflex_jax.methods import supervised
from saflex_jax.methods.upstream import upstream
from saflex_jax.models import Classifier, SmallCNN, from_linen
from saflex_jax.parallel import Runner, jit_runner
from saflex_jax.rules import Posterior, Refinement, Scoring, Simplex, VisitMean
from saflex_jax.rules.implicit import Implicit
from saflex_jax.types import Trace

STEPS, ROWS, SAMPLES, CLASSES = 5, 16, 24, 3
TX = optax.sgd(0.05, momentum=0.9)
# Between one device and eight. Before JAX 0.10.2 XLA's sums over a batch are less exact: up to
# 1.6e-6 in the bias of BatchNorm.
ROUNDING = 1e-6 if jax.__version_info__ >= (0, 10, 2) else 2e-6
PADDING = 3  # of 16 rows on 8 devices: one device holds padding only, one holds half a share

_rng = np.random.default_rng(0)
POOL = Batch(
    _rng.normal(size=(SAMPLES, 6, 6, 1)).astype(np.float32),
    np.eye(CLASSES, dtype=np.float32)[_rng.integers(CLASSES, size=SAMPLES)],
    np.ones(SAMPLES, bool),
    np.arange(SAMPLES, dtype=np.int32),
)

# Damping and temperature keep the map from parameters to targets well conditioned, so that what is
# left between two runners is the rounding of their sums and not its amplification.
RUN = RunInfo(SAMPLES, CLASSES, num_trusted=6, labels=lambda: POOL.labels)
MEMORY = VisitMean(0.9)
# name -> (the rule, padding rows, with clean samples and augmentation inside the step)
VARIANTS = {
    "cg_head": (Refinement(Scoring("cg(damping=0.1)"), Simplex(temperature=0.5)), 0, False),
    "identity_all_augmented_padding": (
        Refinement(Scoring("identity", ""), Simplex(temperature=0.5, tolerance=0.0)),
        PADDING,
        True,
    ),
    "cg_head_stale_gradient_memory": (
        Refinement(
            Scoring("cg(damping=0.1)", val_every=2, val_decay=0.5),
            Simplex(temperature=0.5, run=RUN, memory=MEMORY),
        ),
        0,
        False,
    ),
    # Five steps from the start no share of wrong labels would be found, hence one is given.
    "posterior_memory_padding": (
        Refinement(Scoring(), Posterior(RUN, noise_rate=0.4, memory=MEMORY)),
        PADDING,
        False,
    ),
    "implicit_padding": (
        Implicit(RUN, meta_tx=optax.sgd(30.0), direction="cg(damping=0.1)"),
        PADDING,
        False,
    ),
}


class Recording(NamedTuple):
    """The same rule, which also keeps every step's weights and labels, f32[STEPS, SAMPLES, 1 + K].

    A step does not return its targets, and under pmap no device sees all of them.
    """

    rule: Rule

    def init(self, params):
        arrays = self.rule.init(params)
        return {"rule": arrays, "targets": jnp.zeros((STEPS, SAMPLES, 1 + CLASSES))}

    def apply(self, arrays, state, logits_fn, streams, *, reduce):
        targets, kept, metrics = self.rule.apply(
            arrays["rule"], state, logits_fn, streams, reduce=reduce
        )
        rows = jnp.concatenate([targets.weights[:, None], targets.labels], axis=1)
        index = jnp.where(streams.candidates.mask, streams.candidates.index, SAMPLES)
        rows = jnp.zeros((SAMPLES, 1 + CLASSES)).at[index].add(rows, mode="drop")
        seen = jnp.zeros((SAMPLES, 1)).at[index].add(1.0, mode="drop")
        rows, seen = reduce((rows, seen))  # both are divided by the number of devices
        record = arrays["targets"].at[state.step].set(rows / jnp.where(seen > 0, seen, 1.0))
        return targets, {"rule": kept, "targets": record}, metrics


def make_model(axis_name: str | None = None) -> Model:
    return from_linen(Classifier(SmallCNN((6,), norm="batch", axis_name=axis_name), CLASSES))


def make_method(variant: str, *, axis_name: str | None = None) -> Method:
    """A network with BatchNorm under the variant's rule; `axis_name` as pmap needs it."""
    rule, _, augmented = VARIANTS[variant]
    method = supervised.make(make_model(axis_name), TX, Recording(rule))
    return upstream(method, shift(1)) if augmented else method


def make_batches(variant: str) -> list[Streams]:
    """STEPS global host batches; padding rows are zeros, at the end.

    Candidates of the posterior rule have a trace: most are mixed with another row of the batch.
    """
    _, padding, clean = VARIANTS[variant]
    rng = np.random.default_rng(1)

    def batch():
        index = rng.permutation(SAMPLES)[:ROWS]
        mask = np.arange(ROWS) < ROWS - padding
        drawn = jax.tree.map(lambda x: x[index], POOL)
        return drawn._replace(inputs=drawn.inputs * mask[:, None, None, None], mask=mask)

    def mixed(rows):
        partner, share = rng.permutation(ROWS - padding), rng.uniform(0.5, 1, ROWS)
        partner = np.concatenate([partner, np.arange(ROWS - padding, ROWS)])
        share = np.where((share > 0.85) | (partner == np.arange(ROWS)), 1, share).astype(np.float32)
        labels = share[:, None] * rows.labels + (1 - share[:, None]) * rows.labels[partner]
        trace = Trace(np.zeros((ROWS, 1), np.int32), share[:, None], rows.index[partner][:, None])
        return rows._replace(labels=labels, trace=trace)

    def candidates():
        return mixed(batch()) if variant.startswith("posterior") else batch()

    return [Streams(candidates(), batch(), batch() if clean else None) for _ in range(STEPS)]


@functools.cache
def make_variables():
    # Apart from the method, so that all variants share one compilation.
    return jax.jit(make_model().init)(jax.random.key(0), POOL.inputs[:2])


def make_state(variant: str) -> TrainState:
    """What `make_method(variant).init` gives."""
    rule = Recording(VARIANTS[variant][0])
    return init_state(jax.random.key(0), *make_variables(), TX, rule.init(make_variables()[0]))


def share(batch: Streams) -> Streams:
    """The block of rows that this process holds."""
    rows = ROWS // jax.process_count()
    begin = jax.process_index() * rows
    return jax.tree.map(lambda x: x[begin : begin + rows], batch)


def flatten(tree) -> dict[str, np.ndarray]:
    """Path -> array on the host; a PRNG key as its data."""

    def host(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        x = jax.random.key_data(x) if is_key else x
        if not getattr(x, "is_fully_replicated", True):  # a share of the rows on each process
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): host(x) for p, x in leaves}


def run(
    make_runner: Callable[..., Runner], variant: str, *, axis_name: str | None = None
) -> dict[str, np.ndarray]:
    """State and metrics (as averages) after STEPS steps."""
    method = make_method(variant, axis_name=axis_name)
    runner = make_runner(method.step)
    state = runner.put_state(make_state(variant))
    for batch in make_batches(variant):
        state, metrics = runner.step(state, runner.put_batch(share(batch)))
    averages = {name: total / count for name, (total, count) in jax.device_get(metrics).items()}
    return {**flatten(state), **{f"metrics/{name}": value for name, value in averages.items()}}


@functools.cache
def reference(variant: str) -> dict[str, np.ndarray]:
    """What every other runner must agree with: jit on one device."""
    return run(functools.partial(jit_runner, devices=jax.devices()[:1]), variant)


def assert_agrees(found: dict[str, np.ndarray], variant: str) -> None:
    """All of the state and the metrics, to ROUNDING; counters and keys exactly."""
    expected = reference(variant)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact = not np.issubdtype(value.dtype, np.floating)
        np.testing.assert_allclose(
            found[name], value, rtol=0, atol=0 if exact else ROUNDING, err_msg=name
        )
