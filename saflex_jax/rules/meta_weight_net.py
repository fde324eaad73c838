"""Meta-Weight-Net: a small network, trained on validation samples, maps a loss to a weight.

Source: Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting",
NeurIPS 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.scores import validation_gradient
from saflex_jax.core.steps import total
from saflex_jax.core.tree import axpy, identity, merge, select
from saflex_jax.rules.base import RuleSpec, needs_val, predicate_of
from saflex_jax.rules.schedule import Schedule
from saflex_jax.types import (
    Batch,
    LogitsFn,
    Params,
    PathPredicate,
    Reduce,
    Streams,
    Targets,
)

Push = Callable[[Params], jax.Array]

_L2 = 1e-4  # of V's parameters, in the paper's code


def init_net(key: jax.Array, hidden: int) -> Params:
    """Parameters of V, uniform in +-1/sqrt(fan-in) with the biases, as in the paper's code.

    Args:
      key: PRNG key.
      hidden: H, width of the hidden layer.

    Returns:
      {"hidden": {"kernel" f32[1, H], "bias" f32[H]}, "out": {"kernel" f32[H, 1], "bias" f32[1]}}.
    """

    def layer(key, fan_in, width):
        bound = fan_in**-0.5
        of_kernel, of_bias = jax.random.split(key)
        return {
            "kernel": jax.random.uniform(of_kernel, (fan_in, width), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(of_bias, (width,), minval=-bound, maxval=bound),
        }

    first, second = jax.random.split(key)
    return {"hidden": layer(first, 1, hidden), "out": layer(second, hidden, 1)}


def apply_net(net: Params, losses: jax.Array) -> jax.Array:
    """Weights of samples by their losses, V: one hidden layer, ReLU, sigmoid.

        V(l) = sigmoid(relu(l W_1 + b_1) W_2 + b_2)

    Args:
      net: see `init_net`.
      losses: l, f32[B], nats.

    Returns:
      f32[B], in (0, 1).
    """

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"][None]

    hidden = jax.nn.relu(dense(net["hidden"], losses[:, None]))
    return jax.nn.sigmoid(dense(net["out"], hidden))[:, 0]


def linear_losses(
    logits_fn: LogitsFn,
    params: Params,
    candidates: Batch,
    *,
    predicate: PathPredicate | None = None,
) -> tuple[jax.Array, Push]:
    """Losses l of the candidates, and u -> <grad l_i, u>, both f32[B]; 0 on padding.

    The network runs here, once. Call this outside of branches, so that XLA shares the pass with the
    training gradient.

    Args:
      logits_fn: (params, inputs) -> f32[B, K], evaluation mode.
      params: pytree.
      candidates: Batch of B; l_i is the cross-entropy against its prior label, nats.
      predicate: the parameters that u holds; None = all.
    """

    def losses(part):
        logits = logits_fn(merge(part, params), candidates.inputs)
        return weighted_cross_entropy(logits, candidates.labels, mask=candidates.mask)

    return jax.linearize(losses, select(params, predicate))


def meta_gradient(
    net: Params,
    losses: jax.Array,
    push: Push,
    logits_fn: LogitsFn,
    params: Params,
    streams: Streams,
    *,
    inner_learning_rate: float,
    predicate: PathPredicate | None = None,
    reduce: Reduce = identity,
) -> tuple[Params, jax.Array, jax.Array]:
    """Gradient for V of the validation loss after a gradient step on V's weights.

        theta^ = theta - lr grad mean_i V(l_i) l_i                        (l_i constant inside V)
        u_i = <grad L_val(theta^), grad l_i(theta)>
        d L_val(theta^) / d V = - lr d/dV mean_i V(l_i) u_i

    Exact, without nested backward passes: one backward pass at theta, the validation gradient at
    theta^, one forward-mode product at theta, and V's own gradient.

    Args:
      net: V, see `init_net`.
      losses, push: see `linear_losses`.
      logits_fn: (params, inputs) -> f32[B, K], evaluation mode.
      params: theta.
      streams: candidates and val.
      inner_learning_rate: lr.
      predicate: the parameters that the step moves; None = all.
      reduce: mean over the data-parallel axis.

    Returns:
      (gradient like net, u f32[B], L_val(theta^) f32[] in nats).
    """
    mask, val = streams.candidates.mask, checks.given(val=streams.val)
    selected = select(params, predicate)

    def weighted_mean(net, losses, values):
        return masked_mean(apply_net(net, losses) * values, mask, reduce=reduce)

    (step,) = jax.linear_transpose(push, selected)(jax.grad(weighted_mean, 2)(net, losses, losses))
    ahead = axpy(-inner_learning_rate, reduce(step), selected)
    val_loss, gradient = validation_gradient(
        logits_fn,
        merge(ahead, params),
        val.inputs,
        val.labels,
        mask=val.mask,
        predicate=predicate,
        reduce=reduce,
    )
    utility = push(gradient)
    descent = reduce(jax.grad(weighted_mean)(net, losses, utility))
    return jax.tree.map(lambda d: -inner_learning_rate * d, descent), utility, val_loss


@dataclasses.dataclass(frozen=True)
class MetaWeightNet:
    """The rule of Meta-Weight-Net, a `types.Rule`.

        V <- V + meta_tx(d L_val(theta^) / d V) ,   w_i = V(l_i)              (see `meta_gradient`)

    The weights lie in (0, 1) and, unlike other rules', are not rescaled to mean one: if V shrinks,
    so does the step. Labels stay the prior. The utility is <grad L_val(theta^), grad l_i(theta)>,
    positive if more weight lowers the validation loss. The metric "val_loss" is that of the
    look-ahead theta^, "weight" the mean weight.

    >>> MetaWeightNet(hidden=50, predicate="head").start
    0

    Attributes:
      hidden: width of V.
      inner_learning_rate: lr of the look-ahead, which is plain gradient descent for any training
        optimiser; the default is the paper's initial rate.
      meta_tx: optax transformation for V; a number is the learning rate of the paper's Adam, with
        1e-4 times V's parameters added to the gradient (L2, not decoupled). If too large a rate
        takes all weights to one early, they stay there: the sigmoid has no gradient.
      predicate: the parameters that the look-ahead moves, as a predicate on paths or a path; "" =
        all, as in the paper.
      start: first step on which V learns and weighs; before it the prior, weight one.
      seed: of V's initial parameters.

    Raises:
      ValueError: a value out of range.
    """

    hidden: int = 100
    inner_learning_rate: float = 0.1
    meta_tx: optax.GradientTransformation | float = 1e-3
    predicate: PathPredicate | str = ""
    start: int = 0
    seed: int = 0

    def __post_init__(self):
        checks.whole(1, hidden=self.hidden)
        checks.positive(inner_learning_rate=self.inner_learning_rate)
        checks.whole(start=self.start)
        if isinstance(self.meta_tx, int | float):
            checks.positive(meta_tx=self.meta_tx)

    def _optimizer(self) -> optax.GradientTransformation:
        if isinstance(self.meta_tx, int | float):
            return optax.chain(optax.add_decayed_weights(_L2), optax.adam(self.meta_tx))
        return self.meta_tx

    def init(self, params):
        """(V's parameters, state of its optimiser)."""
        del params
        net = init_net(jax.random.key(self.seed), self.hidden)
        return net, self._optimizer().init(net)

    def apply(self, arrays, state, logits_fn, streams, *, reduce=identity):
        """See `types.Rule`."""
        needs_val("meta_weight_net", streams.val)
        candidates, predicate = streams.candidates, predicate_of(self.predicate)
        mask = candidates.mask
        losses, push = linear_losses(logits_fn, state.params, candidates, predicate=predicate)

        def learn(arrays):
            net, opt_state = arrays
            grads, utility, val_loss = meta_gradient(
                net,
                losses,
                push,
                logits_fn,
                state.params,
                streams,
                inner_learning_rate=self.inner_learning_rate,
                predicate=predicate,
                reduce=reduce,
            )
            updates, opt_state = self._optimizer().update(grads, opt_state, net)
            net = optax.apply_updates(net, updates)
            weights = jnp.where(mask, apply_net(net, losses), 0.0)
            targets = Targets(weights, candidates.labels, utility)
            return targets, (net, opt_state), {"val_loss": (val_loss, jnp.ones(()))}

        targets, arrays, metrics = Schedule(self.start).run(
            state.step, candidates, learn, learn, arrays
        )
        metrics |= {
            "kept": total(targets.weights > 0, mask, reduce),
            "weight": total(targets.weights, mask, reduce),
        }
        return jax.lax.stop_gradient(targets), arrays, metrics


SPEC = RuleSpec(lambda run: MetaWeightNet())
