"""Ground truths against closed forms, measures on constructed arrays, one tiny run."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import fidelity, truths
from benchmarks import fidelity_agreement as agreement
from benchmarks import fidelity_end_to_end as end_to_end
from benchmarks import fidelity_memory as memory
from benchmarks import fidelity_problems as problems
from saflex_jax.types import Batch
from tests.problems import softmax

N, M, D, K, L2 = 12, 7, 3, 3, 0.1


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def logits_fn(params, inputs):
    return inputs @ params


def made(size, seed):
    rng = np.random.default_rng(seed)
    labels = np.eye(K)[rng.integers(K, size=size)]
    return Batch(rng.normal(size=(size, D)), labels, np.ones(size, bool), np.arange(size))


TRAIN, VAL = made(N, 0), made(M, 1)
X = TRAIN.inputs
PARAMS = np.random.default_rng(2).normal(size=(D, K))


def losses(params, batch):
    return -np.sum(batch.labels * np.log(softmax(batch.inputs @ params)), 1)


def gradient(params, batch, weights=None, labels=None):
    """Of mean_i w_i CE(x_i, y_i), in NumPy."""
    weights = np.ones(len(batch.labels)) if weights is None else weights
    labels = batch.labels if labels is None else labels
    error = weights[:, None] * (softmax(batch.inputs @ params) - labels)
    return batch.inputs.T @ error / len(labels)


def per_label(params, batch):
    """grad CE(x_i, k), f[N, K, D, K]."""
    error = softmax(batch.inputs @ params)[:, None] - np.eye(K)
    return batch.inputs[:, None, :, None] * error[:, :, None]


def changed(i, k=None):
    """Weights and labels of all samples, i's weight 0 or its label k."""
    weights, labels = np.ones(N), TRAIN.labels.copy()
    if k is None:
        weights[i] = 0.0
    else:
        labels[i] = np.eye(K)[k]
    return weights, labels


def exact(tx, opt_state=None):
    opt_state = tx.init(jnp.asarray(PARAMS)) if opt_state is None else opt_state
    run = jax.jit(lambda s: truths.exact_change(logits_fn, PARAMS, s, TRAIN, VAL, tx=tx, l2=L2))
    return np.asarray(run(opt_state))


def test_the_exact_change_is_that_of_steps_taken_by_hand(x64):
    # Momentum: the buffer of a run is in every step.
    buffer = np.random.default_rng(3).normal(size=(D, K))
    tx = optax.sgd(0.5, momentum=0.9)
    state = jax.tree.map(lambda _: jnp.asarray(buffer), tx.init(jnp.asarray(PARAMS)))
    found = exact(tx, state)

    def after(weights, labels):
        step = gradient(PARAMS, TRAIN, weights, labels) + L2 * PARAMS + 0.9 * buffer
        return losses(PARAMS - 0.5 * step, VAL).mean()

    for i in range(N):
        expected = [after(*changed(i)) - after(*changed(i, k)) for k in range(K)]
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=1e-12)


def test_the_exact_change_of_sgd_tends_to_the_score_with_error_of_order_lr(x64):
    scores = np.einsum("nkdc,dc->nk", per_label(PARAMS, TRAIN), gradient(PARAMS, VAL))
    off = []
    for rate in (1e-2, 1e-3, 1e-4):
        off.append(np.abs(exact(optax.sgd(rate)) * N / rate - scores).max() / np.abs(scores).max())
    assert off[0] < 0.1
    np.testing.assert_allclose([off[0] / off[1], off[1] / off[2]], 10, rtol=0.1)


def hessian(params):
    """Of the training loss, f[D K, D K], in NumPy."""
    probs = softmax(TRAIN.inputs @ params)
    inner = np.einsum("nk,kl->nkl", probs, np.eye(K)) - probs[:, :, None] * probs[:, None]
    found = np.einsum("nd,ne,nkl->dkel", TRAIN.inputs, TRAIN.inputs, inner) / N
    return found.reshape(D * K, D * K) + L2 * np.eye(D * K)


def solved(params):
    """H^-1 grad L_val."""
    return np.linalg.solve(hessian(params), gradient(params, VAL).ravel()).reshape(D, K)


def test_implicit_is_the_analytic_solution_and_its_residual_is_small(x64):
    run = jax.jit(lambda p: truths.implicit(logits_fn, p, X, X[:5], VAL, damping=L2))
    found, residual = run(PARAMS)
    expected = np.einsum("nkdc,dc->nk", per_label(PARAMS, TRAIN)[:5], solved(PARAMS))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert residual < 1e-12


def test_the_curvature_of_a_network_is_its_gauss_newton_matrix(x64):
    # Not linear in its parameters: by differences of logits, against J^T (diag p - p p^T) J.
    def network(params, x):
        return jnp.tanh(x @ params[:, :2]) @ params[:2]

    flat = PARAMS.ravel()
    value = lambda flat: np.asarray(network(flat.reshape(D, K), TRAIN.inputs))
    e = 1e-6
    jac = np.stack(
        [(value(flat + e * d) - value(flat - e * d)) / (2 * e) for d in np.eye(D * K)], -1
    )
    probs = softmax(value(flat))
    expected = 0.3 * np.eye(D * K)
    for p, j in zip(probs, jac):
        expected += j.T @ (np.diag(p) - np.outer(p, p)) @ j / N
    found = truths.curvature_matrix(network, jnp.asarray(PARAMS), TRAIN.inputs, damping=0.3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


def test_unrolling_one_step_gives_the_score(x64):
    # dL_val(theta - lr grad L) / dy_ik = -lr/N <grad L_val(theta_1), grad CE(x_i, k)>, exactly.
    rows = np.array([3, 0])
    run = functools.partial(truths.unrolled, logits_fn, tx=optax.sgd(0.4), steps=1, l2=L2)
    found = jax.jit(run)(PARAMS, TRAIN._replace(labels=jnp.asarray(TRAIN.labels)), VAL, rows)
    there = PARAMS - 0.4 * (gradient(PARAMS, TRAIN) + L2 * PARAMS)
    scores = np.einsum("nkdc,dc->nk", per_label(PARAMS, TRAIN), gradient(there, VAL))
    np.testing.assert_allclose(found, 0.4 / N * scores[rows], rtol=0, atol=1e-12)


def test_retraining_takes_the_steps_and_reaches_the_optimum(x64):
    loss = truths.training_loss(logits_fn, TRAIN.inputs, l2=L2)
    meta = changed(4)
    found = truths.some_steps(loss, jnp.asarray(PARAMS), tx=optax.sgd(0.3), steps=3)(*meta)
    expected = PARAMS
    for _ in range(3):
        expected = expected - 0.3 * (gradient(expected, TRAIN, *meta) + L2 * expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    # From here plain Newton steps run away.
    loss = truths.training_loss(logits_fn, TRAIN.inputs, l2=0.01)
    best = truths.to_optimum(loss, jnp.asarray(3 * PARAMS))(*meta)
    np.testing.assert_allclose(gradient(best, TRAIN, *meta) + 0.01 * best, 0, atol=1e-12)


def test_leave_one_out_of_a_quadratic_is_the_closed_form(x64):
    # Ridge regression: theta(w) = (X^T diag(w) X / N + l2)^-1 X^T diag(w) t / N.
    rng = np.random.default_rng(5)
    x, val_x = rng.normal(size=(N, D)), rng.normal(size=(M, D))
    targets, val_targets = rng.normal(size=(N, 1)), rng.normal(size=M)

    def loss(theta, meta):
        weights, labels = meta
        errors = (jnp.asarray(x) @ theta - labels[:, 0]) ** 2 / 2
        return jnp.mean(weights * errors) + L2 / 2 * theta @ theta

    def closed(kept):
        a, b = x[kept], targets[kept, 0]
        theta = np.linalg.solve(a.T @ a / N + L2 * np.eye(D), a.T @ b / N)
        return np.mean((val_x @ theta - val_targets) ** 2)

    outer = lambda theta: jnp.mean((val_x @ theta - val_targets) ** 2)
    retrain, rows = truths.to_optimum(loss, jnp.zeros(D), steps=2), np.array([2, 7, 11])
    found = truths.leave_one_out(retrain, outer, jnp.asarray(targets), rows)
    everyone = np.arange(N)
    expected = [closed(everyone != i) - closed(everyone >= 0) for i in rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_retraining_is_compared_without_the_sample(x64):
    # Where "retraining" returns what it was given, and L_val is linear in that, all is exact.
    rng = np.random.default_rng(6)
    of_weight, of_label = rng.normal(size=N), rng.normal(size=(N, K))
    outer = lambda meta: jnp.sum(of_weight * meta[0]) + jnp.sum(of_label * meta[1])
    given = lambda *meta: meta, outer, jnp.asarray(TRAIN.labels), np.array([3, 0])
    np.testing.assert_allclose(truths.leave_one_out(*given), -of_weight[[3, 0]])
    moved = [[of_label[i, k] - TRAIN.labels[i] @ of_label[i] for k in range(K)] for i in (3, 0)]
    expected = -of_weight[[3, 0], None] - moved
    np.testing.assert_allclose(truths.relabelling(*given), expected, atol=1e-12)


# --- measures


def test_agreement_of_perfect_reversed_and_independent_arrays():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4000, 5))
    same, opposite, none = (truths.agreement(a, c) for c in (3 * a, -a, b))
    assert same == pytest.approx({"cosine": 1, "sign": 1, "rank": 1, "best": 1})
    assert opposite == pytest.approx({"cosine": -1, "sign": 0, "rank": -1, "best": 0})
    for name, chance in {"cosine": 0, "sign": 1 / 2, "rank": 0, "best": 1 / 5}.items():
        assert none[name] == pytest.approx(chance, abs=0.03), name
    cubed = truths.agreement(a, a**3)
    assert cubed["rank"] == pytest.approx(1) and cubed["cosine"] < 0.9
    assert "best" not in truths.agreement(a[:, 0], b[:, 0])
    one, two = np.eye(3)[[0, 1, 2, 2]], np.eye(3)[[0, 2, 2, 2]]
    assert truths.agreement(one, two)["best"] == 3 / 4


def test_utility_is_of_the_prior_label():
    prior = np.array([[0.0, 1.0], [0.5, 0.5]], np.float32)
    np.testing.assert_array_equal(truths.utility([[5.0, 2.0], [1.0, 4.0]], prior), [2.0, 2.5])
    # Truths of prior labels alone are compared with the utility of scores.
    found = agreement.compare(np.array([[5.0, 2], [1, 4]]), np.array([1.0, 2]), prior)
    assert found == pytest.approx({"utility_rank": 1.0, "utility_sign": 1.0})


def test_mean_and_sd_leave_out_what_is_not_finite_and_say_how_many_count():
    assert problems.mean_sd([1.0, np.nan, 4.0]) == {"mean": 2.5, "sd": 2.1213, "n": 2}
    assert problems.mean_sd([1.0]) == {"mean": 1.0, "sd": None, "n": 1}
    assert problems.mean_sd([np.inf]) == {"mean": None, "sd": None, "n": 0}


def test_directions_are_averaged_over_the_moments_that_all_of_them_have():
    values = {"identity": {0: 9.0, 20: 1.0, 100: 2.0, "optimum": 9.0}, "stale 4": {20: 3, 100: 5}}
    comparisons = [
        agreement.Comparison("logistic", 0, moment, "implicit", direction, {"rank": float(value)})
        for direction, by_moment in values.items()
        for moment, value in by_moment.items()
    ]
    found = agreement.summary(agreement.Found(comparisons, {}))
    assert found["over_all_moments"] == {"logistic": [20, 100]}
    over_all = found["over_all"]["logistic"]["implicit"]
    assert {name: m["rank"]["mean"] for name, m in over_all.items()} == {
        "identity": 1.5, "stale 4": 4.0,
    }  # fmt: skip
    complete = found["by_moment"]["logistic"]["implicit"]["identity"]["rank"]
    assert complete == {"0": 9.0, "20": 1.0, "100": 2.0, "optimum": 9.0}


def test_a_turn_that_took_too_long_is_made_up_for_and_copies_are_free(monkeypatch):
    clock = [0.0]

    class Slow:
        steps = 0

        def advance(self):
            self.steps += 1

        def wait(self):  # a burst takes .3 s, a turn .2 s
            clock[0] += 0.3

        def params(self):
            clock[0] += 100.0

    monkeypatch.setattr(end_to_end, "SECONDS", {"logistic": 1.0})
    monkeypatch.setattr(end_to_end, "ARMS", ("a", "b"))
    monkeypatch.setattr(end_to_end, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(end_to_end, "started", lambda *_: Slow())
    monkeypatch.setattr(problems, "evaluate", lambda *_: (0.0, 0.0))
    found = {}
    end_to_end.compete("logistic", 0, found, rounds=5, bar=types.SimpleNamespace(update=int))
    for (run,) in found.values():  # four bursts of .3 s, not five
        assert run.steps == 4 * end_to_end.TOGETHER and run.seconds == pytest.approx(1.2)


# --- the command


@pytest.fixture
def tiny(monkeypatch):
    """One small problem, moments, visits and seconds; compiled fast, not for speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    all_directions = agreement.directions
    few = ("identity", "adam", "memory of val 16", "random")
    monkeypatch.setattr(
        agreement, "directions", lambda problem: {k: all_directions(problem)[k] for k in few}
    )
    agreement.compiled.cache_clear()
    monkeypatch.setattr(problems, "SETTINGS", {"logistic": "softmax regression"})
    for module, values in {
        agreement: {"MOMENTS": (0, 12), "BATCH": 4, "TX": {"adam": optax.adam(1e-2)}},
        memory: {"NAMES": ("logistic",), "DIRECTIONS": {"identity": {}},
                 "KINDS": {"none": (0.0, "float32"), ".9": (0.9, "float32")},
                 "POOLS": {"pool": False}, "VISITS": (1, 2), "ROWS": 4,
                 "ARMS": {"upstream": None}, "ACCURACY_SETTINGS": ("pool",), "STEPS": 2,
                 "ACCURACY_ON": "logistic"},
        end_to_end: {"SECONDS": {"logistic": 0.01}, "ARMS": ("upstream", "full bilevel")},
    }.items():  # fmt: skip
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_command_reports_the_parts_asked_for(tiny, capsys):
    parts = ["memory", "end_to_end"]
    arguments = ["--json", f"--part={','.join(parts)}", "--seeds=1", "--accuracy-seeds=1"]
    assert fidelity.main([*arguments, "--rounds=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == {} and [part for part in fidelity.PARTS if part in found] == parts
    pool = found["memory"]["fidelity"]["logistic"]["pool"]["identity"]
    assert set(pool) == set(memory.KINDS) and set(pool["none"]["auc"]) == {"1", "2"}
    assert pool["none"]["auc"]["1"] == pool[".9"]["auc"]["1"]  # one visit: nothing to average
    arms = found["end_to_end"]["accuracy"]["logistic"]
    assert set(arms) == set(end_to_end.ARMS)
    assert all(0 < arm["last"]["mean"] and arm["last"]["n"] == 1 for arm in arms.values())
    assert arms["full bilevel"]["by_seed"]["steps"][0] > 0
    shown = fidelity.table(found)
    assert all(rule in shown for rule in ("full bilevel", "tolerance 0.25", "tolerance 0.0"))


@pytest.mark.slow
def test_the_command_reports_every_part_and_draws_it(tiny, capsys, tmp_path):
    arguments = ["--json", "--seeds=1", "--accuracy-seeds=1", "--rounds=1"]
    files = ["--out", str(tmp_path / "out.json"), "--figure", str(tmp_path / "figure.png")]
    assert fidelity.main(arguments + files) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["failed"] == {}
    assert found["agreement"]["over_all_moments"] == {"logistic": [12]}  # no past at 0
    by_truth = found["agreement"]["over_all"]["logistic"]
    expected = {"exact adam", "implicit", "implicit .1", "unrolled", "leave one out", "relabelling"}
    assert set(by_truth) == expected
    # The direction of the run's own optimiser sees its step; a random one does not.
    by_direction = by_truth["exact adam"]
    assert by_direction["adam"]["rank"]["mean"] > 0.95
    assert abs(by_direction["random"]["rank"]["mean"]) < 0.9
    # Of two truths computed in two ways: at the optimum influence foretells retraining.
    course = found["agreement"]["by_moment"]["logistic"]["leave one out"]["implicit"]
    assert course["utility_rank"]["optimum"] > 0.9
    assert found["agreement"]["implicit_residual_max"]["logistic"] < 1e-8
    assert found["machine"]["versions"]["jax"]
    made = {"figure.png", *(f"figure_{n}.png" for n in ("course", "memory", "end_to_end"))}
    assert {file.name for file in tmp_path.glob("*.png")} == made
    shown = fidelity.table(found)
    assert "logistic (12)" in shown and "full bilevel" in shown


def test_ctrl_c_and_a_part_that_fails_keep_the_rest(monkeypatch, capsys):
    def interrupted(into, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(agreement, "measure", lambda into, **_: 1 / 0)
    monkeypatch.setattr(memory, "measure", interrupted)
    assert fidelity.main(["--json", "--part=agreement,memory,end_to_end"]) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == {"agreement": "ZeroDivisionError: division by zero"}
    assert found["memory"]["fidelity"] == {} and found["end_to_end"]["accuracy"] == {}


@pytest.mark.parametrize("argument", ["--part=agreement,memories", "--seeds=0"])
def test_bad_arguments_are_refused_before_anything_runs(argument):
    with pytest.raises(ValueError, match=argument.strip("-").partition("=")[0]):
        fidelity.main([argument])
