"""Prototypical networks, over joint labels if asked: few-shot classes by the nearest mean feature.

    episodes [B] -> views [B M] -> features -> a prototype for each (class, view) -> loss of queries

Source: Snell, Swersky and Zemel, "Prototypical networks for few-shot learning", NeurIPS 2017; with
several views Lee, Hwang and Shin, "Self-supervised label augmentation via input transformations",
ICML 2020, the few-shot experiments, for which the repository hankook/SLA has no code.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.augment.transformations import TRANSFORMATIONS, transformed
from saflex_jax.core import steps
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.methods.base import as_given, no_clean
from saflex_jax.methods.sla import PREDICTIONS, aggregate, joint_labels
from saflex_jax.types import Method, Model


def network(backbone: nn.Module, num_classes: int) -> nn.Module:
    """The backbone alone: its features f32[B, D] take the place of logits, and no class has any."""
    del num_classes
    return backbone


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    transformations: str = "none",
    predict: str = "single",
) -> Method:
    """Training on episodes: every query's views are to be nearest to their own prototype.

        p_wk = mean_s f(x_swk)                        s over the support samples of class w, view k
        L = mean_ij CE(softmax_wk(-|f(x_ij) - p_wk|^2), (y_i, j))   i over queries, j over views

    With one view it is the prototypical network. Support samples enter by their prototypes alone.
    Candidates and what is predicted are whole episodes, in the order [episode, class, shots +
    queries] of `data.EpisodeStream`: a row's place says its class, and labels are not read. So an
    upstream augmentation must leave every row its place and its class: mixing must not be used.
    Padding comes in whole episodes. Under pmap a device has whole episodes. BatchNorm sees the
    views of all rows together.

    Args:
      model: gives features f32[B, D], as that of `network` does.
      tx: optax transformation.
      ways: classes of an episode.
      shots: support samples of each class.
      queries: other samples of each class.
      transformations: name of `augment.transformations.TRANSFORMATIONS`, of M; "none" = one view.
      predict: logits f32[B, ways] of all rows, support included, from the prototypes of their
        episode. "single": of the sample itself and p_w0, one forward pass (SI). "aggregated": mean
        over j of those of view j and p_wj, M forward passes (AG).

    Raises:
      ValueError: an unknown name, a number out of range, clean samples (not supported), rows that
        are no whole episodes.
    """
    checks.whole(2, ways=ways)
    checks.whole(1, shots=shots)
    checks.whole(1, queries=queries)
    checks.choice(TRANSFORMATIONS, transformations=transformations)
    checks.choice(PREDICTIONS, predict=predict)
    views, of_class = len(TRANSFORMATIONS[transformations]), shots + queries

    def logits_of(features, views):
        return joint_logits(features, ways=ways, shots=shots, queries=queries, views=views)

    def init(key, inputs):
        params, model_state = model.init(key, transformed(inputs, transformations))
        return steps.init_state(key, params, model_state, tx)

    def step(state, streams, *, reduce):
        no_clean("protonet", streams.clean)
        batch, place = streams.candidates, jnp.arange(len(streams.candidates.mask))
        inputs = transformed(batch.inputs, transformations)
        labels = joint_labels(jax.nn.one_hot(place // of_class % ways, ways), views)
        asked = jnp.repeat(batch.mask & (place % of_class >= shots), views)

        def loss_fn(params):
            key = steps.step_key(state, batch.index)
            features, model_state = model.train(params, state.model_state, inputs, key)
            losses = weighted_cross_entropy(logits_of(features, views), labels, mask=asked)
            metrics = {"candidate_loss": steps.total(losses, asked, reduce)}
            return masked_mean(losses, asked, reduce=reduce), (model_state, metrics)

        return steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)

    def predict_fn(state, inputs):
        seen = 1 if predict == "single" else views
        if seen > 1:
            inputs = transformed(inputs, transformations)
        features = model.logits(state.params, state.model_state, inputs)
        return aggregate(logits_of(features, seen), seen)

    return Method(init, step, predict_fn, as_given)


def joint_logits(
    features: jax.Array, *, ways: int, shots: int, queries: int, views: int
) -> jax.Array:
    """Minus the squared distances of all views to all prototypes of their episode.

        z_(i j)(w k) = -|f_ij - p_wk|^2 ,  p_wk = mean_s f_swk

    Args:
      features: f32[B M, D], rows in the order [episode, class, shots + queries, view].
      ways: classes of an episode.
      shots: support samples of each class, which come first.
      queries: other samples of each class.
      views: M.

    Returns:
      f32[B M, ways M]; class w of view k is column w M + k.

    Raises:
      ValueError: features of another shape, or rows that are no whole episodes.
    """
    if getattr(features, "ndim", None) != 2:
        given = jax.tree.map(jnp.shape, features)
        raise ValueError(f"model must give features f32[B, D]; given {given}")
    of_class, (size, width) = shots + queries, features.shape
    if size % (ways * of_class * views):
        raise ValueError(
            f"rows must be whole episodes of {ways} x ({shots} + {queries}), on every device; "
            f"given {size // views}"
        )
    by_class = features.reshape(-1, ways, of_class, views, width)
    p = jnp.mean(by_class[:, :, :shots], 2).reshape(-1, ways * views, width)
    f = features.reshape(len(p), -1, width)
    # Not from the differences, which would be `width` times as many numbers.
    product = jnp.einsum("erd,ecd->erc", f, p, precision=jax.lax.Precision.HIGHEST)
    of_f, of_p = (jnp.sum(x**2, -1) for x in (f, p))
    return (2 * product - of_f[:, :, None] - of_p[:, None, :]).reshape(size, ways * views)
