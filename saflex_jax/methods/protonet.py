"""Prototypical networks, over joint labels if asked: few-shot classes by the nearest mean feature.

    episodes [B] -> views [B M] -> features -> a prototype for each (class, view) -> loss of queries

Source: Snell, Swersky and Zemel, "Prototypical networks for few-shot learning", NeurIPS 2017; with
several views Lee, Hwang and Shin, "Self-supervised label augmentation via input transformations",
ICML 2020, the few-shot experiments, for which the repository hankook/SLA has no code.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.augment.transformations import TRANSFORMATIONS, transformed
from saflex_jax.core import steps
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.tree import identity
from saflex_jax.methods.base import Episode, MethodSpec, as_given, no_clean
from saflex_jax.methods.sla import PREDICTIONS, aggregate, joint_labels
from saflex_jax.types import Method, Model


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of prototypical networks.

    Attributes:
      ways: classes of an episode, >= 2.
      shots: support samples of each class, >= 1.
      queries: query samples of each class, >= 1.
      transformations: name of `augment.transformations.TRANSFORMATIONS`, with M views; "none" =
        one view.
      predict: logits f32[B, ways] of all rows, support included, from the prototypes of their
        episode. "single": from the sample itself and p_w0, one forward pass (SI). "aggregated":
        mean over j of those from view j and p_wj, M forward passes (AG).

    Raises:
      ValueError: an unknown name, or a number out of range.
    """

    ways: int = 5
    shots: int = 1
    queries: int = 15
    transformations: str = "none"
    predict: str = "single"

    def __post_init__(self):
        checks.whole(2, ways=self.ways)
        checks.whole(1, shots=self.shots, queries=self.queries)
        checks.choice(TRANSFORMATIONS, transformations=self.transformations)
        checks.choice(PREDICTIONS, predict=self.predict)

    @property
    def views(self) -> int:
        """M."""
        return len(TRANSFORMATIONS[self.transformations])


def network(backbone: nn.Module, num_classes: int, options: Options = Options()) -> nn.Module:
    """The backbone alone: its features f32[B, D] are used instead of logits."""
    del num_classes, options
    return backbone


def episode(options: Options) -> Episode:
    """The make-up of an episode."""
    return Episode(options.ways, options.shots, options.queries)


def make(model: Model, tx: optax.GradientTransformation, options: Options = Options()) -> Method:
    """Training on episodes: each view of a query should be closest to its own prototype.

        p_wk = mean_s f(x_swk)                        s over the support samples of class w, view k
        L = mean_ij CE(softmax_wk(-|f(x_ij) - p_wk|^2), (y_i, j))   i over queries, j over views

    With one view this is the prototypical network. Support samples enter through their prototypes
    only. Batches are whole episodes in the order [episode, class, shots + queries] of
    `data.EpisodeStream`: a row's position gives its class, and labels are not read. So an upstream
    augmentation must keep every row's position and class: do not mix. Padding comes in whole
    episodes, and under pmap a device has whole episodes. BatchNorm sees the views of all rows
    together.

    >>> from saflex_jax.models import SmallCNN, from_linen
    >>> options = Options(ways=5, shots=1, queries=5)
    >>> method = make(from_linen(network(SmallCNN(), 5, options)), optax.sgd(0.1), options)

    Args:
      model: returns features f32[B, D], like that of `network`.
      tx: optax transformation.
      options: see `Options`.

    Raises:
      ValueError: clean samples (not supported), or rows that are not whole episodes.
    """
    views, shape = options.views, episode(options)

    def init(key, inputs):
        params, model_state = model.init(key, transformed(inputs, options.transformations))
        return steps.init_state(key, params, model_state, tx)

    def step(state, streams, *, reduce=identity):
        no_clean("protonet", streams.clean)
        batch = streams.candidates
        classes, of_query = _places(len(batch.mask), shape)
        inputs = transformed(batch.inputs, options.transformations)
        labels = joint_labels(jax.nn.one_hot(classes, shape.ways), views)
        queries = jnp.repeat(batch.mask & of_query, views)
        key = steps.step_key(state, batch.index)

        def loss_fn(params):
            features, model_state = model.train(params, state.model_state, inputs, key)
            logits = joint_logits(features, shape, views)
            losses = weighted_cross_entropy(logits, labels, mask=queries)
            metrics = {"candidate_loss": steps.total(losses, queries, reduce)}
            return masked_mean(losses, queries, reduce=reduce), (model_state, metrics)

        return steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)

    def predict(state, inputs):
        read = 1 if options.predict == "single" else views
        if read > 1:
            inputs = transformed(inputs, options.transformations)
        features = model.logits(state.params, state.model_state, inputs)
        return aggregate(joint_logits(features, shape, read), read)

    return Method(init, step, predict, as_given)


def _places(size, shape):
    """Of every row its class in the episode, i32[B], and whether it is a query, bool[B]."""
    ways, shots, queries = shape
    place = jnp.arange(size)
    return place // (shots + queries) % ways, place % (shots + queries) >= shots


def joint_logits(features: jax.Array, episode: Episode, views: int) -> jax.Array:
    """Minus the squared distances of all views to all prototypes of their episode.

        z_(i j)(w k) = -|f_ij - p_wk|^2 ,  p_wk = mean_s f_swk

    Args:
      features: f32[B M, D], rows in the order [episode, class, shots + queries, view].
      episode: what it is made of; the support samples of a class come first.
      views: M.

    Returns:
      f32[B M, ways M]; class w of view k is column w M + k.

    Raises:
      ValueError: features of another shape, or rows that are no whole episodes.
    """
    if getattr(features, "ndim", None) != 2:
        given = jax.tree.map(jnp.shape, features)
        raise ValueError(f"model must give features f32[B, D]; given {given}")
    ways, shots, queries = episode
    per_class, (size, width) = shots + queries, features.shape
    if size % (ways * per_class * views):
        raise ValueError(
            f"rows must be whole episodes of {ways} x ({shots} + {queries}), on every device; "
            f"given {size // views}"
        )
    by_class = features.reshape(-1, ways, per_class, views, width)
    p = jnp.mean(by_class[:, :, :shots], 2).reshape(-1, ways * views, width)
    f = features.reshape(len(p), -1, width)
    # Not from the differences, which would be `width` times as many numbers.
    product = jnp.einsum("erd,ecd->erc", f, p, precision=jax.lax.Precision.HIGHEST)
    f_square, p_square = (jnp.sum(x**2, -1) for x in (f, p))
    return (2 * product - f_square[:, :, None] - p_square[:, None, :]).reshape(size, ways * views)


SPEC = MethodSpec(make, takes=("options",), options=Options(), network=network, episode=episode)
