"""The rules of saflex and implicit over several steps, against loops that keep their own books."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax.core import linear_solve, parents, posterior
from saflex_jax.core.steps import init_state
from saflex_jax.core.tree import identity
from saflex_jax.methods import implicit, saflex
from saflex_jax.types import Streams, Trace
from tests import problems
from tests.problems import CLASSES, assert_close, softmax

SIZE, MASKED, POOL = 6, 1, 10
REAL = SIZE - MASKED
PROBLEM = problems.problem("mlp", size=SIZE, masked=MASKED)
PRIOR_STRENGTH, TEMPERATURE = 2.0, 0.8
RULE = dict(
    rule="simplex",
    direction="identity",
    predicate=None,
    prior_strength=PRIOR_STRENGTH,
    temperature=TEMPERATURE,
    tolerance=0.0,
)
MEMORY = dict(memory_decay=0.6, num_samples=POOL, num_classes=CLASSES)


def streams_of(step):
    """New samples; the candidates are in turn the first and the last six of a pool of ten."""
    rng = np.random.default_rng(step)
    first = (POOL - SIZE) * (step % 2)
    candidates = problems.batch(rng, "mlp", SIZE, masked=MASKED, first=first, soft=True)
    return Streams(candidates, problems.batch(rng, "mlp", 4, masked=MASKED))


def params_of(step):
    """Parameters that move from step to step."""
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(
        lambda x: x + 0.5 * rng.normal(size=x.shape).astype(x.dtype), PROBLEM.params
    )


def right_streams_of(step, trusted):
    """`streams_of`, but trusted samples have the label that the network finds likeliest, half of
    the other candidates the unlikeliest."""
    candidates, val, _ = streams_of(step)

    def labels(batch, place):
        logits = np.asarray(PROBLEM.logits_fn(params_of(step), batch.inputs))
        return np.eye(CLASSES, dtype=np.float32)[np.argsort(logits)[:, place]]

    given = np.where(candidates.index[:, None] % 2, candidates.labels, labels(candidates, 0))
    rows = candidates.index >= POOL - trusted
    given = np.where(rows[:, None], labels(candidates, -1), given)
    return Streams(candidates._replace(labels=given), val._replace(labels=labels(val, -1)))


def runner(refiner, *, logits_fn=PROBLEM.logits_fn, streams=streams_of):
    """(first arrays, (arrays, step) -> what apply returns), compiled once."""
    start = refiner.init(PROBLEM.params)
    state = init_state(
        jax.random.key(0), PROBLEM.params, PROBLEM.model_state, optax.identity(), start
    )

    @jax.jit
    def apply(arrays, step, params, streams):
        moved = state._replace(step=step, params=params)
        return refiner.apply(arrays, moved, logits_fn, streams, reduce=identity)

    return start, lambda arrays, step: apply(arrays, np.int32(step), params_of(step), streams(step))


# --- the definitions -------------------------------------------------------------------------


@jax.jit
def _pieces(params, inputs, val_inputs, val_labels):
    log_probs = lambda params, inputs: jax.nn.log_softmax(PROBLEM.logits_fn(params, inputs))
    val_loss = lambda params: -jnp.mean(jnp.sum(val_labels * log_probs(params, val_inputs), 1))
    return jax.grad(val_loss)(params), jax.jacobian(log_probs)(params, inputs)


def pieces(step, streams=streams_of):
    """Gradient of the validation loss, and the Jacobian of the real candidates' log p."""
    candidates, val, _ = streams(step)
    real = candidates.inputs[candidates.mask], val.inputs[val.mask], val.labels[val.mask]
    return jax.device_get(_pieces(params_of(step), *real))


def scores_along(jacobian, gradient):
    """S_ik = -(d log p_ik / d theta) v with v = the gradient, f64[REAL, K]."""
    parts = zip(jax.tree.leaves(jacobian), jax.tree.leaves(gradient))
    return -sum(np.tensordot(j.astype(np.float64), g, np.ndim(g)) for j, g in parts)


def rms(scores):
    return np.sqrt(np.mean(np.square(scores, dtype=np.float64)))


def solved(scores, prior):
    """Weights and labels of the real rows."""
    scores = scores / rms(scores)
    labels = softmax((scores + PRIOR_STRENGTH * prior) / TEMPERATURE)
    keep = (labels * scores).sum(1) >= 0
    return keep / keep.mean(), labels


def assert_trained_on(found, weights, labels, tol=1e-5):
    np.testing.assert_allclose(found.weights[:REAL], weights, rtol=0, atol=tol)
    np.testing.assert_allclose(found.labels[:REAL], labels, rtol=0, atol=tol)
    np.testing.assert_array_equal(found.weights[REAL:], 0)


# --- saflex ----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_dtype", [None, "float32", "bfloat16"])
def test_when_scores_and_gradients_are_fresh_and_what_is_used_between(memory_dtype):
    start, every, val_every, val_decay, memory_decay = 1, 2, 2, 0.6, MEMORY["memory_decay"]
    remembers = memory_dtype is not None
    options = {**MEMORY, "memory_dtype": memory_dtype} if remembers else {}
    arrays, run = runner(
        saflex.refiner(
            start=start, every=every, val_every=val_every, val_decay=val_decay, **RULE, **options
        )
    )
    kept = jax.tree.map(np.zeros_like, jax.device_get(PROBLEM.params))
    mean, visits = np.zeros((POOL, CLASSES)), np.zeros(POOL, int)
    # The two means may round to neighbouring numbers of bfloat16, 2^-8 apart.
    tol = 0.02 if memory_dtype == "bfloat16" else 1e-5
    scorings = refreshes = learned = 0
    for step in range(10):
        candidates = jax.tree.map(lambda x: x[:REAL], streams_of(step).candidates)
        rows, prior = candidates.index, candidates.labels
        weights, labels, fresh = np.ones(REAL), prior, False
        if step >= start and (step - start) % every == 0:
            gradient, jacobian = pieces(step)
            fresh = scorings % val_every == 0
            scorings += 1
            if fresh:
                refreshes += 1
                rate = max(1 - val_decay, 1 / refreshes)
                kept = jax.tree.map(lambda k, g: (1 - rate) * k + rate * g, kept, gradient)  # noqa: B023
            scores = scores_along(jacobian, kept)
            if remembers:
                visits[rows] += 1
                rates = np.maximum(1 - memory_decay, 1 / visits[rows])[:, None]
                mean[rows] += rates * (scores / rms(scores) - mean[rows])
                mean = np.asarray(jnp.asarray(mean, memory_dtype), np.float64)
            else:
                weights, labels = solved(scores, prior)
        if remembers and step >= start and mean[rows].any():
            weights, labels = solved(mean[rows], prior)
        found, arrays, metrics = run(arrays, step)
        assert_trained_on(found, weights, labels, tol)
        assert_close(arrays.gradient, kept)
        assert metrics["val_loss"][1] == fresh
        if remembers:
            assert arrays.memory.mean.dtype == memory_dtype
            np.testing.assert_allclose(arrays.memory.mean[:POOL], mean, rtol=0, atol=tol)
            np.testing.assert_array_equal(arrays.memory.visits[:POOL], visits)
        learned += np.abs(labels - prior).max() > 0.05
    # A plain mean of two gradients, then an exponential one; between scorings only memory learns.
    assert (scorings, refreshes) == (5, 3) and 1 - val_decay > 1 / refreshes
    assert learned >= (scorings + 1 if remembers else scorings)


def test_scores_in_bfloat16_are_those_of_a_network_cast_by_hand():
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    last = {**MEMORY, "memory_decay": 0.0}  # remembers the last scores as they are

    def cast(params, inputs):
        return PROBLEM.logits_fn(half(params), half(inputs)).astype(jnp.float32)

    def scored(logits_fn=PROBLEM.logits_fn, **options):
        refiner = saflex.refiner(val_every=2, **RULE, **last, **options)
        start, run = runner(refiner, logits_fn=logits_fn)
        targets, arrays, _ = run(start, 0)
        assert targets.labels.dtype == arrays.memory.mean.dtype == jnp.float32
        return arrays.memory.mean[:REAL], arrays.gradient

    found, gradient = scored(compute_dtype="bfloat16")
    by_hand, gradient_by_hand = scored(cast)
    np.testing.assert_array_equal(found, by_hand)
    assert_close(gradient, gradient_by_hand, 0)
    full, _ = scored()
    assert np.sqrt(np.mean(full**2)) == pytest.approx(1, rel=1e-3)  # in units of their RMS
    assert 1e-4 < np.abs(found - full).max() < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"val_decay": 0.5}, {"val_every": 2, "val_decay": 0.5}])
def test_the_kept_gradient_has_the_dtype_of_the_params(dtype, options):
    params = jax.tree.map(lambda x: x.astype(dtype), PROBLEM.params)
    refiner = saflex.refiner(**RULE, **options)
    before = refiner.init(params)
    state = init_state(jax.random.key(0), params, PROBLEM.model_state, optax.identity(), before)
    apply = functools.partial(
        refiner.apply, logits_fn=PROBLEM.logits_fn, streams=streams_of(0), reduce=identity
    )
    _, after, _ = jax.eval_shape(apply, before, state)
    assert {x.dtype.name for x in jax.tree.leaves(after.gradient)} == {dtype}


@pytest.mark.parametrize("trusted", [3, 0])
def test_the_posterior_rule_averages_beliefs_after_a_step_and_estimates_the_noise(trusted):
    lookahead, start, every, decay, forget = 0.7, 1, 2, MEMORY["memory_decay"], 0.99
    options = {**MEMORY, "num_trusted": trusted, "start": start, "every": every}
    streams = lambda step: right_streams_of(step, trusted)
    refiner = saflex.refiner(direction="identity", predicate=None, lookahead=lookahead, **options)
    arrays, run = runner(refiner, streams=streams)
    mean, visits, sums, learned = np.zeros((POOL, CLASSES)), np.zeros(POOL, int), np.zeros(4), 0
    seen = 0
    for step in range(8):
        candidates, val, _ = streams(step)
        rows, prior = candidates.index[:REAL], candidates.labels[:REAL]
        is_trusted, whole = rows >= POOL - trusted, prior.max(1) >= parents.WHOLE
        evidence = np.zeros((REAL, CLASSES))
        if step >= start and (step - start) % every == 0:
            gradient, jacobian = pieces(step, streams)
            probs = softmax(np.asarray(PROBLEM.logits_fn(params_of(step), candidates.inputs)))
            probs = probs[:REAL]
            evidence = softmax(np.log(probs) + lookahead * scores_along(jacobian, gradient))
            visits[rows[whole]] += 1
            rates = np.maximum(1 - decay, 1 / visits[rows[whole]])[:, None]
            mean[rows[whole]] += rates * (evidence[whole] - mean[rows[whole]])
        evidence = np.where((whole & mean[rows].any(1))[:, None], mean[rows], evidence)
        if step >= start and (step - start) % every == 0:
            agreed = np.minimum(evidence if trusted else probs, prior).sum(1)
            reference = agreed[is_trusted & whole]
            if not trusted:
                held = softmax(np.asarray(PROBLEM.logits_fn(params_of(step), val.inputs)))
                reference = (held * val.labels).sum(1)[val.mask]
            others = agreed[~is_trusted & whole]
            new = np.array([reference.sum(), len(reference), others.sum(), len(others)])
            sums = forget * sums + (1 - forget) * new / (new[1] + new[3])
            seen += len(reference)
        right, given = sums[0] / max(sums[1], 1e-9), sums[2] / max(sums[3], 1e-9)
        gap = max(right - (1 - right) / (CLASSES - 1), 0.05)
        eta = np.clip((right - given) / gap, 0, 1) * (sums[3] > 0)
        number = min(trusted or seen, seen)
        if eta > 0:
            eta *= max(1 - right * (1 - right) / number / (gap * eta) ** 2, 0)
        off = np.maximum(evidence - prior, 0)
        certain = ((off / np.maximum(off.sum(1, keepdims=True), 1e-12)) ** 2).sum(1) ** 2
        evidence = evidence**2 / np.maximum((evidence**2).sum(1, keepdims=True), 1e-12)
        known = evidence.any(1) & ~(is_trusted & whole)
        hit = np.divide(np.minimum(evidence, prior), prior, where=prior > 0, out=0 * prior)
        missed = eta * (1 - hit) / (CLASSES - 1)
        hit *= 1 - eta
        r = np.where(known[:, None] & (hit + missed > 0), hit / np.maximum(hit + missed, 1e-12), 1)
        off = np.maximum(evidence - prior, 0)
        off /= np.maximum(off.sum(1, keepdims=True), 1e-12)
        lost = (prior * (1 - r)).sum(1)
        parts = prior * r + (lost * certain)[:, None] * off
        weights = parts.sum(1)
        found, arrays, metrics = run(arrays, step)
        assert_trained_on(found, weights / weights.mean(), parts / weights[:, None], 1e-4)
        assert metrics["noise_rate"][0] == pytest.approx(eta, abs=1e-4)
        learned += (r < 0.99).any()
    assert learned >= 2


def traced(batch, partner, share):
    """The batch with two operations in its trace: one that does not mix, and this one."""
    trace = Trace(
        np.zeros((SIZE, 2), np.int32),
        np.stack([np.full(SIZE, 0.2), share], 1).astype(np.float32),
        np.stack([batch.index, partner], 1).astype(np.int32),
    )
    return batch._replace(trace=trace)


def test_what_is_known_of_parents_reaches_mixed_rows_and_only_whole_rows_are_remembered():
    """Rows 0 to 5 are samples 0 to 5, of which 4 and up are trusted; row 5 is padding."""
    share = np.array([0.6, 1, 0.95, 1, 0.6, 1])
    partner = np.array([1, 1, 0, 3, 3, 5])

    def streams(step):
        # In turn all rows whole, so that something is remembered, and mixed.
        candidates, val, _ = right_streams_of(0, 6)
        given = candidates.labels
        mixed = share[:, None] * given + (1 - share[:, None]) * given[partner]
        whole = step % 2 == 0
        candidates = candidates._replace(labels=given if whole else mixed.astype(np.float32))
        same = candidates.index, np.ones(SIZE)
        return Streams(traced(candidates, *(same if whole else (partner, share))), val)

    options = {**MEMORY, "memory_decay": 0.9, "num_trusted": 6, "noise_rate": 0.4}
    arrays, run = runner(
        saflex.refiner(direction="identity", predicate=None, **options), streams=streams
    )
    _, arrays, _ = run(arrays, 0)
    first = np.array(arrays.memory.mean)
    found, arrays, _ = run(arrays, 1)
    # Padding is not remembered; of the real rows those whose own share is .9 or more.
    np.testing.assert_array_equal(arrays.memory.visits[:7], [1, 2, 2, 2, 1, 0, 0])
    memory = np.array(arrays.memory.mean[:SIZE])
    np.testing.assert_array_equal(memory[[0, 4]], first[[0, 4]])
    evidence = memory.copy()
    for row in (0, 4):  # as memory is after this step's visits
        evidence[row] = share[row] * memory[row] + (1 - share[row]) * memory[partner[row]]
    given = streams(1).candidates.labels
    # 4 is trusted, but its partner 3 is not; no row is made of trusted samples alone.
    wanted = posterior.posterior_targets(given[:REAL], evidence[:REAL], 0.4)
    assert_trained_on(found, wanted.weights, wanted.labels)
    kept, arrays, _ = run(arrays, 2)
    np.testing.assert_array_equal(kept.labels[4], streams(2).candidates.labels[4])  # trusted
    assert kept.utility[4] == 1 > np.asarray(kept.utility[:4]).max()


def test_a_given_noise_rate_is_taken_and_nothing_is_estimated():
    arrays, run = runner(saflex.refiner(direction="identity", predicate=None, noise_rate=0.25))
    assert arrays.agreement is None
    found, _, metrics = run(arrays, 0)
    assert metrics["noise_rate"][0] == 0.25 and (found.utility[:REAL] < 0.99).any()


# --- implicit --------------------------------------------------------------------------------

MAX_WEIGHT = 1.5
PRIOR = problems.soft_labels(np.random.default_rng(7), POOL)


def simplex_projection(row):
    """The nearest point of the simplex, by bisection on what is taken from every entry."""
    low, high = row.min() - 1, row.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(row - low, 0)


def project(meta, learn="both"):
    """The whole pool."""
    weights = np.clip(meta["weights"], 0, MAX_WEIGHT)
    labels = np.stack([simplex_projection(row) for row in np.asarray(meta["labels"], np.float64)])
    return {
        "weights": np.ones(POOL) if learn == "labels" else weights,
        "labels": PRIOR if learn == "weights" else labels,
    }


META_TX = {"momentum": optax.sgd(4.0, momentum=0.9), "adam": optax.adam(0.3)}


@pytest.mark.parametrize("learn, meta_tx", [("both", "adam"), ("weights", "momentum")])
def test_implicit_is_gradient_descent_on_a_pool_that_is_projected_whenever_read(learn, meta_tx):
    tx = META_TX[meta_tx]
    arrays, run = runner(
        implicit.refiner(
            prior=PRIOR,
            meta_tx=tx,
            solve=linear_solve.identity_solve(),
            predicate=None,
            max_weight=MAX_WEIGHT,
            learn=learn,
        )
    )
    meta = {"weights": np.ones(POOL, np.float32), "labels": PRIOR}
    opt, infeasible = tx.init(meta), 0
    for step in range(6):
        rows = streams_of(step).candidates.index[:REAL]
        read = project(meta, learn)
        infeasible = max(infeasible, np.abs(read["weights"] - meta["weights"])[rows].max())
        gradient, jacobian = pieces(step)
        scores = scores_along(jacobian, gradient)
        # With H = I: dL/dw_i = -<y_i, S_i> / n and dL/dy_ik = -w_i S_ik / n.
        hyper = {"weights": np.zeros(POOL, np.float32), "labels": np.zeros_like(PRIOR)}
        hyper["weights"][rows] = -(read["labels"][rows] * scores).sum(1) / REAL
        hyper["labels"][rows] = -read["weights"][rows, None] * scores / REAL
        updates, opt = tx.update(hyper, opt, read)
        meta = jax.tree.map(lambda x, u: x + np.asarray(u), read, updates)
        used = project(meta, learn)
        weights = used["weights"][rows]
        found, arrays, _ = run(arrays, step)
        assert_trained_on(found, weights / weights.mean(), used["labels"][rows], 1e-4)
    assert infeasible > 0.05  # momentum carried rows of the other batch outside


@pytest.mark.parametrize(
    "learn, meta_tx", [("both", "adam"), ("weights", "momentum"), ("labels", "momentum")]
)
def test_implicit_trains_on_what_is_feasible(learn, meta_tx):
    arrays, run = runner(
        implicit.refiner(prior=PRIOR, meta_tx=META_TX[meta_tx], max_weight=MAX_WEIGHT, learn=learn)
    )
    reached = set()
    for step in range(8):
        rows = streams_of(step).candidates.index[:REAL]
        found, arrays, metrics = run(arrays, step)
        labels, weights = np.asarray(found.labels[:REAL]), np.asarray(arrays[0]["weights"][rows])
        assert (labels >= 0).all()
        np.testing.assert_allclose(labels.sum(1), 1, atol=1e-5)
        assert (weights >= 0).all() and (weights <= MAX_WEIGHT).all()
        np.testing.assert_allclose(found.weights[:REAL] * weights.mean(), weights, atol=1e-5)
        if learn == "weights":
            np.testing.assert_array_equal(labels, PRIOR[rows])
        if learn == "labels":
            np.testing.assert_array_equal(weights, 1)
        assert np.isfinite(metrics["solve_residual"][0])
        reached |= set(weights.tolist()) & {0.0, MAX_WEIGHT}
    assert reached or learn == "labels"


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "bayes"}, "rule .*'bayes'"),
        ({"lookahead": -1.0}, "lookahead .*-1.0"),
        ({"lookahead": math.inf}, "lookahead .*inf"),
        ({"noise_rate": 1.5}, "noise_rate .*1.5"),
        ({"num_trusted": -1}, "num_trusted .*-1"),
        ({"num_trusted": POOL + 1, **MEMORY}, f"num_trusted .*{POOL + 1}"),
        ({"num_val": -1}, "num_val .*-1"),
        ({"start": 1.5}, "start .*1.5"),
        ({"every": 2.5}, "every .*2.5"),
        ({"every": 0}, "every .*0"),
        ({"val_every": 2.5}, "val_every .*2.5"),
        ({"val_every": math.inf}, "val_every .*inf"),
        ({"val_decay": 1.0}, "val_decay .*1.0"),
        ({"compute_dtype": "int8"}, "compute_dtype .*'int8'"),
        ({"compute_dtype": "bfloat61"}, "compute_dtype .*'bfloat61'"),
        ({"memory_dtype": "float16"}, "memory_dtype .*'float16'"),
        ({"memory_dtype": "float16", **MEMORY}, "memory_dtype .*'float16'"),
        ({"mode": "vjp"}, "mode .*'vjp'"),
        ({"mode": "finite_difference", "compute_dtype": "bfloat16"}, "compute_dtype"),
        ({**MEMORY, "memory_decay": 1.0}, "memory_decay .*1.0"),
        ({**MEMORY, "memory_decay": -0.1}, "memory_decay .*-0.1"),
        ({**MEMORY, "memory_decay": math.nan}, "memory_decay .*nan"),
    ],
    ids=str,
)
def test_saflex_refuses_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        saflex.refiner(**options)
