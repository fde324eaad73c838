"""ELR: a sample's own past predictions keep the network from learning its wrong label.

    logits -> average of a sample's own predictions -> cross-entropy + pull towards that average

Source: Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels", NeurIPS
2020; where the paper is silent, the repository shengliu66/ELR.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core import memory, parents, steps
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.tree import identity
from saflex_jax.methods.base import MethodSpec, as_given, no_clean
from saflex_jax.types import Method, Model, RunInfo

MANY = 2**30
LEAST = 1e-4  # probabilities are cut at it and at 1 - LEAST, so that the logarithm stays finite


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ELR.

    Attributes:
      strength: lambda >= 0, of the regulariser. The source uses 3 on CIFAR-10, 7 on CIFAR-100.
      decay: beta in [0, 1), of the averages; the source uses .7 and .9.

    Raises:
      ValueError: a value out of range.
    """

    strength: float = 3.0
    decay: float = 0.7

    def __post_init__(self):
        checks.amount(strength=self.strength)
        checks.decay(decay=self.decay)


def make(
    model: Model,
    tx: optax.GradientTransformation,
    options: Options = Options(),
    *,
    run: RunInfo,
) -> Method:
    """Plain training with a regulariser that pulls towards early predictions.

        t_i <- beta t_i + (1 - beta) p_i ,  p_i = softmax(f(x_i))     from 0, without gradient
        L = mean_i CE(f(x_i), q_i) + lambda mean_i log(1 - <p_i, t_i>)

    The gradient of the second term raises the probability of the classes in t_i. For right labels
    it keeps the pull that cross-entropy loses; for wrong ones it cancels the pull to the label. A
    visit enters t before the loss reads it. p comes from the step's own forward pass, in training
    mode, as in the source, so a step costs as much as a plain one.

    Rows mixed upstream get the mixture of their parents' averages (`core.parents`) and are not
    remembered. Rows with a parent that was never seen unmixed are not regularised, so the pipeline
    must leave some rows unmixed. Trusted samples are not treated differently.

    >>> from saflex_jax.models import MLP, Classifier, from_linen
    >>> run = RunInfo(num_samples=1000, num_classes=10)
    >>> method = make(from_linen(Classifier(MLP(), 10)), optax.sgd(0.1), run=run)

    Args:
      model: see `types.Model`.
      tx: optax transformation.
      options: see `Options`.
      run: gives the number of samples and classes.

    Returns:
      Method. The metric "candidate_loss" is the cross-entropy, "regulariser" the mean logarithm.

    Raises:
      ValueError: clean samples (not supported).
    """

    def init(key, inputs):
        params, model_state = model.init(key, inputs)
        empty = memory.init(run.num_samples, run.num_classes)
        # As if nothing had been said at many visits: the first ones have no plain mean.
        empty = empty._replace(visits=jnp.full_like(empty.visits, MANY))
        return steps.init_state(key, params, model_state, tx, empty)

    def step(state, streams, *, reduce=identity):
        no_clean("elr", streams.clean)
        batch = streams.candidates
        key = steps.step_key(state, batch.index)

        def forward(params):
            return model.train(params, state.model_state, batch.inputs, key)

        # The compiler shares this pass with that of the gradient.
        probs = jax.nn.softmax(jax.lax.stop_gradient(forward(state.params)[0]))
        rows = batch.mask & parents.is_whole(batch)
        kept, _ = memory.update(
            state.extra, batch.index, probs, rows, decay=options.decay, reduce=reduce
        )
        averages = parents.mixture(
            batch, lambda index: memory.recall(kept, index), jnp.zeros_like(probs)
        )

        def loss_fn(params):
            logits, model_state = forward(params)
            losses = weighted_cross_entropy(logits, batch.labels, mask=batch.mask)
            pulls = regulariser(jnp.where(batch.mask[:, None], logits, 0.0), averages)
            value = masked_mean(losses + options.strength * pulls, batch.mask, reduce=reduce)
            metrics = {
                "candidate_loss": steps.total(losses, batch.mask, reduce),
                "regulariser": steps.total(pulls, batch.mask, reduce),
            }
            return value, (model_state, metrics)

        state, metrics = steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)
        return state._replace(extra=kept), metrics

    def predict(state, inputs):
        return model.logits(state.params, state.model_state, inputs)

    return Method(init, step, predict, as_given)


def regulariser(logits: jax.Array, averages: jax.Array) -> jax.Array:
    """Lower the more the network agrees with its past; f32[B], <= 0, nats.

        log(1 - <p, t>) ,  p = clip(softmax(logits), 1e-4, 1 - 1e-4)

    >>> values = regulariser(jnp.zeros((2, 2)), jnp.array([[0.5, 0.5], [0.0, 0.0]]))
    >>> [round(float(x), 3) for x in values]
    [-0.693, -0.0]

    Args:
      logits: f32[B, K].
      averages: t, f32[B, K], >= 0, rows with sum at most one; zeros = nothing is known.

    Raises:
      ValueError: shapes disagree.
    """
    checks.same_shape(logits=logits, averages=averages)
    probs = jnp.clip(jax.nn.softmax(logits), LEAST, 1 - LEAST)
    return jnp.log1p(-jnp.sum(probs * averages, axis=-1))


SPEC = MethodSpec(make, takes=("options", "run"), options=Options())
