"""Matrix-vector products with the curvature of a loss. No matrix is built."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.losses import at_least_f32, masked_mean
from saflex_jax.core.tree import identity, merge, select
from saflex_jax.types import LogitsFn, Params, PathPredicate, PyTree, Reduce

Matvec = Callable[[PyTree], PyTree]


def dot(x: PyTree, y: PyTree) -> jax.Array:
    """<x, y> over all leaves, f32[].

    >>> float(dot({"a": jnp.ones(2)}, {"a": jnp.array([1.0, 2.0])}))
    3.0

    Args:
      x, y: trees of the same structure and shapes.
    """
    products = jax.tree.map(lambda a, b: jnp.vdot(a, b), x, y)
    return jnp.asarray(sum(jax.tree.leaves(products)))


def hessian(
    loss_fn: Callable[[Params], jax.Array], params: Params, *, reduce: Reduce = identity
) -> Matvec:
    """u -> (grad^2 loss)(params) u, forward over reverse.

    The gradient is linearised once: a solver's loop does not run the network again.

    >>> product = hessian(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))
    >>> product(jnp.ones(2)).tolist()  # 6 x
    [6.0, 12.0]

    Args:
      loss_fn: params -> f32[]; under pmap the device's share (see `losses.masked_mean`).
      params: where to take the Hessian.
      reduce: mean over the data-parallel axis.
    """
    _, push = jax.linearize(jax.grad(loss_fn), params)
    return lambda u: reduce(push(u))


def logits_of(logits_fn: LogitsFn, params: Params, inputs: PyTree) -> Callable[[Params], jax.Array]:
    """The logits as a function of some parameters alone, in f32 at least.

    >>> def linear(params, x):
    ...     return x @ params["w"] + params["b"]
    >>> params = {"w": jnp.ones((1, 2)), "b": jnp.zeros(2)}
    >>> of = logits_of(linear, params, jnp.ones((1, 1)))
    >>> of({"w": None, "b": jnp.array([0.0, 1.0])}).tolist()
    [[1.0, 2.0]]

    Args:
      logits_fn: (params, inputs) -> f[B, K].
      params: pytree; where the function's argument has None, these count.
      inputs: leading axis B.
    """

    def of(part: Params) -> jax.Array:
        return at_least_f32(logits_fn(merge(part, params), inputs))

    return of


def linear_logits(
    logits_fn: LogitsFn, params: Params, inputs: PyTree, *, predicate: PathPredicate | None = None
) -> tuple[jax.Array, Callable[[Params], jax.Array]]:
    """The logits and their linear part, u -> J u, in the selected parameters; both f32[B, K].

    The network runs here, once; neither a solver's loop nor a branch runs it again. If the step
    also trains on these candidates, XLA shares this pass with the training gradient. The linear
    part is a pytree of what the pass saved; for a head, its features.

    >>> def linear(params, x):
    ...     return x @ params
    >>> logits, push = linear_logits(linear, jnp.zeros((2, 2)), jnp.eye(2))
    >>> push(jnp.ones((2, 2))).tolist()
    [[1.0, 1.0], [1.0, 1.0]]

    Args:
      logits_fn: (params, inputs) -> f[B, K].
      params: pytree.
      inputs: leading axis B.
      predicate: the parameters that u holds; None = all.
    """
    selected = select(params, predicate)
    checks.floating(params=selected)
    logits, push = jax.linearize(logits_of(logits_fn, params, inputs), selected)
    product, saved = jax.closure_convert(push, selected)
    return logits, jax.tree_util.Partial(lambda saved, u: product(u, *saved), saved)


def gauss_newton(
    logits: jax.Array,
    push: Callable[[Params], jax.Array],
    params: Params,
    *,
    mask: jax.Array | None = None,
    reduce: Reduce = identity,
) -> Matvec:
    """u -> G u with G the Gauss-Newton matrix of the mean cross-entropy.

        G = mean_i J_i^T (diag p_i - p_i p_i^T) J_i ,   J_i = d logits_i / d theta

    G is positive semi-definite and independent of the labels. For the head's parameters a product
    multiplies once with the features and once with their transpose.

    >>> def linear(params, x):
    ...     return x @ params
    >>> params, x = jnp.zeros((1, 2)), jnp.ones((1, 1))
    >>> product = gauss_newton(*linear_logits(linear, params, x), params)
    >>> product(jnp.array([[1.0, 0.0]])).tolist()
    [[0.25, -0.25]]

    Args:
      logits, push: what `linear_logits` returns.
      params: any tree with the structure of u.
      mask: bool[B]; False rows do not count.
      reduce: mean over the data-parallel axis.
    """
    pull = jax.linear_transpose(push, params)
    probs = jax.nn.softmax(logits)
    ones = jnp.ones(len(probs), probs.dtype)
    share = jax.grad(lambda values: masked_mean(values, mask, reduce=reduce))(ones)

    def matvec(u: PyTree) -> PyTree:
        change = push(u)
        change = probs * (change - jnp.sum(probs * change, axis=-1, keepdims=True))
        return reduce(pull(share[:, None] * change)[0])

    return matvec
