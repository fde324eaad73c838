"""DivideMix: two networks divide the samples for each other and guess the labels of one part.

    losses of all samples -> mixture of two Gaussians -> probability that each given label is right
    -> likely ones refined, the others guessed -> mixed rows -> one step of both networks

Source: Li, Socher and Hoi, "DivideMix: Learning with Noisy Labels as Semi-supervised Learning",
ICLR 2020; where the paper is silent, the repository LiJunnan1992/DivideMix.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.augment.mixing import mixup
from saflex_jax.core import memory, parents, steps
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.memory import Memory, TopMemory
from saflex_jax.core.posterior import SHARPEST, sharpened
from saflex_jax.core.targets import prior_targets
from saflex_jax.core.tree import identity
from saflex_jax.methods.base import MethodSpec, no_clean
from saflex_jax.methods.co_teaching import OTHER, PREDICTIONS, init_both, predict_by
from saflex_jax.types import Method, Model, RunInfo

EM_STEPS = 10
LEAST_VARIANCE = 5e-4  # of losses that are scaled to [0, 1]
LEAST = 1e-6  # a probability of zero would say that nothing is known


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of DivideMix; the defaults suit an unknown share of wrong labels.

    Attributes:
      warmup: epochs of plain training before the first division, >= 0; the source uses 10, and 30
        on CIFAR-100.
      ramp: epochs from there until guessed labels have their full weight, > 0.
      unlabelled_weight: of the guessed labels' loss, >= 0. The source sets it by the kind and share
        of wrong labels: 0 for few or asymmetric ones, up to 150. With 0, guessed labels still train
        through mixed rows.
      threshold: least probability at which a given label counts as right, in [0, 1].
      temperature: of refined and guessed labels, at least 1/8.
      alpha: of the mixing's Beta(alpha, alpha), > 0.
      decay: in [0, 1), of the average of a sample's losses; 0 = the last visit's. The source uses
        the last epoch's, and the mean of five where nearly all labels are wrong.
      predict: "mean": the logarithm of the mean probability of both networks, two forward passes,
        which the source reports. "a": the logits of network a.

    Raises:
      ValueError: an unknown name, or a value out of range.
    """

    warmup: float = 10.0
    ramp: float = 16.0
    unlabelled_weight: float = 0.0
    threshold: float = 0.5
    temperature: float = 0.5
    alpha: float = 4.0
    decay: float = 0.9
    predict: str = "mean"

    def __post_init__(self):
        checks.amount(warmup=self.warmup, unlabelled_weight=self.unlabelled_weight)
        checks.positive(ramp=self.ramp, alpha=self.alpha)
        checks.within(1 / SHARPEST, math.inf, temperature=self.temperature)  # see `sharpened`
        checks.fraction(threshold=self.threshold)
        checks.decay(decay=self.decay)
        checks.choice(PREDICTIONS, predict=self.predict)


class Mixture(NamedTuple):
    """Two Gaussians over losses, the lower one first.

    Attributes:
      weight, mean, variance: f32[2]; f32[M, 2] of M mixtures.
    """

    weight: jax.Array
    mean: jax.Array
    variance: jax.Array


class Division(NamedTuple):
    """`TrainState.extra` of DivideMix.

    Attributes:
      losses: of each sample under network a and under b, [N, 2].
      mixtures: of them, one for each network.
    """

    losses: Memory | TopMemory
    mixtures: Mixture

    def right(self, index: jax.Array) -> jax.Array:
        """Probability that given labels of samples are right, f32[..., 2], by networks a and b.

        0 where nothing is known, otherwise at least LEAST.
        """
        losses = memory.recall(self.losses, index)
        lower = jax.vmap(probability_of_lower, in_axes=(-1, 0), out_axes=-1)
        right = jnp.maximum(lower(losses, self.mixtures), LEAST)
        seen = self.losses.visits.at[index].get(mode="fill", fill_value=0) > 0
        return jnp.where(seen[..., None], right, 0.0)


def make(
    model: Model, tx: optax.GradientTransformation, options: Options = Options(), *, run: RunInfo
) -> Method:
    """Two networks that divide the samples for each other.

        w^a_i = P(lower Gaussian | l^a_i) ,  l^a_i = CE(a(x_i), q_i)     by `fit` on all losses
        y^a_i = sharpened(w^b_i q_i + (1 - w^b_i) p^a_i)    where w^b_i >= threshold: labelled for a
        y^a_i = sharpened((p^a_i + p^b_i) / 2)              elsewhere: unlabelled for a
        x'_i, y'_i = s_i x_i + (1 - s_i) x_j , likewise     j any row of the batch, s_i >= 1/2
        L^a = mean_labelled CE(a(x'), y') + v mean_unlabelled |softmax a(x') - y'|^2 / K
              + KL(uniform || mean softmax a(x'))

    and L^b with a and b exchanged; L = L^a + L^b. v grows from 0 to `unlabelled_weight`. Losses l
    and probabilities p come from evaluation mode, on unmixed rows, without gradient. During the
    warm-up L^a is the cross-entropy of the given rows and labels.

    Differences from the source: losses are remembered from visits (`core.memory`), without an extra
    pass over the data set per epoch; a batch has its natural shares of labelled and unlabelled
    rows, not equal ones; a sample has one view, not two; the warm-up has no penalty for asymmetric
    noise.

    Rows mixed upstream are not remembered, and their w is the mixture of their parents'
    (`core.parents`); rows with an unseen parent count as right. Trusted samples are not treated
    differently. Under pmap a device mixes its own rows and averages the last term over them.

    A step costs two plain ones and two forward passes.

    >>> from saflex_jax.models import MLP, Classifier, from_linen
    >>> run = RunInfo(num_samples=1000, num_classes=10, steps_per_epoch=10)
    >>> method = make(from_linen(Classifier(MLP(), 10)), optax.sgd(0.1), run=run)

    Args:
      model: see `types.Model`.
      tx: optax transformation of {"a": parameters, "b": parameters}.
      options: see `Options`.
      run: gives the number of samples and `steps_per_epoch`, which must be known.

    Returns:
      Method. "loss" is L; the other metrics are means over the networks: "candidate_loss" is the
      cross-entropy of labelled rows, "kept" their share. `targets` are those of network a before
      rows are mixed, with the utility 2 w - 1.

    Raises:
      ValueError: steps per epoch unknown; clean samples (not supported).
    """
    if not run.steps_per_epoch:
        raise ValueError("dividemix needs run.steps_per_epoch, its clock; given 0")
    every = max(1, round(run.steps_per_epoch))
    warm = round(options.warmup * run.steps_per_epoch)
    mix = mixup(options.alpha)

    def init(key, inputs):
        unknown = Mixture(*(jnp.full((2, 2), x) for x in (0.5, 0.0, 1.0)))
        extra = Division(memory.init(run.num_samples, 2), unknown)
        return steps.init_state(key, *init_both(model, key, inputs), tx, extra)

    def remembered(state, logits, batch, reduce) -> Division:
        """The losses with this visit, and their mixtures, fitted anew where an epoch begins."""
        each = [weighted_cross_entropy(logits[n], batch.labels, mask=batch.mask) for n in OTHER]
        rows, old = batch.mask & parents.is_whole(batch), state.extra
        losses, _ = memory.update(
            old.losses, batch.index, jnp.stack(each, 1), rows, decay=options.decay, reduce=reduce
        )

        def fitted():
            return jax.vmap(fit, in_axes=(1, None))(losses.mean, losses.visits > 0)

        mixtures = jax.lax.cond(state.step % every == 0, fitted, lambda: old.mixtures)
        return Division(losses, mixtures)

    def divided(state, batch, reduce):
        """What is known after this visit; network -> (targets of the rows, which are labelled)."""
        logits = {
            name: model.logits(state.params[name], state.model_state[name], batch.inputs)
            for name in OTHER
        }
        division = remembered(state, logits, batch, reduce)
        right = parents.mixture(batch, division.right, jnp.ones((len(batch.index), 2)))
        probs = {name: jax.nn.softmax(z) for name, z in logits.items()}
        parts = {}
        for name, w in {"a": right[:, 1], "b": right[:, 0]}.items():  # by the other network
            labels, labelled = refined(name, w, batch.labels, probs, options)
            # While it warms up, all is as given.
            labels = jnp.where(state.step >= warm, labels, batch.labels)
            targets = prior_targets(labels, batch.mask)._replace(utility=2 * w - 1)
            parts[name] = targets, labelled | (state.step < warm)
        return jax.lax.stop_gradient((division, parts))

    def step(state, streams, *, reduce=identity):
        no_clean("dividemix", streams.clean)
        batch, started = streams.candidates, state.step >= warm
        division, parts = divided(state, batch, reduce)
        ramp = (state.step - warm) / (options.ramp * run.steps_per_epoch)
        weight = options.unlabelled_weight * jnp.clip(ramp, 0.0, 1.0)
        noise = dict(zip(OTHER, jax.random.split(steps.step_key(state, batch.index))))
        draws = dict(zip(OTHER, jax.random.split(steps.draws_key(state))))

        def loss_of(name, params):
            targets, labelled = parts[name]
            given = batch._replace(labels=targets.labels)
            mixed = mix(draws[name], given)
            inputs, labels = jax.tree.map(
                partial(jnp.where, started),
                *((rows.inputs, rows.labels) for rows in (mixed, given)),
            )
            logits, model_state = model.train(params, state.model_state[name], inputs, noise[name])
            logits = jnp.where(batch.mask[:, None], logits, 0.0)
            losses = weighted_cross_entropy(logits, labels, mask=batch.mask)
            probs = jax.nn.softmax(logits)
            square, rows = jnp.mean((probs - labels) ** 2, axis=-1), batch.mask & labelled
            value = masked_mean(losses, rows, reduce=reduce)
            value += weight * masked_mean(square, batch.mask & ~labelled, reduce=reduce)
            value += jnp.where(started, imbalance(probs, batch.mask), 0.0)
            metrics = {
                "candidate_loss": steps.total(losses, rows, reduce),
                "kept": steps.total(labelled, batch.mask, reduce),
            }
            return value, model_state, metrics

        def loss_fn(params):
            a, b = (loss_of(name, params[name]) for name in OTHER)
            (value_a, state_a, metrics_a), (value_b, state_b, metrics_b) = a, b
            metrics = jax.tree.map(jnp.add, metrics_a, metrics_b)
            return value_a + value_b, ({"a": state_a, "b": state_b}, metrics)

        state, metrics = steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)
        return state._replace(extra=division), metrics

    def predict(state, inputs):
        return predict_by(options.predict, model, state, inputs)

    def targets(state, streams):
        return divided(state, streams.candidates, identity)[1]["a"][0]

    return Method(init, step, predict, targets)


def fit(losses: jax.Array, seen: jax.Array, *, steps: int = EM_STEPS) -> Mixture:
    """Two Gaussians of the losses, by expectation-maximisation.

    Losses are scaled to [0, 1]; a scaled loss is the first guess of its probability to be of the
    upper Gaussian. A variance is at least LEAST_VARIANCE on that scale.

    >>> losses = jnp.array([0.1, 0.2, 0.3, 4.0, 4.2, 9.9])
    >>> [round(float(m), 2) for m in fit(losses, seen=jnp.arange(6) < 5).mean]
    [0.2, 4.1]

    Args:
      losses: f32[N].
      seen: bool[N]; False samples do not count.
      steps: number of iterations.

    Source: Li et al. 2020, section 3.1; steps and least variance are its code's.
    """
    lowest = jnp.min(losses, initial=jnp.inf, where=seen)
    width = jnp.max(losses, initial=-jnp.inf, where=seen) - lowest
    width = jnp.where(width > 0, width, 1.0)
    scaled = jnp.where(seen, (losses - lowest) / width, 0.0)

    def maximised(upper):
        of_each = jnp.where(seen[None], jnp.stack([1 - upper, upper]), 0.0)
        number = jnp.sum(of_each, axis=1)
        total = jnp.maximum(number, jnp.finfo(number.dtype).tiny)
        mean = jnp.sum(of_each * scaled[None], axis=1) / total
        square = jnp.sum(of_each * (scaled[None] - mean[:, None]) ** 2, axis=1) / total
        return Mixture(number / jnp.sum(number), mean, square + LEAST_VARIANCE)

    def iterate(_, mixture):
        return maximised(1 - probability_of_lower(scaled, mixture))

    mixture = jax.lax.fori_loop(0, steps, iterate, maximised(scaled))
    order = jnp.argsort(mixture.mean)
    weight, mean, variance = (x[order] for x in mixture)
    return Mixture(weight, lowest + width * mean, width**2 * variance)


def probability_of_lower(losses: jax.Array, mixture: Mixture) -> jax.Array:
    """Probability that losses f32[...] are of the first Gaussian of a mixture.

    >>> mixture = Mixture(jnp.full(2, 0.5), jnp.array([0.0, 4.0]), jnp.ones(2))
    >>> probability_of_lower(jnp.array([0.0, 2.0]), mixture).round(3).tolist()
    [1.0, 0.5]
    """

    def log_density(weight, mean, variance):
        return jnp.log(weight) - 0.5 * (jnp.log(variance) + (losses - mean) ** 2 / variance)

    lower, upper = jax.vmap(log_density)(*mixture)
    return jax.nn.sigmoid(lower - upper)


def refined(
    name: str, right: jax.Array, prior: jax.Array, probs: dict[str, jax.Array], options: Options
) -> tuple[jax.Array, jax.Array]:
    """Labels for a network, f32[B, K], and which rows count as labelled, bool[B].

        w_i >= threshold: sharpened(w_i q_i + (1 - w_i) p_i) ,  else: sharpened((p^a_i + p^b_i) / 2)

    Args:
      name: of the network, "a" or "b".
      right: w, f32[B], by the other network.
      prior: q, f32[B, K].
      probs: network -> what it predicts, f32[B, K].
      options: of which threshold and temperature are read.
    """
    own = right[:, None] * prior + (1 - right[:, None]) * probs[name]
    labelled = right >= options.threshold
    labels = jnp.where(labelled[:, None], own, (probs["a"] + probs["b"]) / 2)
    return sharpened(labels, 1 / options.temperature), labelled


def imbalance(probs: jax.Array, mask: jax.Array) -> jax.Array:
    """How far the mean prediction of the rows is from uniform: KL(uniform || mean p), f32[], nats.

    >>> round(float(imbalance(jnp.array([[1.0, 0.0], [0.8, 0.2]]), jnp.ones(2, bool))), 2)
    0.51

    Args:
      probs: p, f32[B, K]; a mean is cut at 1e-7.
      mask: bool[B]; where all are masked it is 0.
    """
    number = jnp.sum(mask)
    mean = jnp.sum(jnp.where(mask[:, None], probs, 0.0), axis=0) / jnp.maximum(number, 1)
    mean = jnp.where(number > 0, jnp.clip(mean, 1e-7, 1.0), 1 / probs.shape[1])
    return -jnp.mean(jnp.log(mean * probs.shape[1]))


SPEC = MethodSpec(make, takes=("options", "run"), options=Options(), posterior=True)
