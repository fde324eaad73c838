import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from saflex_jax.core.curvature import dot, gauss_newton, hessian, linear_logits
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.tree import merge, select, under
from tests import problems
from tests.problems import assert_close


def materialise(product, tree):
    """The matrix of a product, column by column; `product` gives the matvec, inside the trace."""
    flat, unravel = ravel_pytree(tree)

    @jax.jit
    def columns(basis):
        matvec = product()
        return jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(basis)

    return columns(np.eye(len(flat), dtype=flat.dtype))


@pytest.mark.parametrize("predicate", [None, under("head")])
def test_gauss_newton_is_the_mean_of_jacobian_sandwiches(predicate):
    p = problems.problem("mlp", masked=2)
    batch = p.streams.candidates
    selected = select(p.params, predicate)
    flat, unravel = ravel_pytree(selected)

    def product():
        linear = linear_logits(p.logits_fn, p.params, batch.inputs, predicate=predicate)
        return gauss_newton(*linear, selected, mask=batch.mask)

    rows = batch.inputs[batch.mask]

    @jax.jit
    def logits_and_jacobians(flat):
        def logits(flat):
            return p.logits_fn(merge(unravel(flat), p.params), rows)

        return logits(flat), jax.jacobian(logits)(flat)

    logits, jacobians = (np.float64(x) for x in logits_and_jacobians(flat))
    expected = 0
    for jacobian, probs in zip(jacobians, problems.softmax(logits)):
        expected += jacobian.T @ (np.diag(probs) - np.outer(probs, probs)) @ jacobian
    expected /= len(rows)
    assert_close(materialise(product, selected), expected)


def test_gauss_newton_of_a_linear_head_is_the_hessian_whatever_the_labels():
    p = problems.problem("mlp", masked=2)
    batch = p.streams.candidates
    head = select(p.params, under("head"))
    flat, unravel = ravel_pytree(head)

    def loss(part):
        logits = p.logits_fn(merge(part, p.params), batch.inputs)
        return masked_mean(weighted_cross_entropy(logits, batch.labels), batch.mask)

    def gauss():
        linear = linear_logits(p.logits_fn, p.params, batch.inputs, predicate=under("head"))
        return gauss_newton(*linear, head, mask=batch.mask)

    dense = jax.jit(jax.hessian(lambda flat: loss(unravel(flat))))(flat)
    assert_close(materialise(gauss, head), dense)
    assert_close(materialise(lambda: hessian(loss, head), head), dense)


def test_hessian_of_a_network_where_gauss_newton_differs():
    p = problems.problem("mlp")
    batch = p.streams.candidates
    flat, unravel = ravel_pytree(p.params)

    def loss(params):
        logits = p.logits_fn(params, batch.inputs)
        return masked_mean(weighted_cross_entropy(logits, batch.labels, 2 * batch.mask))

    dense = jax.jit(jax.hessian(lambda flat: loss(unravel(flat))))(flat)
    assert_close(materialise(lambda: hessian(loss, p.params), p.params), dense)
    assert np.linalg.eigvalsh(dense).min() < -1e-3  # not positive semi-definite, unlike G


def test_dot_sums_over_leaves():
    tree = {"a": np.array([1.0, 2.0]), "b": np.array([[3.0]])}
    assert dot(tree, tree) == 14
