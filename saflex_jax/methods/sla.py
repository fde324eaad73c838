"""SLA: one softmax over labels and transformations, with its baselines and self-distillation.

    candidates [B] -> views [B M], labels (y, j) -> (weights, labels) -> one step on all views

Source: Lee, Hwang and Shin, "Self-supervised label augmentation via input transformations",
ICML 2020, section 3; where the paper is silent, the repository hankook/SLA.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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
from saflex_jax.methods.base import MethodSpec, no_clean
from saflex_jax.models import Heads
from saflex_jax.rules import AsGiven
from saflex_jax.types import Batch, Method, Model, Rule, RunInfo, Streams

MODES = ("da", "mt", "sla", "sd")
PREDICTIONS = ("single", "aggregated")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of SLA.

    Attributes:
      mode: "da" (label-invariant augmentation), "mt" (multi-task), "sla" or "sd"
        (self-distillation).
      transformations: name of `augment.transformations.TRANSFORMATIONS`, with M views.
      predict: "single": logits for the sample itself, one forward pass: the class head's or, for
        "sla", the joint head's (SI). "aggregated": M forward passes: the joint head's logits s (AG)
        or, for "da" and "mt", the logarithm of the mean probability.
      sum_views: multiply the joint loss by M: the sum over views instead of the mean.
      temperature: T > 0, of "sd".
      beta: >= 0, of "sd".

    Raises:
      ValueError: an unknown name, or a value out of range.
    """

    mode: str = "sd"
    transformations: str = "rotation"
    predict: str = "single"
    sum_views: bool = False
    temperature: float = 1.0
    beta: float = 1.0

    def __post_init__(self):
        checks.choice(MODES, mode=self.mode)
        checks.choice(TRANSFORMATIONS, transformations=self.transformations)
        checks.choice(PREDICTIONS, predict=self.predict)
        checks.positive(temperature=self.temperature)
        checks.at_least_zero(beta=self.beta)

    @property
    def views(self) -> int:
        """M."""
        return len(TRANSFORMATIONS[self.transformations])

    @property
    def joint(self) -> bool:
        """Whether views have joint labels (class, transformation), K M of them."""
        return self.mode in ("sla", "sd")

    @property
    def distils(self) -> bool:
        """Whether there is a self-distillation loss; it needs more than one view."""
        return self.mode == "sd" and self.views > 1

    @property
    def refined(self) -> str:
        """The head whose labels are refined."""
        return "joint" if self.joint else "class"


def network(backbone: nn.Module, num_classes: int, options: Options = Options()) -> nn.Module:
    """The backbone with the heads that a mode needs.

    "joint" (K M outputs) for "sla" and "sd"; "class" (K) for all but "sla"; "transformation" (M)
    for "mt".
    """
    widths = {}
    if options.joint:
        widths["joint"] = num_classes * options.views
    if options.distils or not options.joint:
        widths["class"] = num_classes
    if options.mode == "mt":
        widths["transformation"] = options.views
    return Heads(backbone, widths)


def priors(labels: jax.Array, options: Options = Options()) -> jax.Array:
    """Prior labels f32[N, K] of samples -> f32[N M, K'] of their views, as a rule sees them.

    K' = K M for joint labels, else K.
    """
    views = options.views
    return joint_labels(labels, views) if options.joint else jnp.repeat(labels, views, 0)


def seen(run: RunInfo, options: Options) -> RunInfo:
    """The run as a rule sees it: views instead of samples, joint labels instead of classes."""
    views = options.views
    labels_a_class, samples_a_label = (views, 1) if options.joint else (1, views)
    counts = run.counts
    if counts is not None:
        counts = np.repeat(counts, labels_a_class) * samples_a_label

    def labels():
        return np.asarray(priors(run.labels(), options))

    return run._replace(
        num_samples=run.num_samples * views,
        num_classes=run.num_classes * labels_a_class,
        num_trusted=run.num_trusted * views,
        counts=counts,
        labels=None if run.labels is None else labels,
        blocks=run.blocks * labels_a_class,
        views=run.views * views,
    )


def make(
    model: Model,
    tx: optax.GradientTransformation,
    options: Options = Options(),
    *,
    rule: Rule | None = None,
    loss: CandidateLoss = weighted_soft_cross_entropy,
) -> Method:
    """Training on all views of every candidate, in one forward pass.

        da:   mean_ij CE(c(x_ij), y_i)
        mt:   mean_ij CE(c(x_ij), y_i) + CE(t(x_ij), j)
        sla:  mean_ij CE(r(x_ij), (y_i, j))
        sd:   sla + mean_i T^2 KL(softmax(s_i / T) || softmax(c(x_i0) / T)) + beta CE(c(x_i0), y_i)
              s_ik = mean_j r(x_ij)_kj , without a gradient

    c (class), t (transformation) and r (joint) are heads of `network`. Every term of a sample or a
    view is multiplied by its learned weight. BatchNorm sees the views of all candidates together.

    >>> from saflex_jax.models import SmallCNN, from_linen
    >>> options = Options(mode="sla", transformations="rotation")
    >>> method = make(from_linen(network(SmallCNN(), 10, options)), optax.sgd(0.1), options)

    Args:
      model: of `network` with the same options.
      tx: optax transformation.
      options: see `Options`.
      rule: for the views' weights and labels; None = as given. It sees B M candidates with the
        labels of `priors` and the `index` M * sample + j, and views of the validation samples;
        `seen` gives the matching run.
      loss: of the views with the refined labels: joint ones ("sla", "sd") or classes.

    Raises:
      ValueError: clean samples (not supported).
    """
    rule = AsGiven() if rule is None else rule
    views = options.views

    def refine(state, streams, *, reduce):
        """Views of the candidates, and what the rule makes of them."""
        no_clean("sla", streams.clean)
        val = None if streams.val is None else expand(streams.val, options)
        shown = Streams(expand(streams.candidates, options), val)

        def logits_fn(params, inputs):
            return model.logits(params, state.model_state, inputs)[options.refined]

        return shown.candidates, *rule.apply(state.extra, state, logits_fn, shown, reduce=reduce)

    def step(state, streams, *, reduce=identity):
        candidates, targets, extra, of_rule = refine(state, streams, reduce=reduce)
        key = steps.step_key(state, streams.candidates.index)

        def loss_fn(params):
            outputs, model_state = model.train(params, state.model_state, candidates.inputs, key)
            losses = loss(outputs[options.refined], targets, candidates)
            metrics = {"candidate_loss": steps.total(losses, candidates.mask, reduce)}
            value = masked_mean(losses, candidates.mask, reduce=reduce)
            if options.joint and options.sum_views:
                value *= views
            if options.mode == "mt":
                value += _transformation_loss(outputs, targets, candidates, views, reduce)
            if options.distils:
                added, metrics["distillation"] = _distillation(
                    outputs, targets, candidates, options, reduce
                )
                value += added
            return value, (model_state, metrics)

        state, metrics = steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)
        return state._replace(extra=extra), {**metrics, **of_rule}

    def targets(state, streams):
        """Of the samples: the mean over views; joint labels without their transformation."""
        _, learned, _, _ = refine(state, streams, reduce=identity)
        labels = class_labels(learned.labels, views) if options.joint else learned.labels
        return jax.tree.map(
            lambda x: jnp.mean(x.reshape(-1, views, *x.shape[1:]), 1),
            learned._replace(labels=labels),
        )

    def init(key, inputs):
        params, model_state = model.init(key, transformed(inputs, options.transformations))
        return steps.init_state(key, params, model_state, tx, rule.init(params))

    return Method(init, step, partial(_predict, model, options), targets)


def expand(batch: Batch, options: Options = Options()) -> Batch:
    """All views of every sample; row i M + j is view j of sample i."""
    views = options.views
    trace = jax.tree.map(lambda x: jnp.repeat(x, views, 0), batch.trace)
    view = jnp.tile(jnp.arange(views), len(batch.index))
    if trace is not None:  # a view's partner is the same view of the sample's
        trace = trace._replace(partner=trace.partner * views + view[:, None])
    return Batch(
        inputs=transformed(batch.inputs, options.transformations),
        labels=priors(batch.labels, options),
        mask=jnp.repeat(batch.mask, views),
        index=jnp.repeat(batch.index, views) * views + view,
        trace=trace,
    )


def _transformation_loss(outputs, targets, candidates, views, reduce):
    """mean_ij w_ij CE(t(x_ij), j), f32[]."""
    which = jnp.tile(jnp.eye(views), (len(candidates.mask) // views, 1))
    losses = weighted_cross_entropy(
        outputs["transformation"], which, targets.weights, candidates.mask
    )
    return masked_mean(losses, candidates.mask, reduce=reduce)


def _distillation(outputs, targets, candidates, options, reduce):
    """The two last terms of "sd" by the weights of view 0: (f32[], metric of the divergence)."""
    views = options.views
    weights, mask = (x[::views] for x in (targets.weights, candidates.mask))
    student = jnp.where(mask[:, None], outputs["class"][::views], 0.0)
    teacher = jnp.where(mask[:, None], aggregate(outputs["joint"], views), 0.0)
    apart = divergence(jax.lax.stop_gradient(teacher), student, options.temperature)
    labels = class_labels(targets.labels[::views], views)
    direct = weighted_cross_entropy(student, labels, weights, mask)
    losses = jnp.where(mask, weights * apart, 0.0) + options.beta * direct
    return masked_mean(losses, mask, reduce=reduce), steps.total(apart, mask, reduce)


def _predict(model, options, state, inputs):
    """See `Options.predict`."""
    if options.predict == "single":
        outputs = model.logits(state.params, state.model_state, inputs)
        return outputs["class"] if "class" in outputs else outputs["joint"][:, :: options.views]
    views = transformed(inputs, options.transformations)
    outputs = model.logits(state.params, state.model_state, views)
    if options.joint:
        return aggregate(outputs["joint"], options.views)
    log_probs = jax.nn.log_softmax(outputs["class"]).reshape(len(inputs), options.views, -1)
    return jax.nn.logsumexp(log_probs, 1) - jnp.log(options.views)


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


SPEC = MethodSpec(
    make, takes=("options", "rule", "loss"), options=Options(), network=network, seen=seen
)
