"""docs/own_loop.md: every block of it runs, on networks of the libraries that it names."""

from __future__ import annotations

import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import saflex_jax
from tests.plugin_test import CLASSES, FEATURES, HIDDEN, KEY, bare, blobs

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "own_loop.md").read_text()
LIBRARIES = {"saflex_jax": saflex_jax, "jax": jax, "jnp": jnp, "optax": optax}


def blocks(heading: str) -> list[str]:
    """The Python blocks below the heading that begins so."""
    _, _, rest = PAGE.partition(f"## {heading}")
    assert rest, f"no heading {heading!r}"
    return re.findall(r"```python\n(.*?)```", rest.partition("\n## ")[0], re.DOTALL)


def run(heading: str, **names) -> dict:
    """What the blocks below a heading define, given these names."""
    scope = LIBRARIES | names
    for block in blocks(heading):
        exec(block, scope)
    return scope


@pytest.fixture(scope="module")
def problem():
    """A bare network, a batch and trusted samples."""
    apply_fn, params = bare()
    (x, y), (x_val, y_val) = blobs(40, 0, wrong=0.3), blobs(12, 1)
    return dict(apply_fn=apply_fn, params=params, x=x, y=y, x_val=x_val, y_val=y_val)


def head(problem):
    """`under("head")` on the bare network: its parameters have no names."""
    params = {"inside": problem["params"][0], "head": problem["params"][1]}

    def apply_fn(params, x):
        return problem["apply_fn"]([params["inside"], params["head"]], x)

    return problem | {"apply_fn": apply_fn, "params": params}


def test_the_papers_rule(problem):
    found = run("The paper's rule", **head(problem))
    labels = found["targets"].labels
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-5)
    assert found["result"].scores.shape == found["scores"].shape == (40, CLASSES)
    assert np.abs(found["result"].scores - found["scores"]).max() > 1e-3


def test_the_default_rule(problem):
    scope = run("The paper's rule", **head(problem))
    trusted = np.arange(40) < 8
    sums, y, trusted_count = saflex_jax.no_agreement(), problem["y"], 8
    given = {
        "result": scope["result"],
        "y": y,
        "M": trusted_count,
        "trusted": trusted,
        "sums": sums,
    }
    found = run("The default rule", x_val=problem["x_val"], **given)
    assert 0 <= found["noise_rate"] <= 1
    np.testing.assert_array_equal(found["targets"].labels[trusted], y[trusted])


def test_the_default_rule_in_a_loop_finds_the_share_and_trains_through_wrong_labels():
    """400 samples of which 40 % are wrong, and 40 trusted ones that train beside them."""
    (x, y), (x_val, y_val) = blobs(400, 0, wrong=0.4), blobs(40, 1)
    x, y = jnp.concatenate([x, x_val]), jnp.concatenate([y, y_val])
    network = head(dict(zip(("apply_fn", "params"), bare())))
    apply_fn, params, tx = network["apply_fn"], network["params"], optax.adam(1e-2)

    def learned(params, sums, x, y, trusted):
        """The lines of the page."""
        found = saflex_jax.score(
            apply_fn, params, x, x_val, y_val,
            predicate=saflex_jax.under("head"), solve=saflex_jax.cg_solve(),
        )  # fmt: skip
        part = len(x_val) / (len(x_val) + HIDDEN)
        belief = jax.nn.softmax(found.log_probs + part * found.scores)
        agrees = saflex_jax.agreement(belief, y)
        sums = saflex_jax.add_agreement(sums, (agrees, trusted), (agrees, ~trusted))
        rate = saflex_jax.estimate_noise_rate(sums, CLASSES, num_trusted=40)
        return saflex_jax.posterior_targets(y, belief, rate, trusted=trusted), sums

    def as_given(params, sums, x, y, trusted):
        return saflex_jax.Targets(jnp.ones(len(y)), y, jnp.zeros(len(y))), sums

    def train(rule):
        def step(carry, rows):
            params, opt_state, sums = carry
            targets, sums = rule(params, sums, x[rows], y[rows], rows >= 400)

            def loss_fn(params):
                logits = apply_fn(params, x[rows])
                return saflex_jax.weighted_cross_entropy(
                    logits, targets.labels, targets.weights
                ).mean()

            updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, sums), None

        rng = np.random.default_rng(3)
        batches = np.stack([rng.permutation(440)[:110] for _ in range(150)])
        start = params, tx.init(params), saflex_jax.no_agreement()
        (last, _, sums), _ = jax.jit(lambda start: jax.lax.scan(step, start, batches))(start)
        clean_x, clean_y = blobs(2000, 2)
        return np.mean(apply_fn(last, clean_x).argmax(1) == clean_y.argmax(1)), sums

    (plain, _), (ours, sums) = train(as_given), train(learned)
    assert ours > plain + 0.03
    assert 0.25 < saflex_jax.estimate_noise_rate(sums, CLASSES, num_trusted=40) < 0.5


class Noisy(nnx.Module):
    """Dropout and BatchNorm."""

    def __init__(self, rngs):
        self.inside = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.inside(x)))))


def test_nnx_with_dropout_and_batch_norm(problem):
    x, y, x_val, y_val = (problem[name] for name in ("x", "y", "x_val", "y_val"))
    found = run("Flax NNX", nnx=nnx, model=Noisy(nnx.Rngs(0)))
    apply_fn, train_fn, params, rest = (
        found[name] for name in ("apply_fn", "train_fn", "params", "rest")
    )

    @jax.jit
    def step(params, rest, x, y):
        def evaluated(params, x):
            return nnx.merge(found["eval_graph"], params, rest, copy=True)(x)

        scores = saflex_jax.score(evaluated, params, x, x_val, y_val).scores
        targets = saflex_jax.solve_targets(scores, y)

        def loss_fn(params):
            logits, new = train_fn(params, rest, x)
            losses = saflex_jax.weighted_cross_entropy(logits, targets.labels, targets.weights)
            return losses.mean(), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new, loss

    # Evaluation mode: rows are independent and there is no noise.
    alone = apply_fn(params, x[:1])
    np.testing.assert_allclose(apply_fn(params, x)[:1], alone, atol=1e-5)
    first, _ = train_fn(params, rest, x)
    assert np.abs(first[:1] - alone).max() > 1e-3
    before = jax.tree.leaves(rest)
    for _ in range(3):
        params, rest, loss = step(params, rest, x, y)
    assert np.isfinite(loss)
    moved = [np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(before, jax.tree.leaves(rest))
             if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)]  # fmt: skip
    assert sum(moved) >= 3  # running mean and variance, and the count of dropout's draws


def test_equinox(problem):
    model = eqx.nn.MLP(FEATURES, CLASSES, HIDDEN, 1, key=KEY)
    found = run("Equinox", eqx=eqx, model=model)
    apply_fn, params = found["apply_fn"], found["params"]
    x, y, x_val, y_val = (problem[name] for name in ("x", "y", "x_val", "y_val"))
    np.testing.assert_allclose(apply_fn(params, x), jax.vmap(model)(x), atol=1e-6)
    scored = jax.jit(lambda params: saflex_jax.score(apply_fn, params, x, x_val, y_val))(params)
    _, gradient = saflex_jax.validation_gradient(apply_fn, params, x_val, y_val)
    _, expected = saflex_jax.label_scores(apply_fn, params, x, gradient)
    np.testing.assert_allclose(scored.scores, expected, atol=1e-5)
    targets = saflex_jax.solve_targets(scored.scores, y)
    assert np.isfinite(targets.weights).all()


def test_an_inner_optimum():
    found = run(
        "Differentiating",
        inner_loss=lambda params, meta: (params - meta) ** 2,
        outer_loss=lambda params: params**3,
        minimise=lambda params0, meta: meta,
        params0=0.0,
        meta=2.0,
    )
    assert found["hypergradient"] == pytest.approx(12)
