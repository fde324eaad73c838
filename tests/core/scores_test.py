from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from saflex_jax._compat import enable_x64
from saflex_jax.core import linear_solve
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.scores import label_scores, score, validation_gradient
from saflex_jax.core.targets import solve_targets
from saflex_jax.core.tree import merge, select, under
from tests import problems
from tests.problems import CLASSES, assert_close

HEAD = under("head")


def compiled(function, *args):
    return jax.jit(function)(*args)


def scores_of(p, *, run=compiled, **options):
    """`score` on a problem's own streams, compiled."""
    candidates, val = p.streams.candidates, p.streams.val
    scored = partial(score, p.logits_fn, mask=candidates.mask, val_mask=val.mask, **options)
    return run(scored, p.params, candidates.inputs, val.inputs, val.labels)


def hand_gradients(p, predicate):
    """Flat gradients by definition: of the mean validation loss, and of each (sample, label)."""
    flat, unravel = ravel_pytree(select(p.params, predicate))
    candidates, val = p.streams.candidates, p.streams.val

    def cross_entropy(flat, x, k):
        logits = p.logits_fn(merge(unravel(flat), p.params), x[None])[0]
        return jax.nn.logsumexp(logits) - logits[k]

    gradient = jax.grad(cross_entropy)

    def pairs(x, k):
        return jax.vmap(gradient, (None, 0, 0))(flat, x, k)

    gradients = jax.vmap(lambda k: pairs(candidates.inputs, jnp.full(len(candidates.inputs), k)))
    g = jax.jit(pairs)(val.inputs, val.labels.argmax(1)).mean(0)
    per_label = jax.jit(gradients)(jnp.arange(CLASSES))  # [K, B, P]
    return np.asarray(g, np.float64), np.asarray(per_label, np.float64).swapaxes(0, 1)


@pytest.mark.parametrize("predicate", [None, HEAD])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_scores_are_inner_products_of_per_example_gradients(name, predicate):
    p = problems.problem(name)
    found = scores_of(p, predicate=predicate)
    g, per_label = hand_gradients(p, predicate)
    assert found.scores.shape == (6, CLASSES)
    assert_close(found.scores, per_label @ g)
    logits = p.logits_fn(p.params, p.streams.candidates.inputs)
    assert_close(found.log_probs, problems.log_softmax(logits))
    val_logits = p.logits_fn(p.params, p.streams.val.inputs)
    val_losses = -(p.streams.val.labels * problems.log_softmax(val_logits)).sum(1)
    np.testing.assert_allclose(found.val_loss, val_losses.mean(), rtol=1e-5)
    # sum_k p_ik S_ik = 0, hence no sample is harmful under every label
    identity = (np.exp(found.log_probs) * found.scores).sum(1)
    np.testing.assert_allclose(identity, 0, atol=1e-6 * np.abs(found.scores).max())
    assert (found.scores.max(1) >= 0).all()


def test_scores_are_slopes_of_the_per_example_loss(x64):
    p = problems.problem("mlp")
    params, candidates, val = problems.double((p.params, p.streams.candidates, p.streams.val))
    _, g = validation_gradient(p.logits_fn, params, val.inputs, val.labels)
    _, scores = label_scores(p.logits_fn, params, candidates.inputs, g)

    def losses(e):
        moved = jax.tree.map(lambda a, b: a + e * b, params, g)
        return -problems.log_softmax(p.logits_fn(moved, candidates.inputs))

    assert_close(scores, (losses(1e-6) - losses(-1e-6)) / 2e-6, 1e-7)


@pytest.mark.parametrize("name", ["identity", "neumann", "cg"])
def test_solver_turns_the_direction(name):
    # Against dense algebra on the head, with G from the labels' own gradients.
    p = problems.problem("mlp")
    g, per_label = hand_gradients(p, HEAD)
    probs = problems.softmax(p.logits_fn(p.params, p.streams.candidates.inputs))
    curvature = np.einsum("bk,bkp,bkq->pq", probs, per_label, per_label) / len(probs)
    damped = curvature + 0.1 * np.eye(len(g))
    decay = np.eye(len(g)) - 0.2 * damped
    solve, direction, matrix = {
        "identity": (linear_solve.identity_solve(scale=0.5), 0.5 * g, curvature),
        "neumann": (
            linear_solve.neumann_solve(steps=2, scale=0.2, damping=0.1),
            0.2 * (g + decay @ g + decay @ decay @ g),
            damped,
        ),
        "cg": (
            linear_solve.cg_solve(maxiter=60, damping=0.1),
            np.linalg.solve(damped, g),
            damped,
        ),
    }[name]
    found = scores_of(p, predicate=HEAD, solve=solve)
    assert_close(found.scores, per_label @ direction)
    residual = np.linalg.norm(matrix @ direction - g) / np.linalg.norm(g)
    np.testing.assert_allclose(found.info.residual, residual, atol=1e-5)


def test_finite_difference_converges_to_the_exact_scores(x64):
    p = problems.problem("mlp")
    params, candidates, val = problems.double((p.params, p.streams.candidates, p.streams.val))
    _, g = validation_gradient(p.logits_fn, params, val.inputs, val.labels)
    run = partial(label_scores, p.logits_fn, params, candidates.inputs)
    log_probs, exact = run(g)
    errors = []
    for epsilon in (1e-3, 1e-4, 1e-5):
        same, scores = run(g, mode="finite_difference", epsilon=epsilon)
        assert_close(same, log_probs, 1e-12)
        errors.append(np.abs(scores - exact).max() / np.abs(exact).max())
    # first order in epsilon, whose unit is a distance in parameter space
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 10, rtol=0.05)
    assert errors[-1] < 1e-4
    # hence a longer direction does not need a shorter step
    longer = jax.tree.map(lambda x: 1e3 * x, g)
    _, scores = run(longer, mode="finite_difference", epsilon=1e-5)
    assert_close(scores, 1e3 * exact, 2 * errors[-1])


@pytest.mark.parametrize("mode", ["jvp", "finite_difference"])
def test_chunks_and_modes_in_single_precision(mode):
    p = problems.problem("cnn")
    exact = scores_of(p, predicate=HEAD)
    whole = scores_of(p, predicate=HEAD, mode=mode)
    chunked = scores_of(p, predicate=HEAD, mode=mode, chunk=2)
    # A difference over a step of 1e-2 magnifies the rounding of log-probabilities a hundredfold.
    rounding = 1e-6 if mode == "jvp" else 3e-4
    assert_close(chunked.scores, whole.scores, rounding)
    assert_close(chunked.log_probs, whole.log_probs, 1e-6)
    assert_close(whole.scores, exact.scores, 1e-6 if mode == "jvp" else 1e-2)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("mode", ["jvp", "finite_difference"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_logits_in_bfloat16_and_an_f32_network_under_x64_are_scored_in_f32(double, mode, chunk):
    p = problems.problem("mlp")
    model = problems.with_logits(p.model, "float32" if double else "bfloat16")
    with enable_x64(double):
        found = scores_of(
            p._replace(model=model), run=jax.eval_shape, predicate=HEAD, mode=mode, chunk=chunk,
            solve=linear_solve.cg_solve(maxiter=3),
        )  # fmt: skip
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32"}


def test_rows_stay_independent_under_batch_norm():
    p = problems.problem("cnn", norm="batch")
    inputs = p.streams.candidates.inputs
    other = inputs.copy()
    other[1:] = 3 * inputs[1:] + 1
    key = jax.random.key(0)

    def training(params, x):
        return p.model.train(params, p.model_state, x, key)[0]

    def moved(logits_fn):
        """How far the scores of the first row, and of the others, move."""
        run = jax.jit(lambda x: label_scores(logits_fn, p.params, x, p.params)[1])
        a, b = run(inputs), run(other)
        return np.abs(a - b).max(1)[[0, 1]] / np.abs(a).max()

    first, second = moved(p.logits_fn)
    assert first < 1e-6 and second > 0.01
    assert moved(training)[0] > 0.01  # what training mode would have done


def test_predicted_change_of_the_validation_loss(x64):
    p = problems.problem("mlp")
    params, candidates, val = problems.double((p.params, p.streams.candidates, p.streams.val))
    found = score(p.logits_fn, params, candidates.inputs, val.inputs, val.labels)
    targets = solve_targets(found.scores, candidates.labels, tolerance=0.0)
    predicted = -jnp.mean(targets.weights * jnp.sum(targets.labels * found.scores, -1))

    def loss_after(rate):
        moved = jax.tree.map(lambda a, g: a - rate * g, params, gradient)
        logits = p.logits_fn(moved, val.inputs)
        return masked_mean(weighted_cross_entropy(logits, val.labels))

    def train_loss(params):
        logits = p.logits_fn(params, candidates.inputs)
        return jnp.mean(weighted_cross_entropy(logits, targets.labels, targets.weights))

    gradient = jax.grad(train_loss)(params)
    errors = []
    for rate in (1e-2, 1e-3, 1e-4):
        change = loss_after(rate) - found.val_loss
        errors.append(abs(change / (rate * predicted) - 1))
    assert predicted < 0 and errors[-1] < 1e-3
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 10, rtol=0.1)


@pytest.mark.parametrize("solve", [linear_solve.identity_solve(), linear_solve.cg_solve(maxiter=3)])
def test_padding_rows_change_nothing(solve):
    padded = problems.problem("mlp", size=6, val_size=5, masked=2)
    streams = padded.streams

    def cut(batch):
        return jax.tree.map(lambda x: x[batch.mask], batch)

    whole = padded._replace(streams=streams._replace(candidates=cut(streams.candidates)))
    whole = whole._replace(streams=whole.streams._replace(val=cut(streams.val)))
    found, expected = (scores_of(p, predicate=HEAD, solve=solve) for p in (padded, whole))
    assert_close(found.scores[:4], expected.scores)
    np.testing.assert_allclose(found.val_loss, expected.val_loss, rtol=1e-6)
    np.testing.assert_allclose(found.info.residual, expected.info.residual, rtol=1e-4)


@pytest.mark.parametrize(
    "solver",
    [
        lambda n: linear_solve.cg_solve(maxiter=n),
        lambda n: linear_solve.neumann_solve(steps=n, scale=0.1),
    ],
)
def test_head_scores_do_not_run_the_network_inside_the_solver(solver):
    p = problems.problem("cnn")
    calls = []

    def logits_fn(params, inputs):
        calls.append(len(inputs))
        return p.logits_fn(params, inputs)

    candidates, val = p.streams.candidates, p.streams.val

    def traced(iterations, predicate):
        calls.clear()
        run = partial(score, logits_fn, predicate=predicate, solve=solver(iterations))
        jaxpr = jax.make_jaxpr(run)(p.params, candidates.inputs, val.inputs, val.labels).jaxpr
        return problems.primitives(jaxpr), problems.primitives(jaxpr, only_loops=True)

    convolutions = []
    for iterations in (1, 10):
        everything, loop = traced(iterations, HEAD)
        # the validation samples once; the candidates once, for curvature and scores alike
        assert sorted(calls) == [4, 6]
        assert "dot_general" in loop and "conv_general_dilated" not in loop
        convolutions.append(everything.count("conv_general_dilated"))
    assert convolutions == [4, 4]  # two layers, two forward passes, no backward pass
    # The check can see a convolution in a loop: with all parameters there must be some.
    assert "conv_general_dilated" in traced(10, None)[1]


def test_compiled_head_scores_run_the_network_once_per_sample():
    p = problems.problem("cnn")
    candidates, val = p.streams.candidates, p.streams.val
    run = partial(score, p.logits_fn, predicate=HEAD, solve=linear_solve.cg_solve(maxiter=10))
    compiled = jax.jit(run).lower(p.params, candidates.inputs, val.inputs, val.labels).compile()
    # XLA joins the candidates' two passes: two layers, once for them and once for validation.
    assert compiled.as_text().count(" convolution(") == 4


def test_scores_carry_no_gradient():
    p = problems.problem("mlp")
    candidates, val = p.streams.candidates, p.streams.val

    def total(params):
        found = score(p.logits_fn, params, candidates.inputs, val.inputs, val.labels)
        return jnp.sum(found.scores**2) + found.val_loss

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(p.params)):
        np.testing.assert_array_equal(leaf, 0)


def test_scores_of_several_networks_at_once_are_those_of_each():
    """The sizes are those with which a vmapped jax.scipy.sparse.linalg.cg is wrong on a CPU."""
    rng = np.random.default_rng(0)
    members, rows, width, classes = 4, 256, 512, 10
    x = rng.standard_normal((2, members, rows, width)).astype(np.float32)
    y = np.eye(classes, dtype=np.float32)[rng.integers(classes, size=(members, rows))]
    params = {
        "kernel": 0.05 * rng.standard_normal((members, width, classes)).astype(np.float32),
        "bias": np.zeros((members, classes), np.float32),
    }

    def logits_fn(params, x):
        return x @ params["kernel"] + params["bias"][None]

    def run(params, x, x_val, y_val):
        found = score(logits_fn, params, x, x_val, y_val, solve=linear_solve.cg_solve())
        return found.scores

    def split(params):
        return [dict(zip(params, arrays)) for arrays in zip(*params.values())]

    together = jax.jit(jax.vmap(run))(params, x[0], x[1], y)
    for found, *member in zip(together, split(params), x[0], x[1], y):
        assert_close(found, jax.jit(run)(*member), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "jpv"}, "mode must be one of .* did you mean 'jvp'"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"chunk": 4}, "chunk must divide the batch of 6 rows; given 4"),
        ({"chunk": 0}, "chunk must divide the batch of 6 rows; given 0"),
        ({"predicate": under("haed")}, "selects no parameter; .*head/kernel"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        scores_of(problems.problem("mlp"), **options)


def test_bad_validation_samples():
    p = problems.problem("mlp")
    val = p.streams.val
    empty = jax.tree.map(lambda x: x[:0], val)
    with pytest.raises(ValueError, match="val_inputs must hold at least one sample; given 0"):
        scores_of(p._replace(streams=p.streams._replace(val=empty)))
    for labels in (val.labels[:, :3], val.labels[:3]):
        wrong = p.streams._replace(val=val._replace(labels=labels))
        with pytest.raises(ValueError, match="val_labels and val_logits must share one shape"):
            scores_of(p._replace(streams=wrong))
