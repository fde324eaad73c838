"""FixMatch: confident predictions on weak views are the labels of strong ones.

    weak views -> pseudo-labels, mask of the confident -> strong views -> (weights, labels)
    -> one step on labelled samples and strong views

Source: Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and
Confidence", NeurIPS 2020; where the paper is silent, the repository google-research/fixmatch.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.augment import Augment
from saflex_jax.core import steps
from saflex_jax.core.losses import (
    CandidateLoss,
    masked_mean,
    weighted_cross_entropy,
    weighted_soft_cross_entropy,
)
from saflex_jax.core.tree import identity, moving_average
from saflex_jax.methods.base import MethodSpec, pipeline
from saflex_jax.rules import AsGiven
from saflex_jax.types import Method, Model, Params, PyTree, Rule, RunInfo, TrainState


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of FixMatch.

    Attributes:
      weak: augmentation of the labelled samples, or its text (`augment.parse`); "" = the pipeline
        upstream of the candidates, `run.upstream`.
      strong: augmentation of the weak views that keeps the number of rows, or its text.
      threshold: least probability at which a prediction becomes a label, in [0, 1].
      unlabelled_weight: >= 0, of the unlabelled loss; 0 = the labelled samples alone.
      ema: in [0, 1), decay of the parameters' average that predicts; 0 = the last parameters. The
        source uses .999 for a million steps; short runs need less, since the average starts from
        the first parameters.

    Raises:
      ValueError: a value out of range, or a text that names no pipeline.
    """

    weak: Augment | str = ""
    strong: Augment | str = "randaugment(2, 10) | cutout(8)"
    threshold: float = 0.95
    unlabelled_weight: float = 1.0
    ema: float = 0.0

    def __post_init__(self):
        for augment in (self.weak, self.strong):
            pipeline(augment)
        checks.fraction(threshold=self.threshold)
        checks.amount(unlabelled_weight=self.unlabelled_weight)
        checks.decay(ema=self.ema)


class AverageAndRule(NamedTuple):
    """`TrainState.extra` of FixMatch.

    Attributes:
      average: moving average of the parameters; None without one.
      rule: the rule's arrays.
    """

    average: Params | None
    rule: PyTree


def make(
    model: Model,
    tx: optax.GradientTransformation,
    options: Options = Options(),
    *,
    rule: Rule | None = None,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    run: RunInfo | None = None,
) -> Method:
    """Training on labelled samples, streams.clean, and unlabelled ones, streams.candidates.

        p_u = softmax f(x_u) ,  pseudo_u = one-hot argmax p_u          # without gradient
        L = mean_l CE(f(weak x_l), y_l)
            + unlabelled_weight mean_u 1[max p_u >= threshold] CE(f(strong x_u), pseudo_u)
        theta <- theta + tx(grad L) ,  average <- ema average + (1 - ema) theta

    Candidates arrive as weak views from the upstream pipeline, which leaves `clean` unchanged;
    `weak` augments the labelled samples. Labels of the candidates are never read. The mean over u
    is over all unmasked candidates, confident or not.

    Weak views are predicted in evaluation mode; labelled samples and strong views share one pass in
    training mode. The source runs all three in training mode; only batch statistics and dropout
    differ.

    A rule sees the strong views with their pseudo-labels as prior, and only the confident ones
    unmasked. Their weights have mean one, so that their share of L stays the source's.

    >>> from saflex_jax.models import Classifier, SmallCNN, from_linen
    >>> options = Options(weak="shift(2) | flip", strong="shift(2) | flip | randaugment")
    >>> method = make(from_linen(Classifier(SmallCNN(), 10)), optax.sgd(0.1), options)

    Args:
      model: see `types.Model`.
      tx: optax transformation.
      options: see `Options`.
      rule: for the strong views' weights and labels; None = the pseudo-labels, weight one.
      loss: of the strong views with the refined labels (see `core.losses`).
      run: for its upstream pipeline; None = the identity.

    Returns:
      Method. The metric "confident" is the share of candidates that reach the threshold; the rule's
      metrics cover these only. `targets` are of the strong views, with weight 0 where not
      confident.

    Raises:
      ValueError: a strong augmentation that changes the number of rows, or no labelled samples.
    """
    rule = AsGiven() if rule is None else rule
    upstream = "identity" if run is None else run.upstream
    weak, strong = pipeline(options.weak or upstream), pipeline(options.strong)

    def init(key, inputs):
        params, model_state = model.init(key, inputs)
        # A copy, since a step may donate the parameters.
        average = jax.tree.map(jnp.copy, params) if options.ema else None
        extra = AverageAndRule(average, rule.init(params))
        return steps.init_state(key, params, model_state, tx, extra)

    def refine(state, streams, *, reduce):
        """Strong views of the candidates, the unconfident masked, and what the rule gives."""

        def logits_fn(params, inputs):
            return model.logits(params, state.model_state, inputs)

        weak_views = streams.candidates
        logits = logits_fn(state.params, weak_views.inputs)
        labels, confident = pseudo_labels(logits, options.threshold)
        pseudo_labelled = weak_views._replace(labels=labels, mask=weak_views.mask & confident)
        views = strong(view_keys(state)[1], pseudo_labelled)
        if views.index.shape != weak_views.index.shape:
            raise ValueError(
                f"strong must keep the number of rows; it made {len(views.index)} of "
                f"{len(weak_views.index)}"
            )
        streams = streams._replace(candidates=views)
        return views, *rule.apply(state.extra.rule, state, logits_fn, streams, reduce=reduce)

    def step(state, streams, *, reduce=identity):
        if streams.clean is None:
            raise ValueError("fixmatch needs labelled samples; given streams.clean = None")
        mask = streams.candidates.mask
        labelled = weak(view_keys(state)[0], streams.clean)
        views, targets, arrays, of_rule = refine(state, streams, reduce=reduce)
        inputs = jax.tree.map(lambda *x: jnp.concatenate(x), labelled.inputs, views.inputs)
        key, size = steps.step_key(state, views.index), len(labelled.index)

        def loss_fn(params):
            logits, model_state = model.train(params, state.model_state, inputs, key)
            clean = weighted_cross_entropy(logits[:size], labelled.labels, mask=labelled.mask)
            losses = loss(logits[size:], targets, views)  # 0 where not confident
            value = masked_mean(clean, labelled.mask, reduce=reduce)
            value += options.unlabelled_weight * masked_mean(losses, mask, reduce=reduce)
            metrics = {
                "clean_loss": steps.total(clean, labelled.mask, reduce),
                "candidate_loss": steps.total(losses, mask, reduce),
                "confident": steps.total(views.mask, mask, reduce),
            }
            return value, (model_state, metrics)

        average = state.extra.average
        state, metrics = steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)
        if options.ema:
            average = moving_average(average, state.params, options.ema)
        return state._replace(extra=AverageAndRule(average, arrays)), {**metrics, **of_rule}

    def predict(state, inputs):
        params = state.extra.average if options.ema else state.params
        return model.logits(params, state.model_state, inputs)

    def targets(state, streams):
        return refine(state, streams, reduce=identity)[1]

    return Method(init, step, predict, targets)


def pseudo_labels(logits: jax.Array, threshold: float) -> tuple[jax.Array, jax.Array]:
    """The most probable class, and whether its probability reaches the threshold.

        p = softmax(logits) ,  (one-hot argmax p, max p >= threshold)

    Args:
      logits: f32[B, K].
      threshold: in [0, 1].

    Returns:
      (f32[B, K], bool[B]).
    """
    labels = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[1], dtype=logits.dtype)
    return labels, jnp.max(jax.nn.softmax(logits), -1) >= threshold


def view_keys(state: TrainState) -> jax.Array:
    """key[2] of this step, for the weak views of labelled samples and for the strong views."""
    return jax.random.split(steps.draws_key(state))


SPEC = MethodSpec(
    make, takes=("options", "rule", "loss", "run"), options=Options(), needs=("clean",)
)
