"""ELR: a sample's own past predictions keep the network from learning its wrong label.

    logits -> average of a sample's own predictions -> cross-entropy + pull towards that average

With a rule, the cross-entropy is of the rule's weights and labels, and the pull is as strong as the
rule finds labels wrong. ELR keeps what a wrong label would overwrite, a rule finds which labels are
wrong: on pretrained features SAFLEX inside ELR does better than either (docs/noisy_labels.md).

Source: Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels", NeurIPS
2020; where the paper is silent, the repository shengliu66/ELR.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core import memory, parents, steps
from saflex_jax.core.losses import weighted_soft_cross_entropy
from saflex_jax.core.memory import Memory, TopMemory
from saflex_jax.core.tree import above_zero, identity
from saflex_jax.methods import supervised
from saflex_jax.methods.base import MethodSpec, no_clean
from saflex_jax.rules import AsGiven
from saflex_jax.types import Batch, Method, Model, PyTree, Reduce, Rule, RunInfo, Targets

MANY = 2**30
LEAST = 1e-4  # probabilities are cut at it and at 1 - LEAST, so that the logarithm stays finite


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ELR.

    Attributes:
      strength: lambda >= 0, of the regulariser. The source uses 3 on CIFAR-10, 7 on CIFAR-100.
      decay: beta in [0, 1), of the averages; the source uses .7 and .9.
      enough: >= 0, share of labels that a rule must find wrong for the full strength; 0: s = 1.

    Raises:
      ValueError: a value out of range.
    """

    strength: float = 3.0
    decay: float = 0.7
    enough: float = 0.1

    def __post_init__(self):
        checks.amount(strength=self.strength, enough=self.enough)
        checks.decay(decay=self.decay)


class PastAndRule(NamedTuple):
    """`TrainState.extra` of ELR.

    Attributes:
      past: averages of each sample's own predictions, f32[N, K].
      rule: the rule's arrays.
    """

    past: Memory | TopMemory
    rule: PyTree


def make(
    model: Model,
    tx: optax.GradientTransformation,
    options: Options = Options(),
    *,
    rule: Rule | None = None,
    run: RunInfo,
) -> Method:
    """Training with a regulariser that pulls towards early predictions, on a rule's targets.

        t_i <- beta t_i + (1 - beta) p_i ,  p_i = softmax(f(x_i))     from 0, without gradient
        L = mean_i w_i CE(f(x_i), y_i) + lambda s mean_i log(1 - <p_i, t_i>) ,   w, y by the rule
        s = min(1, mean_i sum_k (q_ik - w_i y_ik)_+ / enough)     1 with labels as given

    The gradient of the second term raises the probability of the classes in t_i. For right labels
    it keeps the pull that cross-entropy loses; for wrong ones it cancels the pull to the label, and
    a row without weight learns from it alone. A visit enters t before the loss reads it. p comes
    from the step's own forward pass, in training mode, as in the source, so without a rule a step
    costs as much as a plain one.

    s asks how much of the given labels q the rule moves elsewhere in this batch: where it finds
    none wrong, there is nothing to keep, and this is plain training (if `enough` is not 0).

    Rows mixed upstream get the mixture of their parents' averages (`core.parents`) and are not
    remembered. Rows with a parent that was never seen unmixed are not regularised, so the pipeline
    must leave some rows unmixed. Trusted samples are not treated differently: a rule that compares
    them with the others needs both trained on alike.

    >>> from saflex_jax.models import MLP, Classifier, from_linen
    >>> from saflex_jax.rules import RULES
    >>> run = RunInfo(num_samples=1000, num_classes=10, num_trusted=50)
    >>> model = from_linen(Classifier(MLP(), 10))
    >>> method = make(model, optax.sgd(0.1), rule=RULES["saflex"].make(run), run=run)

    Args:
      model: see `types.Model`.
      tx: optax transformation.
      options: see `Options`.
      rule: what to train on (see `saflex_jax.rules`); None = as given: the source's method, s = 1.
      run: gives the number of samples and classes.

    Returns:
      Method. The metric "candidate_loss" is the loss of the candidates with its regulariser,
      "regulariser" the mean logarithm.

    Raises:
      ValueError: clean samples (not supported).
    """
    plain = supervised.make(model, tx, rule)
    learns = not (rule is None or isinstance(rule, AsGiven))

    def init(key, inputs):
        empty = memory.init(run.num_samples, run.num_classes)
        # As if nothing had been said at many visits: the first ones have no plain mean.
        empty = empty._replace(visits=jnp.full_like(empty.visits, MANY))
        state = plain.init(key, inputs)
        return state._replace(extra=PastAndRule(empty, state.extra))

    def step(state, streams, *, reduce=identity):
        no_clean("elr", streams.clean)
        batch = streams.candidates
        # The compiler shares this pass with that of the gradient.
        key = steps.step_key(state, batch.index)
        logits, _ = model.train(state.params, state.model_state, batch.inputs, key)
        logits = jnp.where(batch.mask[:, None], jax.lax.stop_gradient(logits), 0.0)
        probs = jax.nn.softmax(logits)
        past, _ = memory.update(
            state.extra.past,
            batch.index,
            probs,
            batch.mask & parents.is_whole(batch),
            decay=options.decay,
            reduce=reduce,
        )
        averages = parents.mixture(
            batch, lambda index: memory.recall(past, index), jnp.zeros_like(probs)
        )

        def loss(logits, targets, candidates):
            losses = weighted_soft_cross_entropy(logits, targets, candidates)
            pulls = regulariser(jnp.where(candidates.mask[:, None], logits, 0.0), averages)
            strength = options.strength
            if learns:
                found = moved(targets, candidates, reduce=reduce)
                share = found / jnp.maximum(options.enough, jnp.finfo(found.dtype).tiny)
                strength *= jnp.where(found < options.enough, share, 1.0)
            return losses + jnp.where(candidates.mask, strength * pulls, 0.0)

        of_rule = state._replace(extra=state.extra.rule)
        regularised = supervised.make(model, tx, rule, loss=loss)
        state, metrics = regularised.step(of_rule, streams, reduce=reduce)
        pulls = regulariser(logits, averages)
        metrics |= {"regulariser": steps.total(pulls, batch.mask, reduce)}
        return state._replace(extra=PastAndRule(past, state.extra)), metrics

    def targets(state, streams):
        return plain.targets(state._replace(extra=state.extra.rule), streams)

    return Method(init, step, plain.predict, targets)


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


def moved(targets: Targets, candidates: Batch, *, reduce: Reduce = identity) -> jax.Array:
    """How much of its given label a row loses to a rule on average, f32[] in [0, 1].

        mean_i sum_k (q_ik - w_i y_ik)_+

    >>> prior = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> batch = Batch(inputs=(), labels=prior, mask=jnp.ones(2, bool), index=jnp.arange(2))
    >>> float(moved(Targets(jnp.ones(2), jnp.eye(2)[::-1], jnp.zeros(2)), batch))
    1.0

    Args:
      targets: w and y, of B rows.
      candidates: q, Batch of B.
      reduce: mean over the data-parallel axis.
    """
    left = jnp.maximum(candidates.labels - targets.weights[:, None] * targets.labels, 0.0)
    lost, count = steps.total(jnp.sum(left, axis=-1), candidates.mask, reduce)
    return lost / above_zero(count)


SPEC = MethodSpec(make, takes=("options", "rule", "run"), options=Options())
