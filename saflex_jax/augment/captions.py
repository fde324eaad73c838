"""Caption noise: pairs with the caption of another image or class.

`methods.flyp` draws captions by class, so a pair has a wrong caption if its label is another
class's. Images stay unchanged.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.augment.base import Augment, record, sample_keys
from saflex_jax.types import Batch


def wrong_captions(probability: float = 0.3) -> Augment:
    """Gives a row the label of a random row of the batch: captions of other images.

        y_i <- y_j   with probability p, j uniform on the unmasked rows

    Frequent classes are drawn more often, and a row may get its own label. Magnitude in the trace:
    1 where a label was drawn.

    >>> batch = Batch(jnp.zeros((3, 1)), jnp.eye(3), jnp.ones(3, bool), jnp.arange(3))
    >>> jax.jit(wrong_captions(1.0))(jax.random.key(0), batch).labels.sum(1).tolist()
    [1.0, 1.0, 1.0]

    Args:
      probability: p, in [0, 1].

    Raises:
      ValueError: a probability out of range.
    """
    checks.fraction(probability=probability)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        real = jnp.where(batch.mask, 0.0, -jnp.inf)

        def draw(key):
            which, whom = jax.random.split(key)
            return jax.random.bernoulli(which, float(probability)), jax.random.categorical(
                whom, real
            )

        drawn, other = jax.vmap(draw)(sample_keys(key, batch))
        labels = jnp.where(drawn[:, None], batch.labels[other], batch.labels)
        return record(batch._replace(labels=labels), "wrong_captions", drawn)

    return augment


def swapped_classes(probability: float = 0.3) -> Augment:
    """Gives a row the caption of another class, drawn uniformly.

        y_i <- y_i moved by s classes, s uniform on {1, ..., K - 1}, with probability p

    Magnitude in the trace: s, or 0 where no class was drawn.

    >>> batch = Batch(jnp.zeros((2, 1)), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> jax.jit(swapped_classes(1.0))(jax.random.key(0), batch).labels.tolist()
    [[0.0, 1.0], [1.0, 0.0]]

    Args:
      probability: p, in [0, 1].

    Raises:
      ValueError: a probability out of range; (when called) fewer than two classes.
    """
    checks.fraction(probability=probability)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        checks.soft(labels=batch.labels)
        classes = batch.labels.shape[1]
        checks.whole(2, num_classes=classes)

        def draw(key):
            which, how = jax.random.split(key)
            moved = jax.random.randint(how, (), 1, classes)
            return jnp.where(jax.random.bernoulli(which, float(probability)), moved, 0)

        moved = jax.vmap(draw)(sample_keys(key, batch))
        labels = jax.vmap(jnp.roll)(batch.labels, moved)
        return record(batch._replace(labels=labels), "swapped_classes", moved)

    return augment
