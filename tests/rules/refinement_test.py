"""SAFLEX's parts over several steps, against loops that keep their own books."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax._compat import enable_x64
from saflex_jax.core import calibration, memory, parents, posterior, transition
from saflex_jax.core.steps import init_state
from saflex_jax.core.tree import identity
from saflex_jax.methods import supervised
from saflex_jax.rules import (
    RULES,
    Posterior,
    Refinement,
    Schedule,
    Scoring,
    Simplex,
    VisitMean,
    started,
)
from saflex_jax.types import RunInfo, Streams, Trace
from tests.problems import CLASSES, assert_close, softmax, with_logits
from tests.rules.stepping import (
    DECAY,
    POOL,
    PRIOR_STRENGTH,
    PROBLEM,
    REAL,
    SIZE,
    TEMPERATURE,
    assert_trained_on,
    params_of,
    pieces,
    right_streams_of,
    rms,
    runner,
    scores_along,
    solved,
    streams_of,
)

RUN = RunInfo(POOL, CLASSES)
TRUSTING = RunInfo(POOL, CLASSES, num_trusted=3)
GREEDY = Scoring("identity", predicate="")
simplex = functools.partial(
    Simplex, prior_strength=PRIOR_STRENGTH, temperature=TEMPERATURE, tolerance=0.0
)


def traced(batch, partner, share):
    """The batch with two operations in its trace: one that does not mix, and this one."""
    trace = Trace(
        np.zeros((SIZE, 2), np.int32),
        np.stack([np.full(SIZE, 0.2), share], 1).astype(np.float32),
        np.stack([batch.index, partner], 1).astype(np.int32),
    )
    return batch._replace(trace=trace)


def whole_streams_of(step):
    """`streams_of`: soft labels, and a trace that says that no row is mixed."""
    given = streams_of(step)
    candidates = traced(given.candidates, given.candidates.index, np.ones(SIZE))
    return given._replace(candidates=candidates)


@pytest.mark.parametrize("memory_dtype", [None, "float32", "bfloat16"])
def test_when_scores_and_gradients_are_fresh_and_what_is_used_between(memory_dtype):
    start, every, val_every, val_decay, memory_decay = 1, 2, 2, 0.6, DECAY
    remembers = memory_dtype is not None
    memory = {"run": RUN, "memory": VisitMean(DECAY, memory_dtype)} if remembers else {}
    scoring = Scoring("identity", "", val_every=val_every, val_decay=val_decay)
    rule = Refinement(scoring, simplex(**memory), Schedule(start, every))
    arrays, run = runner(rule, streams=whole_streams_of)
    kept = jax.tree.map(np.zeros_like, jax.device_get(PROBLEM.params))
    mean, visits = np.zeros((POOL, CLASSES)), np.zeros(POOL, int)
    # The two means may round to neighbouring numbers of bfloat16, 2^-8 apart.
    tol = 0.02 if memory_dtype == "bfloat16" else 1e-5
    scorings = refreshes = learned = unvisited = 0
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
            known, labels = mean[rows].any(1), prior.copy()
            weights[known], labels[known] = solved(mean[rows][known], prior[known])
            weights = (weights > 0) / np.mean(weights > 0)
            unvisited += (~known).sum()
        found, arrays, metrics = run(arrays, step)
        assert_trained_on(found, weights, labels, tol)
        assert_close(arrays.gradient, kept)
        assert metrics["val_loss"][1] == fresh
        if remembers:
            assert arrays.rule.mean.dtype == memory_dtype
            np.testing.assert_allclose(arrays.rule.mean[:POOL], mean, rtol=0, atol=tol)
            np.testing.assert_array_equal(arrays.rule.visits[:POOL], visits)
        learned += np.abs(labels - prior).max() > 0.05
    assert (unvisited > 0) == remembers  # on a step between: the prior
    # A plain mean of two gradients, then an exponential one; between scorings only memory learns.
    assert (scorings, refreshes) == (5, 3) and 1 - val_decay > 1 / refreshes
    assert learned >= (scorings + 1 if remembers else scorings)


def test_scores_in_bfloat16_are_those_of_a_network_cast_by_hand():
    last = VisitMean(0.0)  # remembers the last scores as they are

    def half(tree):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    def cast(params, inputs):
        return PROBLEM.logits_fn(half(params), half(inputs)).astype(jnp.float32)

    def scored(logits_fn=PROBLEM.logits_fn, **options):
        scoring = Scoring("identity", "", val_every=2, **options)
        rule = Refinement(scoring, simplex(run=RUN, memory=last))
        start, run = runner(rule, logits_fn=logits_fn, streams=whole_streams_of)
        targets, arrays, _ = run(start, 0)
        assert targets.labels.dtype == arrays.rule.mean.dtype == jnp.float32
        return arrays.rule.mean[:REAL], arrays.gradient

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
    rule = Refinement(Scoring("identity", "", **options), simplex())
    before = rule.init(params)
    state = init_state(jax.random.key(0), params, PROBLEM.model_state, optax.identity(), before)
    apply = functools.partial(rule.apply, logits_fn=PROBLEM.logits_fn, streams=streams_of(0))
    _, after, _ = jax.eval_shape(apply, before, state)
    assert {x.dtype.name for x in jax.tree.leaves(after.gradient)} == {dtype}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        RULES["saflex"].make(TRUSTING),
        Refinement(Scoring(val_every=2), Simplex()),
        Refinement(Scoring(mode="finite_difference", chunk=3), Simplex(), Schedule(every=2)),
        Refinement(Scoring(), Posterior(TRUSTING), Schedule(start=1, every=2)),
    ],
)
def test_steps_of_logits_in_bfloat16_and_of_an_f32_network_under_x64(rule, double):
    model = with_logits(PROBLEM.model, "float32" if double else "bfloat16")
    method = supervised.make(model, optax.sgd(0.1), rule)
    with enable_x64(double):
        state = jax.eval_shape(method.init, jax.random.key(0), streams_of(0).candidates.inputs)
        after, metrics = jax.eval_shape(method.step, state, streams_of(0))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert metrics["val_loss"][0].dtype == jnp.float32


def sharp(evidence):
    return evidence**2 / np.maximum((evidence**2).sum(1, keepdims=True), 1e-12)


def by_class(joint, of_trusted, eta, number):
    """How far a given label (column) speaks for each class (row), entry by entry."""
    believed = joint.sum(1) / joint.sum() if joint.any() else np.full(CLASSES, 1 / CLASSES)
    shares = of_trusted / of_trusted.sum() if of_trusted.any() else np.full(CLASSES, 1 / CLASSES)
    wrong = np.zeros((CLASSES, CLASSES))
    for k, j in np.argwhere(1 - np.eye(CLASSES)):
        count = number * believed[k]
        found = joint[k, j] / joint[k].sum() if joint[k].any() else eta / (CLASSES - 1)
        wrong[k, j] = (count * found + CLASSES * eta / (CLASSES - 1)) / (count + CLASSES)
    total = (believed[:, None] * wrong).sum()
    wrong *= min(1, eta / total) if total else 1
    noise = wrong + np.diag(1 - wrong.sum(1))
    return noise * ((number * shares + 1) / (number * believed + 1))[:, None]


@pytest.mark.parametrize(("trusted", "lookahead"), [(3, 0.7), (3, 0.0), (3, None), (0, None)])
def test_the_posterior_rule_averages_beliefs_after_a_step_and_estimates_the_noise(
    trusted, lookahead
):
    start, every, decay, forget = 1, 2, DECAY, 0.95
    rule = Posterior(
        RUN._replace(num_trusted=trusted),
        lookahead=lookahead,
        sharpness=2.0,
        agreement_decay=forget,
        memory=VisitMean(decay),
    )
    streams = functools.partial(right_streams_of, trusted=trusted)
    arrays, run = runner(Refinement(GREEDY, rule, Schedule(start, every)), streams=streams)
    if lookahead is None:  # without trusted samples, of those in a batch that are no padding
        known = trusted or streams(0).val.mask.sum()
        inputs = sum(np.prod(x.shape[:-1]) for x in jax.tree.leaves(PROBLEM.params))
        lookahead = known / (known + inputs)
    mean, visits, sums, learned = np.zeros((POOL, CLASSES)), np.zeros(POOL, int), np.zeros(5), 0
    joint, of_trusted, seen = np.zeros((CLASSES, CLASSES)), np.zeros(CLASSES), 0
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
            new = np.array([reference.sum(), len(reference), others.sum(), len(others), 0])
            new[4] = (reference**2).sum()
            sums = forget * sums + (1 - forget) * new / (new[1] + new[3])
            seen += len(reference)
            pairs = sharp(evidence[whole & ~is_trusted]).T @ prior[whole & ~is_trusted] / SIZE
            joint = forget * joint + (1 - forget) * pairs
            trusted_labels = val.labels[val.mask].sum(0) / len(val.mask)
            of_trusted = forget * of_trusted + (1 - forget) * trusted_labels
        right, given = sums[0] / max(sums[1], 1e-9), sums[2] / max(sums[3], 1e-9)
        gap = max(right - (1 - right) / (CLASSES - 1), 0.05)
        eta = np.clip((right - given) / gap, 0, 1) * (sums[3] > 0)
        number = min(trusted or seen, seen)
        if eta > 0:
            variance = sums[4] / sums[1] - right**2
            eta *= max(1 - variance / (number - 1) / (gap * eta) ** 2, 0) if number > 1 else 0
        off = np.maximum(evidence - prior, 0)
        certain = ((off / np.maximum(off.sum(1, keepdims=True), 1e-12)) ** 2).sum(1) ** 2
        evidence = sharp(evidence)
        known = evidence.any(1) & ~(is_trusted & whole)
        noise = by_class(joint, of_trusted, eta, trusted)
        off = np.maximum(evidence - prior, 0)
        off /= np.maximum(off.sum(1, keepdims=True), 1e-12)
        r, moved = np.ones((REAL, CLASSES)), np.zeros((REAL, CLASSES))
        for row, given_as in zip(*np.nonzero(prior * known[:, None])):
            hit = min(evidence[row, given_as] / prior[row, given_as], 1)
            hit, others = hit * noise[given_as, given_as], off[row] * noise[:, given_as]
            others = (1 - min(evidence[row, given_as] / prior[row, given_as], 1)) * others
            if hit + others.sum() > 0:
                r[row, given_as] = hit / (hit + others.sum())
                moved[row] += prior[row, given_as] * others / (hit + others.sum())
        lost = (prior * (1 - r)).sum(1)
        np.testing.assert_allclose(moved.sum(1), lost, atol=1e-9)
        parts = prior * r + certain[:, None] * moved
        weights = parts.sum(1)
        found, arrays, metrics = run(arrays, step)
        assert_trained_on(found, weights / weights.mean(), parts / weights[:, None], 1e-4)
        if step >= start:
            assert metrics["noise_rate"][0] == pytest.approx(eta, abs=1e-4)
        learned += (r < 0.99).any()
    assert learned >= 2


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

    run = RUN._replace(num_trusted=6)
    rule = Posterior(run, noise_rate=0.4, sharpness=2.0, by_class=False, memory=VisitMean(0.9))
    arrays, run = runner(Refinement(GREEDY, rule), streams=streams)
    _, arrays, _ = run(arrays, 0)
    first = np.array(arrays.rule.memory.mean)
    found, arrays, _ = run(arrays, 1)
    # Padding is not remembered; of the real rows those whose own share is .9 or more.
    np.testing.assert_array_equal(arrays.rule.memory.visits[:7], [1, 2, 2, 2, 1, 0, 0])
    memory = np.array(arrays.rule.memory.mean[:SIZE])
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


def test_scores_of_whole_rows_are_remembered_and_reach_mixed_rows_through_their_parents():
    share = np.array([0.6, 1, 0.95, 1, 0.7, 1], np.float32)
    partner = np.array([1, 1, 0, 3, 5, 5])

    def streams(step):  # rows 0 to 5 are samples 0 to 5; 5 is padding, so never seen
        candidates, val, _ = right_streams_of(0, 6)
        same = candidates.index, np.ones(SIZE)
        return Streams(traced(candidates, *(same if step == 0 else (partner, share))), val)

    rule = simplex(run=RUN, memory=VisitMean(0.9))
    arrays, run = runner(Refinement(GREEDY, rule), streams=streams)
    _, arrays, _ = run(arrays, 0)
    found, arrays, _ = run(arrays, 1)
    memory = arrays.rule
    np.testing.assert_array_equal(memory.visits[:7], [1, 2, 2, 2, 1, 0, 0])
    gradient, jacobian = pieces(1, streams)
    scores = np.array(memory.mean[:REAL])
    scores[0] = 0.6 * memory.mean[0] + (1 - np.float32(0.6)) * memory.mean[1]
    visit = scores_along(jacobian, gradient)
    scores[4] = (visit / rms(visit))[4]  # nothing is known of its partner: its own
    assert_trained_on(found, *solved(scores, streams(1).candidates.labels[:REAL]))
    between, _ = rule.targets(memory, None, streams(1).candidates, reduce=identity)
    np.testing.assert_array_equal(between.labels[4], streams(1).candidates.labels[4])


def test_a_learned_sharpness_is_used_as_a_given_one_would_be(monkeypatch):
    monkeypatch.setattr(calibration, "best_power", lambda *args, **options: jnp.float32(1.5))
    streams = functools.partial(right_streams_of, trusted=3)
    learned, run_learned = runner(Refinement(GREEDY, Posterior(TRUSTING)), streams=streams)
    given, run_given = runner(
        Refinement(GREEDY, Posterior(TRUSTING, sharpness=1.5)), streams=streams
    )
    for step in range(6):
        found, learned, metrics = run_learned(learned, step)
        wanted, given, without = run_given(given, step)
        assert_close(found, wanted)
        assert_close(learned.rule._replace(fits=None), given.rule)
        assert metrics.keys() - without.keys() == {"sharpness"}
        assert (metrics["sharpness"][0], metrics["sharpness"][1]) == (1.5, 1)


def test_without_trusted_samples_that_train_beliefs_are_squared():
    held_out = RUN._replace(num_val=9)
    arrays, run = runner(Refinement(GREEDY, Posterior(held_out)))
    squared, run_squared = runner(Refinement(GREEDY, Posterior(held_out, sharpness=2.0)))
    for step in range(4):
        found, arrays, metrics = run(arrays, step)
        wanted, squared, _ = run_squared(squared, step)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert arrays.rule.fits is None and "sharpness" not in metrics


def test_sharpness_is_learned_from_remembered_beliefs_of_whole_rows_that_are_not_trusted():
    streams = functools.partial(right_streams_of, trusted=3)
    rule = Posterior(TRUSTING, noise_rate=0.3, agreement_decay=0.9)
    arrays, run = runner(Refinement(GREEDY, rule), streams=streams)

    @jax.jit
    def with_fits_of(fits, kept, candidates):
        rows = candidates.mask & parents.is_whole(candidates) & (candidates.index < POOL - 3)
        fits = calibration.add_fits(
            fits,
            kept.memory.mean[candidates.index],
            candidates.labels,
            rows,
            transition.likelihood(kept.pairs, 0.3, num_trusted=3),
            decay=0.9,
        )
        return fits, calibration.best_power(fits, CLASSES, num_trusted=3)

    fits = calibration.no_fits()
    for step in range(6):
        _, arrays, metrics = run(arrays, step)
        fits, power = with_fits_of(fits, arrays.rule, streams(step).candidates)
        assert_close(arrays.rule.fits, fits)
        assert metrics["sharpness"][0] == pytest.approx(float(power), rel=1e-5) != 2


def test_a_given_noise_rate_is_taken_and_nothing_is_estimated():
    arrays, run = runner(Refinement(GREEDY, Posterior(noise_rate=0.25)))
    assert arrays.rule.agreement is None
    found, _, metrics = run(arrays, 0)
    assert metrics["noise_rate"][0] == 0.25 and (found.utility[:REAL] < 0.99).any()


def test_a_rule_that_was_started_goes_on_as_after_equal_visits_and_keeps_the_told_share():
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (POOL, CLASSES)))
    rule = Refinement(GREEDY, Posterior(RUN, noise_rate=0.25))
    arrays, run = runner(rule)
    visited = arrays.rule
    for _ in range(5):
        kept, _ = memory.update(visited.memory, jnp.arange(POOL), probs, jnp.ones(POOL, bool))
        visited = visited._replace(memory=kept)
    wanted, _, _ = run(arrays._replace(rule=visited), 0)
    found, _, _ = run(started(arrays, probs, visits=5), 0)
    assert_close(found, wanted)
    # The share: told at the start, or as an option.
    estimating, run = runner(Refinement(GREEDY, Posterior(RUN)))
    arrays = started(estimating, probs, noise_rate=0.25, visits=5)
    for step in range(3):
        told, arrays, metrics = run(arrays, step)
        if step == 0:
            assert_close(told, wanted)
        assert metrics["noise_rate"][0] == arrays.rule.agreement == 0.25
    # What is not told is estimated.
    assert_close(started(estimating, probs).rule.agreement, estimating.rule.agreement)


@pytest.mark.parametrize(
    "rule, options, message",
    [
        (Posterior(), {}, "extra must be arrays of a method whose rule is Posterior, with a run"),
        (Simplex(), {}, "extra must be arrays of a method whose rule is Posterior"),
        (Posterior(RUN, memory=VisitMean(None)), {}, "with a run and a memory"),
        (Posterior(RUN, memory=VisitMean(top=2)), {}, "memory must be one of all classes"),
        (Posterior(RUN, noise_rate=0.1), {"noise_rate": 0.2}, "noise_rate must be None.*given 0.2"),
        (Posterior(RUN), {"noise_rate": 1.2}, "noise_rate .*1.2"),
        (Posterior(RUN), {"visits": 0}, "visits .*0"),
        (Posterior(RUN), {"beliefs": np.ones((POOL, CLASSES))}, "beliefs must have rows >= 0 that"),
        (Posterior(RUN), {"beliefs": np.eye(CLASSES + 1)}, "beliefs must have a row for each"),
    ],
)
def test_what_cannot_be_started(rule, options, message):
    given = {"beliefs": np.full((POOL, CLASSES), 1 / CLASSES)} | options
    with pytest.raises(ValueError, match=message):
        started({"rule": rule.init()}, **given)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Posterior(lookahead=-1.0), "lookahead .*-1.0"),
        (lambda: Posterior(lookahead=math.inf), "lookahead .*inf"),
        (lambda: Posterior(noise_rate=1.5), "noise_rate .*1.5"),
        (lambda: Posterior(noise_rate="0.4"), "noise_rate .*'0.4'"),
        (lambda: Posterior(sharpness=0.0), "sharpness .*0.0"),
        (lambda: Posterior(sharpness=16.0), r"sharpness must lie in \(0, 8\]; given 16.0"),
        (lambda: Posterior(agreement_decay=1.0), "agreement_decay .*1.0"),
        (lambda: Posterior(memory=VisitMean(0.5)), "memory needs run"),
        (lambda: Posterior(RunInfo(0, CLASSES)), "num_samples .*0"),
        (lambda: Posterior(RunInfo(POOL, 1)), "num_classes .*>= 2; given 1"),
        (lambda: Posterior(RUN._replace(num_trusted=-1)), "num_trusted .*-1"),
        (lambda: Posterior(RUN._replace(num_trusted=POOL + 1)), f"num_trusted .*{POOL + 1}"),
        (lambda: Posterior(RUN._replace(num_val=-1)), "num_val .*-1"),
        (lambda: Simplex(memory=VisitMean(0.5)), "memory needs run"),
        (lambda: Simplex(temperature=0.0), "temperature .*0.0"),
        (lambda: Schedule(start=1.5), "start .*1.5"),
        (lambda: Schedule(every=2.5), "every .*2.5"),
        (lambda: Schedule(every=0), "every .*0"),
        (lambda: Scoring(val_every=2.5), "val_every .*2.5"),
        (lambda: Scoring(val_every=math.inf), "val_every .*inf"),
        (lambda: Scoring(val_decay=1.0), "val_decay .*1.0"),
        (lambda: Scoring(compute_dtype="int8"), "compute_dtype .*'int8'"),
        (lambda: Scoring(compute_dtype="bfloat61"), "compute_dtype .*'bfloat61'"),
        (lambda: Scoring(mode="vjp"), "mode .*'vjp'"),
        (lambda: Scoring(mode="finite_difference", compute_dtype="bfloat16"), "compute_dtype"),
        (lambda: Scoring("newman"), "direction .*did you mean 'neumann'"),
        (lambda: Scoring("cg(damping=-1)"), "damping .*-1"),
        (lambda: Scoring("cg(trips=3)"), "direction .*trips"),
        (lambda: Scoring("cg(10"), "direction must be NAME"),
        (lambda: Scoring("__import__('os')"), "direction"),
        (lambda: Scoring("adam(b2=1.0)"), "b2 .*1.0"),
        (lambda: VisitMean(dtype="float16"), "dtype .*'float16'"),
        (lambda: VisitMean(1.0), "decay .*1.0"),
        (lambda: VisitMean(-0.1), "decay .*-0.1"),
        (lambda: VisitMean(math.nan), "decay .*nan"),
        (lambda: VisitMean(None, top=2), "dtype and top must be the defaults without a memory"),
        (lambda: Simplex(scale="raw", run=RUN, memory=VisitMean()), "scale must be 'rms' with a"),
    ],
)
def test_a_part_refuses_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_that_learns_from_validation_samples_says_so():
    arrays, run = runner(
        Refinement(GREEDY, Posterior()), streams=lambda step: streams_of(step)._replace(val=None)
    )
    with pytest.raises(ValueError, match="Posterior needs validation samples"):
        run(arrays, 0)


def test_scores_have_no_memory_of_few_classes():
    rule = Simplex(run=RunInfo(10, 4), memory=VisitMean(0.9, top=2))
    with pytest.raises(ValueError, match=r"memory\.top must be None, scores are signed"):
        rule.init()
