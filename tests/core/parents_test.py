"""Shares and parents of mixed rows, against the labels that the mixing itself made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax import augment
from saflex_jax.core import parents
from saflex_jax.types import Batch

SIZE, CLASSES = 64, 64  # each sample a class of its own: a label says whose a row is
PIPELINES = {
    "mixup": "mixup(0.4, probability=0.5)",
    "cutmix": "shift(1) | flip | cutmix(1.0)",
    "none": "shift(1) | flip",
    "two": "mixup(1.0, probability=0.7) | cutmix(1.0, probability=0.7)",
}


def batch():
    images = np.random.default_rng(0).random((SIZE, 8, 8, 1)).astype(np.float32)
    index = np.random.default_rng(1).permutation(SIZE).astype(np.int32)
    labels = np.eye(CLASSES, dtype=np.float32)[index]
    return Batch(images, labels, np.ones(SIZE, bool), index)


@functools.cache
def augmented(name):
    return jax.jit(augment.parse(PIPELINES[name]))(jax.random.key(3), batch())


@pytest.mark.parametrize("name", PIPELINES)
def test_the_own_share_is_that_of_the_own_label(name):
    made = augmented(name)
    own = np.take_along_axis(np.asarray(made.labels), np.asarray(made.index)[:, None], 1)[:, 0]
    share = np.asarray(parents.own_share(made))
    once = np.asarray(made.trace.partner != made.index[:, None]).sum(1) < 2
    np.testing.assert_allclose(share[once], own[once], atol=1e-6)
    assert (share[~once] <= own[~once] + 1e-6).all()  # a sample may come back by its partner
    assert (name == "none") == (share == 1).all()
    np.testing.assert_array_equal(parents.is_whole(made), share >= 0.9)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "none"])
def test_what_is_known_of_samples_is_mixed_as_labels_are(name):
    made = augmented(name)

    def recall(index):
        return jax.nn.one_hot(index, CLASSES)

    found = parents.mixture(made, recall, jnp.full((SIZE, CLASSES), jnp.nan))
    whole = np.asarray(parents.is_whole(made))
    np.testing.assert_allclose(found[~whole], made.labels[~whole], atol=1e-6)
    np.testing.assert_array_equal(found[whole], recall(made.index)[whole])


def test_of_rows_with_an_unknown_parent_something_else_is_taken():
    made = augmented("mixup")
    known = np.arange(SIZE) % 3 > 0

    def recall(index):
        return jax.nn.one_hot(index, CLASSES) * known[index][..., None]

    found = parents.mixture(made, recall, jnp.full((SIZE, CLASSES), 7.0))
    both = known[made.index] & (parents.is_whole(made) | known[made.trace.partner].all(1))
    np.testing.assert_array_equal((np.asarray(found) == 7).all(1), ~np.asarray(both))


@pytest.mark.parametrize("name", ["mixup", "cutmix", "none"])
def test_a_property_of_all_parents_is_one_of_everything_the_label_names(name):
    made = augmented(name)

    def holds(index):
        return index % 4 > 0

    labels = np.where(parents.is_whole(made)[:, None], np.eye(CLASSES)[made.index], made.labels)
    named = [holds(np.flatnonzero(row > 0)).all() for row in labels]
    found = np.asarray(parents.of_all(made, holds))
    np.testing.assert_array_equal(found, named)
    assert 0 < found.sum() < SIZE


def test_without_a_trace_the_label_says_what_is_mixed_and_nobody_who_the_partner_is():
    labels = np.array([[1, 0], [0.95, 0.05], [0.6, 0.4]], np.float32)
    rows = Batch(np.zeros((3, 2)), labels, np.ones(3, bool), np.arange(3))
    np.testing.assert_array_equal(parents.is_whole(rows), [True, True, False])
    np.testing.assert_array_equal(parents.of_all(rows, lambda index: index >= 0), [1, 1, 0])
    found = parents.mixture(rows, lambda index: jnp.ones((*index.shape, 2)), jnp.zeros((3, 2)))
    np.testing.assert_array_equal(found, [[1, 1], [1, 1], [0, 0]])
