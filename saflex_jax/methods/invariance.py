"""Invariance-constrained training: a bound on augmented samples' loss sets their weight.

    proposals -> Metropolis-Hastings, hard ones more often -> one step on clean and hard samples
    -> one step of the multiplier

Source: Hounie, Chamon and Ribeiro, "Automatic Data Augmentation via Invariance-Constrained
Learning", ICML 2023; where the paper is silent, the repository ihounie/daug.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.augment import Augment, sample_keys
from saflex_jax.core import steps
from saflex_jax.core.losses import CandidateLoss, masked_mean, weighted_soft_cross_entropy
from saflex_jax.core.targets import prior_targets
from saflex_jax.core.tree import identity, zeros
from saflex_jax.methods.base import MethodSpec, as_given, no_clean, pipeline
from saflex_jax.types import Batch, Method, Model


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of invariance-constrained training.

    Attributes:
      augment: p, an augmentation that keeps the number of rows, or its text (`augment.parse`).
      epsilon: the bound, >= 0, nats. The source uses .2 to 2.1, by data set and network.
      dual_rate: learning rate of the multiplier, >= 0.
      mh_steps: proposals per sample and step, >= 1; each costs a forward pass. 1 = plain
        augmentation.

    Raises:
      ValueError: a value out of range, or a text that names no pipeline.
    """

    augment: Augment | str = "trivialaugment"
    epsilon: float = 0.6
    dual_rate: float = 1e-4
    mh_steps: int = 2

    def __post_init__(self):
        pipeline(self.augment)
        checks.amount(epsilon=self.epsilon, dual_rate=self.dual_rate)
        checks.whole(1, mh_steps=self.mh_steps)


def make(
    model: Model,
    tx: optax.GradientTransformation,
    options: Options = Options(),
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
) -> Method:
    """Training on the given candidates, under a bound on the loss of their hard variants.

        min_theta E CE(f(x), q)   subject to   E_(g ~ pi) CE(f(g x), q) <= epsilon
        pi(g) ~ p(g) CE(f(g x), q)                        of every sample, p being the proposals

        h = mean_i CE(f(g_i x_i), q_i)                    with g_i of `metropolis_hastings`
        theta <- theta + tx(grad (mean_i CE(f(x_i), q_i) + gamma h))
        gamma <- max(gamma + dual_rate (h - epsilon), 0) ,  gamma_0 = 0

    If the bound is slack, gamma falls to zero, which leaves plain training: running statistics come
    from the clean samples' pass, and hard samples have their own pass and batch statistics.

    Chains compare losses in evaluation mode. In training mode a sample's move would depend on the
    proposals for other samples (batch statistics) and on noise (dropout), and refused proposals
    would enter the running statistics.

    >>> from saflex_jax.models import Classifier, SmallCNN, from_linen
    >>> options = Options(augment="shift(2)", epsilon=0.5)
    >>> method = make(from_linen(Classifier(SmallCNN(), 10)), optax.sgd(0.1), options)

    Args:
      model: see `types.Model`.
      tx: optax transformation.
      options: see `Options`.
      loss: of candidates and proposals (see `core.losses`), >= 0, instead of the cross-entropy.

    Returns:
      Method; `extra` is gamma, f32[]. The metric "gamma" is its value after the step, "acceptance"
      the share of accepted proposals, the first not counted.

    Raises:
      ValueError: an augmentation that changes the number of rows, or clean samples (the candidates
        are the clean samples here).
    """
    propose = pipeline(options.augment)

    def init(key, inputs):
        return steps.init_state(key, *model.init(key, inputs), tx, jnp.zeros(()))

    def losses_of(logits, batch):
        return loss(logits, prior_targets(batch.labels, batch.mask), batch)

    def step(state, streams, *, reduce=identity):
        no_clean("invariance", streams.clean)
        batch, gamma = streams.candidates, state.extra

        def proposal_losses(proposed):
            logits = model.logits(state.params, state.model_state, proposed.inputs)
            return losses_of(logits, proposed)

        hard, moves = metropolis_hastings(
            steps.draws_key(state),
            batch,
            propose=propose,
            losses_of=proposal_losses,
            steps=options.mh_steps,
        )
        moved, count = steps.total(moves, batch.mask, reduce)
        clean_key = steps.step_key(state, batch.index)
        hard_key = jax.random.fold_in(clean_key, 1)

        def loss_fn(params):
            logits, model_state = model.train(params, state.model_state, batch.inputs, clean_key)
            clean_losses = losses_of(logits, batch)
            logits, _ = model.train(params, state.model_state, hard.inputs, hard_key)
            hard_losses = losses_of(logits, hard)
            clean, bounded = (
                masked_mean(losses, batch.mask, reduce=reduce)
                for losses in (clean_losses, hard_losses)
            )
            excess = reduce(bounded) - options.epsilon
            raised = jax.nn.relu(gamma + options.dual_rate * excess)
            metrics = {
                "clean_loss": steps.total(clean_losses, batch.mask, reduce),
                "hard_loss": steps.total(hard_losses, batch.mask, reduce),
                "gamma": (raised, jnp.ones(())),
                "acceptance": (moved, count * (options.mh_steps - 1)),
            }
            return clean + gamma * bounded, (model_state, metrics)

        state, metrics = steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)
        return state._replace(extra=metrics["gamma"][0]), metrics

    def predict(state, inputs):
        return model.logits(state.params, state.model_state, inputs)

    return Method(init, step, predict, as_given)


def metropolis_hastings(
    key: jax.Array,
    batch: Batch,
    *,
    propose: Augment,
    losses_of: Callable[[Batch], jax.Array],
    steps: int,
) -> tuple[Batch, jax.Array]:
    """The end of each sample's Metropolis-Hastings chain over augmentations with large losses.

        g_1 = proposal 1
        g_s = proposal s  with probability min(1, l(proposal s) / l(g_(s-1))) ,  else g_(s-1)

    Proposals are independent of the chain, so its stationary law is proportional to p(g) l(g).
    A sample's draws depend on the key and its index alone.

    Args:
      key: PRNG key.
      batch: Batch of B.
      propose: (key, batch) -> Batch of B.
      losses_of: Batch of B -> f32[B], >= 0.
      steps: proposals, >= 1.

    Returns:
      (Batch of B with the chains' rows, f32[B] moves to another proposal, at most steps - 1).

    Raises:
      ValueError: `propose` changes the number of rows.

    Source: the repository's per-sample variant, `train_pd_batch`.
    """
    shapes = jax.eval_shape(propose, key, batch)
    if shapes.index.shape != batch.index.shape:
        raise ValueError(
            f"augment must keep the number of rows; it made {shapes.index.shape[0]} of "
            f"{batch.index.shape[0]}"
        )
    # A loss below all others: every chain moves to its first proposal.
    start = zeros(shapes), jnp.full(batch.index.shape, -1.0)

    def move(chain, key):
        proposal_key, move_key = jax.random.split(key)
        proposed = propose(proposal_key, batch)
        losses = losses_of(proposed)
        # In (0, 1], so that no chain leaves a positive loss for zero.
        uniform = 1 - jax.vmap(jax.random.uniform)(sample_keys(move_key, batch))
        moves = ~(uniform * chain[1] > losses)  # also to NaN, which must reach the loss

        def keep(new, old):
            return jnp.where(moves.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return jax.tree.map(keep, (proposed, losses), chain), moves

    (chosen, _), moves = jax.lax.scan(move, start, jax.random.split(key, steps))
    return chosen, jnp.sum(moves[1:], axis=0, dtype=jnp.float32)


SPEC = MethodSpec(make, takes=("options", "loss"), options=Options())
