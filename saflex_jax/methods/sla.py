"""SLA: one softmax over labels and transformations together; its baselines and self-distillation.

    candidates [B] -> views [B M], labels (y, j) -> (weights, labels) -> one step on all views

Source: Lee, Hwang and Shin, "Self-supervised label augmentation via input transformations",
ICML 2020, section 3; where the paper is silent, the repository hankook/SLA.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.augment.transformations import TRANSFORMATIONS, transformed
from saflex_jax.core import steps
from saflex_jax.core.losses import (
    CandidateLoss,
    masked_mean,
    weighted_cross_entropy,
    weighted_soft_cross_entropy,
)
from saflex_jax.core.tree import identity
from saflex_jax.methods.base import no_clean, prior_refiner
from saflex_jax.models import Heads
from saflex_jax.types import Batch, Method, Model, Refiner, Streams

MODES = ("da", "mt", "sla", "sd")
PREDICTIONS = ("single", "aggregated")


def network(
    backbone: nn.Module, num_classes: int, *, mode: str = "sd", transformations: str = "rotation"
) -> nn.Module:
    """The backbone with the heads that a mode needs.

    "class" (K outputs), but for "sla"; "transformation" (M), for "mt"; "joint" (K M), for "sla" and
    "sd". One view alone leaves nothing to distil: "sd" is then "sla".
    """
    mode, views = _mode(mode, transformations)
    heads = {"da": ("class",), "mt": ("class", "transformation"),
             "sla": ("joint",), "sd": ("joint", "class")}[mode]  # fmt: skip
    widths = {"class": num_classes, "transformation": views, "joint": num_classes * views}
    return Heads(backbone, {name: widths[name] for name in heads})


def priors(labels: jax.Array, *, mode: str = "sd", transformations: str = "rotation") -> jax.Array:
    """Prior labels f32[N, K] of samples -> f32[N M, K'] of their views, as a refiner sees them.

    K' = K M for joint labels, else K.
    """
    mode, views = _mode(mode, transformations)
    return joint_labels(labels, views) if mode in ("sla", "sd") else jnp.repeat(labels, views, 0)


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    refiner: Refiner | None = None,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    mode: str = "sd",
    transformations: str = "rotation",
    predict: str = "single",
    sum_views: bool = False,
    temperature: float = 1.0,
    beta: float = 1.0,
) -> Method:
    """Training on all views of every candidate, in one forward pass.

        da:   mean_ij CE(c(x_ij), y_i)
        mt:   mean_ij CE(c(x_ij), y_i) + CE(t(x_ij), j)
        sla:  mean_ij CE(r(x_ij), (y_i, j))
        sd:   sla + mean_i T^2 KL(softmax(s_i / T) || softmax(c(x_i0) / T)) + beta CE(c(x_i0), y_i)
              s_ik = mean_j r(x_ij)_kj , without a gradient

    with heads c (class), t (transformation) and r (joint) of `network`. Every term of a sample or a
    view is weighted by its learned weight. BatchNorm sees the views of all candidates together.

    Args:
      model: of `network` with the same mode and transformations.
      tx: optax transformation.
      refiner: rule for the views' weights and labels; None = the prior. It sees B M candidates with
        the labels of `priors`, whose `index` is that of the sample times M plus j, and the
        validation samples likewise.
      loss: of the views with the refined labels: joint ones ("sla", "sd") or classes.
      mode: "da" (label-invariant augmentation), "mt" (multi-task), "sla" or "sd"
        (self-distillation).
      transformations: name of `augment.transformations.TRANSFORMATIONS`, of M.
      predict: "single": the class head on the sample itself, one forward pass, or, of "sla", the
        joint head's logits of that view (SI). "aggregated": M forward passes; the joint head's
        logits s (AG), or, of "da" and "mt", the logarithm of the mean probability.
      sum_views: joint loss times M: the sum over views in the place of the mean.
      temperature: T > 0, of "sd".
      beta: >= 0, of "sd".

    Raises:
      ValueError: an unknown name, a value out of range, or clean samples (not supported).
    """
    mode, views = _mode(mode, transformations)
    checks.choice(PREDICTIONS, predict=predict)
    checks.positive(temperature=temperature)
    checks.at_least_zero(beta=beta)
    refiner = prior_refiner() if refiner is None else refiner
    joint = mode in ("sla", "sd")
    refined = "joint" if joint else "class"

    def expand(batch: Batch) -> Batch:
        trace = jax.tree.map(lambda x: jnp.repeat(x, views, 0), batch.trace)
        view = jnp.tile(jnp.arange(views), len(batch.index))
        if trace is not None:  # a view's partner is the same view of the sample's
            trace = trace._replace(partner=trace.partner * views + view[:, None])
        return Batch(
            inputs=transformed(batch.inputs, transformations),
            labels=priors(batch.labels, mode=mode, transformations=transformations),
            mask=jnp.repeat(batch.mask, views),
            index=jnp.repeat(batch.index, views) * views + view,
            trace=trace,
        )

    def refine(state, streams, *, reduce):
        """Views of the candidates, and their targets."""
        no_clean("sla", streams.clean)
        val = None if streams.val is None else expand(streams.val)
        seen = Streams(expand(streams.candidates), val)

        def logits_fn(params, inputs):
            return model.logits(params, state.model_state, inputs)[refined]

        found = refiner.apply(state.extra, state, logits_fn, seen, reduce=reduce)
        return seen.candidates, *found

    def step(state, streams, *, reduce):
        candidates, targets, extra, refined_metrics = refine(state, streams, reduce=reduce)
        first = jax.tree.map(lambda x: x[::views], (targets.weights, candidates.mask))
        mean = lambda losses, mask: masked_mean(losses, mask, reduce=reduce)

        def loss_fn(params):
            key = steps.step_key(state, streams.candidates.index)
            outputs, model_state = model.train(params, state.model_state, candidates.inputs, key)
            losses = loss(outputs[refined], targets, candidates)
            metrics = {"candidate_loss": steps.total(losses, candidates.mask, reduce)}
            value = mean(losses, candidates.mask)
            if joint and sum_views:
                value *= views
            if mode == "mt":
                which = jnp.tile(jnp.eye(views), (len(streams.candidates.mask), 1))
                value += mean(
                    weighted_cross_entropy(
                        outputs["transformation"], which, targets.weights, candidates.mask
                    ),
                    candidates.mask,
                )
            if mode == "sd":
                weights, mask = first
                finite = lambda logits: jnp.where(mask[:, None], logits, 0.0)
                student = finite(outputs["class"][::views])
                teacher = jax.lax.stop_gradient(finite(aggregate(outputs["joint"], views)))
                apart = divergence(teacher, student, temperature)
                labels = class_labels(targets.labels[::views], views)
                direct = weighted_cross_entropy(student, labels, weights, mask)
                value += mean(jnp.where(mask, weights * apart, 0.0) + beta * direct, mask)
                metrics["distillation"] = steps.total(apart, mask, reduce)
            return value, (model_state, metrics)

        state, metrics = steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)
        return state._replace(extra=extra), {**metrics, **refined_metrics}

    def predict_fn(state, inputs):
        outputs = lambda x: model.logits(state.params, state.model_state, x)
        if predict == "single":
            seen = outputs(inputs)
            return seen["joint"][:, ::views] if mode == "sla" else seen["class"]
        seen = outputs(transformed(inputs, transformations))
        if joint:
            return aggregate(seen["joint"], views)
        log_probs = jax.nn.log_softmax(seen["class"]).reshape(len(inputs), views, -1)
        return jax.nn.logsumexp(log_probs, 1) - jnp.log(views)

    def targets(state, streams):
        """Of the samples: the mean over views; joint labels without their transformation."""
        _, found, _, _ = refine(state, streams, reduce=identity)
        labels = class_labels(found.labels, views) if joint else found.labels
        of_views = found._replace(labels=labels)
        mean = lambda x: jnp.mean(x.reshape(-1, views, *x.shape[1:]), 1)
        return jax.tree.map(mean, of_views)

    def init(key, inputs):
        params, model_state = model.init(key, transformed(inputs, transformations))
        return steps.init_state(key, params, model_state, tx, refiner.init(params))

    return Method(init, step, predict_fn, targets)


def _mode(mode: str, transformations: str) -> tuple[str, int]:
    """The mode in effect, and M."""
    checks.choice(MODES, mode=mode)
    checks.choice(TRANSFORMATIONS, transformations=transformations)
    views = len(TRANSFORMATIONS[transformations])
    return ("sla" if mode == "sd" and views == 1 else mode), views


def joint_labels(labels: jax.Array, views: int) -> jax.Array:
    """Labels of all views, f32[B, K] -> f32[B M, K M]: class y of view j is label y M + j."""
    (size, classes), which = labels.shape, jnp.eye(views)
    joint = labels[:, None, :, None] * which[None, :, None, :]  # [B, view, class, transformation]
    return joint.reshape(size * views, classes * views)


def class_labels(joint: jax.Array, views: int) -> jax.Array:
    """The marginal over transformations, f32[R, K M] -> f32[R, K]."""
    return jnp.sum(joint.reshape(len(joint), -1, views), -1)


def aggregate(joint: jax.Array, views: int) -> jax.Array:
    """Mean over views of the logits of the view's own transformation (AG).

        s_ik = 1/M sum_j r_(i M + j, k M + j)

    Args:
      joint: f32[B M, K M].
      views: M.

    Returns:
      f32[B, K].
    """
    blocks = joint.reshape(-1, views, joint.shape[1] // views, views)
    return jnp.mean(jnp.diagonal(blocks, axis1=1, axis2=3), -1)


def divergence(teacher: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), logits f32[B, K] -> f32[B], nats."""
    log_p, log_q = (jax.nn.log_softmax(x / temperature) for x in (teacher, student))
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
