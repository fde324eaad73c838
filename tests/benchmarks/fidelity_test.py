"""Ground truths against closed forms, measures on constructed arrays, one tiny run."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import fidelity, truths
from saflex_jax._compat import enable_x64
from saflex_jax.rules import Scoring
from saflex_jax.types import Batch
from tests.benchmarks.ends_ import refused
from tests.problems import softmax

COMMITTED = pathlib.Path(__file__).parents[2] / "docs" / "fidelity.json"
N, M, D, K, L2 = 12, 7, 3, 3, 0.1


@pytest.fixture
def x64():
    with enable_x64(True):
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

    def value(flat):
        return np.asarray(network(flat.reshape(D, K), TRAIN.inputs))

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

    def outer(theta):
        return jnp.mean((val_x @ theta - val_targets) ** 2)

    retrain, rows = truths.to_optimum(loss, jnp.zeros(D), steps=2), np.array([2, 7, 11])
    found = truths.leave_one_out(retrain, outer, jnp.asarray(targets), rows)
    everyone = np.arange(N)
    expected = [closed(everyone != i) - closed(everyone >= 0) for i in rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_retraining_is_compared_without_the_sample(x64):
    # Where "retraining" returns what it was given, and L_val is linear in that, all is exact.
    rng = np.random.default_rng(6)
    of_weight, of_label = rng.normal(size=N), rng.normal(size=(N, K))

    def outer(meta):
        return jnp.sum(of_weight * meta[0]) + jnp.sum(of_label * meta[1])

    def given(*meta):
        return meta

    labels = jnp.asarray(TRAIN.labels)
    found = truths.leave_one_out(given, outer, labels, np.array([3, 0]))
    np.testing.assert_allclose(found, -of_weight[[3, 0]])


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
    found = fidelity.compare(np.array([[5.0, 2], [1, 4]]), np.array([1.0, 2]), prior)
    assert found == pytest.approx({"utility_rank": 1.0, "utility_sign": 1.0})


def test_mean_and_sd_leave_out_what_is_not_finite_and_say_how_many_count():
    assert fidelity.mean_sd([1.0, np.nan, 4.0]) == {"mean": 2.5, "sd": 2.1213, "n": 2}
    assert fidelity.mean_sd([1.0]) == {"mean": 1.0, "sd": None, "n": 1}
    assert fidelity.mean_sd([np.inf]) == {"mean": None, "sd": None, "n": 0}


def test_directions_are_averaged_over_the_moments_that_all_of_them_have():
    values = {"identity": {0: 9.0, 20: 1.0, 100: 2.0, "optimum": 9.0}, "stale 4": {20: 3, 100: 5}}
    comparisons = {
        ("logistic", moment, "implicit", direction, "rank"): [float(value)]
        for direction, by_moment in values.items()
        for moment, value in by_moment.items()
    }
    found = fidelity.summary(comparisons)
    assert found["over_all_moments"] == {"logistic": [20, 100]}
    over_all = found["over_all"]["logistic"]["implicit"]
    assert {name: m["rank"]["mean"] for name, m in over_all.items()} == {
        "identity": 1.5, "stale 4": 4.0,
    }  # fmt: skip
    complete = found["by_moment"]["logistic"]["implicit"]["identity"]["rank"]
    assert complete == {"0": 9.0, "20": 1.0, "100": 2.0, "optimum": 9.0}


# --- the command


@pytest.fixture
def tiny(monkeypatch):
    """One small problem, two moments, few directions; compiled fast, not for speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    few = ("identity", "adam", "val 16")
    monkeypatch.setattr(fidelity, "DIRECTIONS", {d: fidelity.DIRECTIONS[d] for d in few})
    for name, value in {
        "PROBLEMS": {"logistic": fidelity.PROBLEMS["logistic"]},
        "MOMENTS": (0, 12),
        "BATCH": 4,
        "TX": {"adam": optax.adam(1e-2)},
    }.items():
        monkeypatch.setattr(fidelity, name, value)
    fidelity.compiled.cache_clear()
    yield
    fidelity.compiled.cache_clear()
    jax.config.update("jax_disable_most_optimizations", False)


def test_directions_read_what_their_names_say(tiny, monkeypatch):
    # Scores of one run, with truths that cost nothing in the place of the others.
    def nothing(self, moment, params, *_):
        return {"exact adam": np.ones((4, 2))}

    monkeypatch.setattr(fidelity.Run, "true_scores", nothing)
    monkeypatch.setattr(fidelity.Run, "optimum", lambda self, params, train: params)
    read = {}
    monkeypatch.setattr(
        fidelity.Run, "add", lambda self, moment, scores, *_: read.update({moment: scores})
    )
    run = fidelity.Run("logistic", 0, "adam", {})
    run.compare()
    assert set(read) == {0, 12, "optimum"}
    assert set(read[0]) == set(read["optimum"]) == {"identity", "val 16"}
    assert set(read[12]) == {"identity", "adam", "val 16"}
    now = read[12]
    assert all(scores.shape == (4, 2) for scores in now.values())
    assert not np.allclose(now["identity"], now["val 16"])
    assert not np.allclose(now["identity"], now["adam"])


def test_every_direction_is_a_scoring_and_each_truth_is_explained():
    assert all(isinstance(scoring, Scoring) for scoring in fidelity.DIRECTIONS.values())
    exact = {f"exact {optimiser}" for optimiser in fidelity.TX}
    assert set(fidelity.TRUTHS) == exact | {*fidelity.DAMPINGS, "unrolled", "leave one out"}


@pytest.mark.slow
def test_the_command_reports_and_draws(tiny, capsys, tmp_path):
    files = ["--out", str(tmp_path / "out.json"), "--figure", str(tmp_path / "figure.png")]
    assert fidelity.main(["--json", "--seeds=1", *files]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["failed"] == {}
    assert found["agreement"]["over_all_moments"] == {"logistic": [12]}  # Adam has none at 0
    by_truth = found["agreement"]["over_all"]["logistic"]
    assert set(by_truth) == {
        "exact adam", "implicit", "implicit .1", "unrolled", "leave one out"
    }  # fmt: skip
    # The direction of the run's own optimiser sees its step.
    assert by_truth["exact adam"]["adam"]["rank"]["mean"] > 0.95
    # Of two truths computed in two ways: at the optimum influence foretells retraining.
    course = found["agreement"]["by_moment"]["logistic"]["leave one out"]["implicit"]
    assert course["utility_rank"]["optimum"] > 0.9
    assert found["agreement"]["implicit_residual_max"]["logistic"] < 1e-8
    assert found["machine"]["versions"]["jax"]
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == {"figure.png", "figure_course.png"}
    assert any("logistic" in line and "12" in line for line in fidelity.Fidelity.table(found))


def test_ctrl_c_and_a_run_that_fails_keep_the_rest(monkeypatch, capsys):
    def compare(self):
        if self.optimiser == "momentum":
            raise KeyboardInterrupt
        self.comparisons[self.problem, 20, "implicit", "identity", "rank"] = [0.5]
        raise ZeroDivisionError("no")

    monkeypatch.setattr(fidelity.Run, "compare", compare)
    assert fidelity.main(["--json", "--seeds=1"]) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == {"logistic, sgd, seed 0": "ZeroDivisionError: no"}
    mean = {"mean": 0.5, "sd": None, "n": 1}
    agreement = found["agreement"]["over_all"]
    assert agreement == {"logistic": {"implicit": {"identity": {"rank": mean}}}}


def test_bad_arguments_are_refused_before_anything_runs(capsys):
    assert "error: seeds must" in refused(fidelity.main, ["--seeds=0"], capsys)


def test_the_committed_report_can_be_drawn_and_printed(tmp_path):
    report = json.loads(COMMITTED.read_text())
    fidelity.Fidelity.draw(report, tmp_path / "figure.png")
    assert len(list(tmp_path.glob("*.png"))) == 2
    shown = list(fidelity.Fidelity.table(report))
    assert sum("head cg .1" in line for line in shown) == 3  # a row a problem
