import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from saflex_jax.core import linear_solve
from tests.problems import assert_close

N, DAMPING = 7, 0.3
_RNG = np.random.default_rng(0)
_FACTOR = _RNG.normal(size=(N, N))
A = _FACTOR @ _FACTOR.T / N + 0.2 * np.eye(N)
DAMPED = A + DAMPING * np.eye(N)
B = {"a": _RNG.normal(size=3).astype(np.float32), "b": _RNG.normal(size=(2, 2)).astype(np.float32)}
B_FLAT = np.concatenate([B["a"], B["b"].ravel()]).astype(np.float64)


def matvec(tree):
    flat, unravel = ravel_pytree(tree)
    return unravel(jnp.asarray(A, jnp.float32) @ flat)


def run(solve):
    """Flat solution and residual, compiled as in a training step."""
    x, info = jax.jit(lambda b: solve(matvec, b))(B)
    assert jax.tree.structure(x) == jax.tree.structure(B)
    return np.asarray(ravel_pytree(x)[0], np.float64), float(info.residual)


def residual(matrix, x):
    return np.linalg.norm(matrix @ x - B_FLAT) / np.linalg.norm(B_FLAT)


def krylov(steps):
    """What CG is, by its definition: the A-norm projection of the solution on the Krylov space."""
    space = np.stack([np.linalg.matrix_power(DAMPED, j) @ B_FLAT for j in range(steps)], 1)
    space = np.linalg.qr(space)[0]
    return space @ np.linalg.solve(space.T @ DAMPED @ space, space.T @ B_FLAT)


def neumann(steps, scale):
    decay = np.eye(N) - scale * DAMPED
    return scale * sum(np.linalg.matrix_power(decay, j) @ B_FLAT for j in range(steps + 1))


@pytest.mark.parametrize(
    ("solve", "expected", "matrix"),
    [
        (linear_solve.identity_solve(), B_FLAT, A),
        (linear_solve.identity_solve(scale=0.2), 0.2 * B_FLAT, A),
        (
            linear_solve.preconditioned_solve({"a": np.arange(3.0), "b": np.full((2, 2), 0.5)}),
            np.array([0, 1, 2, 0.5, 0.5, 0.5, 0.5]) * B_FLAT,
            A,
        ),
        (linear_solve.cg_solve(maxiter=N, damping=0.0), np.linalg.solve(A, B_FLAT), A),
        (
            linear_solve.cg_solve(maxiter=N, damping=DAMPING),
            np.linalg.solve(DAMPED, B_FLAT),
            DAMPED,
        ),
        (linear_solve.cg_solve(maxiter=1, damping=DAMPING), krylov(1), DAMPED),
        (linear_solve.cg_solve(maxiter=3, damping=DAMPING), krylov(3), DAMPED),
        (linear_solve.neumann_solve(steps=0, scale=0.2, damping=DAMPING), 0.2 * B_FLAT, DAMPED),
        (
            linear_solve.neumann_solve(steps=3, scale=0.2, damping=DAMPING),
            neumann(3, 0.2),
            DAMPED,
        ),
        (
            linear_solve.neumann_solve(steps=300, scale=0.3, damping=DAMPING),
            np.linalg.solve(DAMPED, B_FLAT),
            DAMPED,
        ),
    ],
)
def test_solution_and_residual(solve, expected, matrix):
    x, reported = run(solve)
    assert_close(x, expected, 2e-5)
    np.testing.assert_allclose(reported, residual(matrix, x), rtol=1e-4, atol=1e-5)


def test_cg_stops_at_its_tolerance():
    loose, tight = (run(linear_solve.cg_solve(maxiter=N, tol=tol)) for tol in (0.5, 1e-3))
    assert tight[1] <= 1e-3 < loose[1] <= 0.5


def test_cg_survives_iterations_beyond_the_solution_at_any_size_of_the_gradient():
    # CG's own residual shrinks on and on: a few of many systems meet 0 / 0 where it underflows.
    # And the validation gradient itself shrinks while training.
    rng = np.random.default_rng(2)
    sizes = 10.0 ** rng.uniform(-18, 12, size=(500, 1))
    rhs = (sizes * rng.normal(size=(500, N))).astype(np.float32)
    solve = linear_solve.cg_solve(maxiter=100, damping=0.0)
    x, info = jax.jit(jax.vmap(lambda b: solve(matvec, b)))(rhs)
    np.testing.assert_allclose(x / sizes, np.linalg.solve(A, (rhs / sizes).T).T, atol=1e-4)
    assert (info.residual < 1e-5).all()


def test_cg_on_a_singular_system_solves_what_has_a_solution_and_stays_finite():
    rng = np.random.default_rng(3)
    factor = rng.normal(size=(N, N - 3))
    singular = factor @ factor.T
    within = singular @ rng.normal(size=N)

    def solved(rhs, maxiter):
        solve = linear_solve.cg_solve(maxiter=maxiter, damping=0.0)
        product = functools.partial(jnp.dot, singular.astype(np.float32), precision="highest")
        return jax.jit(lambda b: solve(product, b)[0])(rhs.astype(np.float32))

    best = np.linalg.pinv(singular, hermitian=True) @ within
    np.testing.assert_allclose(solved(within, 100), best, rtol=1e-3, atol=1e-3)
    beyond = within + 0.1 * rng.normal(size=N)  # no solution: directions without curvature
    np.testing.assert_array_equal(solved(beyond, 20), solved(beyond, 100))
    assert np.isfinite(solved(beyond, 100)).all()


def test_right_hand_side_of_zero():
    zero = jax.tree.map(np.zeros_like, B)
    for solve in (linear_solve.cg_solve(), linear_solve.neumann_solve(steps=2, scale=0.1)):
        x, info = solve(matvec, zero)
        assert_close(x, zero)
        assert info.residual == 0


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda **o: optax.adam(1.0, b1=0.0, **o), {}),
        (lambda **o: optax.adam(1.0, b1=0.0, **o), {"b2": 0.9, "eps": 1e-3}),
        (
            lambda **o: optax.chain(
                optax.clip_by_global_norm(1e9),
                optax.chain(optax.scale_by_adam(b1=0.0, **o), optax.scale(-1.0)),
            ),
            {},
        ),
    ],
)
def test_adam_inverse_diagonal_is_what_adam_does_to_a_gradient(make, options):
    tx = make(**options)
    state = tx.init(B)
    before = linear_solve.adam_inverse_diagonal(state, **options)
    assert_close(before, jax.tree.map(np.ones_like, B))
    rng = np.random.default_rng(1)
    for _ in range(3):
        gradient = jax.tree.map(lambda b: rng.normal(size=b.shape).astype(np.float32), B)
        updates, state = tx.update(gradient, state, B)
    diagonal = linear_solve.adam_inverse_diagonal(state, **options)
    step, _ = linear_solve.preconditioned_solve(diagonal)(matvec, gradient)
    assert_close(step, jax.tree.map(jnp.negative, updates))


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.chain(optax.adam(0.1), optax.adam(0.1))])
def test_adam_inverse_diagonal_needs_exactly_one_second_moment(tx):
    found = 0 if len(jax.tree.leaves(tx.init(B))) == 0 else 2
    with pytest.raises(ValueError, match=f"exactly one optax.ScaleByAdamState; given {found}"):
        linear_solve.adam_inverse_diagonal(tx.init(B))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (linear_solve.identity_solve, {"scale": 0.0}, "scale must be positive"),
        (
            linear_solve.neumann_solve,
            {"steps": -1, "scale": 0.1},
            "steps must be a whole number >= 0; given -1",
        ),
        (linear_solve.neumann_solve, {"steps": 1, "scale": 0.0}, "scale must be positive"),
        (
            linear_solve.neumann_solve,
            {"steps": 1, "scale": 0.1, "damping": -1.0},
            "damping must be >= 0",
        ),
        (linear_solve.cg_solve, {"maxiter": 0}, "maxiter must be a whole number >= 1; given 0"),
        (linear_solve.cg_solve, {"tol": -1.0}, "tol must be >= 0"),
        (linear_solve.cg_solve, {"damping": -1.0}, "damping must be >= 0"),
    ],
)
def test_bad_arguments(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
