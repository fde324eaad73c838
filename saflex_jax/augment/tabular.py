"""Augmentations of tables: f32[B, D], or {"numeric": f32[B, D], "categorical": codes i32[B, E]}.

Numeric columns should be standardised. `mixing.mixup` also takes both forms: it averages numeric
columns and takes each categorical one whole from one parent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.augment.base import Augment, per_example, sample_keys
from saflex_jax.augment.mixing import (
    beta,
    dominating,
    draws,
    labelled,
    mix,
    partners,
    settle,
    sometimes,
)
from saflex_jax.types import Batch, PyTree

_PARTS = ("numeric", "categorical")


def parts(inputs: PyTree) -> dict[str, jax.Array]:
    """A table or a row of one as a dict of "numeric" and, if present, "categorical" columns.

    >>> list(parts(jnp.zeros((2, 3))))
    ['numeric']

    Raises:
      ValueError: other entries, numeric columns that are not floats, codes that are not integers.
    """
    if isinstance(inputs, dict) and set(inputs) != set(_PARTS):
        raise ValueError(f"inputs must have the entries {list(_PARTS)}; given {sorted(inputs)}")
    columns = inputs if isinstance(inputs, dict) else {"numeric": inputs}
    for name, kind in zip(_PARTS, (jnp.floating, jnp.integer)):
        if name in columns and not jnp.issubdtype(columns[name].dtype, kind):
            raise ValueError(
                f"{name} columns must be of type {kind.__name__}; given {columns[name].dtype}"
            )
    return columns


def _like(inputs: PyTree, columns: dict[str, jax.Array]) -> PyTree:
    """`columns` as an array if `inputs` is one, else as the dict that they are."""
    return columns if isinstance(inputs, dict) else columns["numeric"]


def feature_noise(deviation: float) -> Augment:
    """Adds Gaussian noise to the numeric columns; categorical ones stay.

        x <- x + deviation * N(0, 1)

    >>> batch = Batch(jnp.ones((1, 3)), jnp.eye(1), jnp.ones(1, bool), jnp.arange(1))
    >>> feature_noise(0.0)(jax.random.key(0), batch).inputs.tolist()
    [[1.0, 1.0, 1.0]]

    Args:
      deviation: >= 0, in units of the columns' standard deviation; the trace's magnitude.
    """
    checks.at_least_zero(deviation=deviation)

    def noisy(key, row):
        columns = parts(row)
        x = columns["numeric"]
        x = (x + deviation * jax.random.normal(key, x.shape)).astype(x.dtype)
        return _like(row, {**columns, "numeric": x}), deviation

    return per_example("feature_noise", noisy)


def feature_mask(probability: float, value: float = 0.0, *, category: int = -1) -> Augment:
    """Overwrites random columns, as if they had not been measured.

    >>> batch = Batch(jnp.ones((1, 3)), jnp.eye(1), jnp.ones(1, bool), jnp.arange(1))
    >>> feature_mask(1.0, value=-9.0)(jax.random.key(0), batch).inputs.tolist()
    [[-9.0, -9.0, -9.0]]

    Args:
      probability: of each column, independently. The trace's magnitude is the realised share.
      value: of masked numeric columns; 0 is the mean of a standardised column.
      category: code of masked categorical columns; -1 is "missing", as `data.fit_encoder` codes it.
    """
    checks.fraction(probability=probability)
    checks.whole(-1, category=category)
    fills = {"numeric": value, "categorical": category}

    def masked(key, row):
        columns, hit = parts(row), {}
        for number, (name, x) in enumerate(columns.items()):
            column_key = jax.random.fold_in(key, number)
            hit[name] = jax.random.bernoulli(column_key, jnp.float32(probability), x.shape)
        out = {
            name: jnp.where(hit[name], jnp.asarray(fills[name], x.dtype), x)
            for name, x in columns.items()
        }
        magnitude = jnp.mean(jnp.concatenate(list(hit.values())), dtype=jnp.float32)
        return _like(row, out), magnitude

    return per_example("feature_mask", masked)


def tabular_cutmix(alpha: float, *, probability: float = 1.0, per_sample: bool = True) -> Augment:
    """Replaces numeric and categorical columns by the partner's.

        column kept with probability l ~ Beta(alpha, alpha) ;  share = columns kept / columns

    If less than half is kept, the complement is used, as in `mixing`.

    >>> augment = tabular_cutmix(1.0)  # as text: parse("tabular_cutmix(1.0)")

    Args:
      alpha: > 0, of the Beta distribution of l.
      probability: of mixing at all.
      per_sample: False = the same columns for the whole batch.

    Source: CutMix (Yun et al., ICCV 2019) with columns for pixels.
    """
    checks.positive(alpha=alpha)
    checks.fraction(probability=probability)

    def augment(key, batch):
        table = parts(batch.inputs)
        for name, x in table.items():
            if x.ndim != 2:
                raise ValueError(f"{name} columns must have shape [B, columns]; given {x.shape}")
        columns = sum(x.shape[1] for x in table.values())
        partner_key, columns_key = jax.random.split(key)

        def draw(key):
            share_key, kept_key = jax.random.split(key)
            share = beta(share_key, alpha)
            kept = jax.random.bernoulli(kept_key, share, (columns,))
            return dominating(kept.astype(jnp.float32))

        own = draws(sometimes(draw, probability), columns_key, batch, per_sample=per_sample)
        partner, own, share = settle(batch, partners(partner_key, batch), own)
        kept, mixed = own > 0.5, {}
        for name, x in table.items():
            mixed[name] = jnp.where(kept[:, : x.shape[1]], x, x[partner])
            kept = kept[:, x.shape[1] :]
        inputs = _like(batch.inputs, mixed)
        return labelled(batch, inputs, partner, share, "tabular_cutmix")

    return augment


def smote(*, probability: float = 1.0) -> Augment:
    """Interpolates with a partner of the same class, drawn uniformly from the batch.

        x <- x + u (x_p - x) ,  u ~ U(0, 1) ;  soft labels likewise

    The class is the label's largest entry. A category comes whole from one parent, the partner with
    probability u. The only sample of its class stays unchanged. The trace's magnitude is 1 - u, the
    own share, which may be below one half.

    >>> augment = smote()  # as text: parse("smote")

    Args:
      probability: of interpolating at all.

    Source: Chawla et al., "SMOTE", JAIR 2002, with the class in the batch instead of nearest
    neighbours.
    """
    draw = sometimes(lambda key: 1 - jax.random.uniform(key), probability)

    def augment(key, batch):
        parts(batch.inputs)
        partner_key, share_key, codes_key = jax.random.split(key, 3)
        own = draws(draw, share_key, batch, per_sample=True)
        keys = sample_keys(codes_key, batch)
        return mix(batch, classmates(partner_key, batch), own, "smote", keys=keys)

    return augment


def classmates(key: jax.Array, batch: Batch) -> jax.Array:
    """i32[B], for each row another unmasked one of its class, drawn uniformly; itself if alone."""
    checks.soft(labels=batch.labels)
    size, classes = batch.labels.shape
    label = jnp.where(batch.mask, jnp.argmax(batch.labels, 1), classes)  # padding: apart
    order = jnp.argsort(label, stable=True)  # classes are runs of it
    place = jnp.argsort(order)
    count = jnp.bincount(label, length=classes + 1)
    first = (jnp.cumsum(count) - count)[label]
    others = count[label] - 1
    draw = jax.vmap(lambda key, others: jax.random.randint(key, (), 0, jnp.maximum(others, 1)))
    drawn = first + draw(sample_keys(key, batch), others)
    drawn += drawn >= place  # skips the row itself
    return jnp.where(others > 0, order[jnp.minimum(drawn, size - 1)], jnp.arange(size))
