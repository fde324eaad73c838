"""AdAutoMix: AutoMix with several images and a mix block that sometimes works against the network.

    maps of the momentum network -> masks -> mixed candidates -> (weights, labels) -> one step of
    network and mix block together, each on its own loss -> momentum network

Source: Qin et al., "Adversarial AutoMixup", ICLR 2024; where the paper is silent, the repository
JinXins/Adversarial-AutoMixup.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core import steps
from saflex_jax.core.losses import (
    CandidateLoss,
    masked_mean,
    weighted_cross_entropy,
    weighted_soft_cross_entropy,
)
from saflex_jax.core.tree import identity, moving_average
from saflex_jax.methods import mixtures
from saflex_jax.methods.base import MethodSpec, no_clean
from saflex_jax.methods.mixtures import (
    Mixture,
    MixtureOptions,
    MomentumAndRule,
    Networks,
    q_of,
)
from saflex_jax.models import AdversarialMixBlock, AdversarialMixBlockOptions
from saflex_jax.rules import AsGiven
from saflex_jax.types import Method, Model, Rule, RunInfo


@dataclasses.dataclass(frozen=True)
class Options(MixtureOptions):
    """Options of AdAutoMix.

    Attributes:
      alpha, lam_margin, momentum, momentum_end, predict, stage: see `mixtures.MixtureOptions`.
      images: n >= 2, images in a mixture.
      adversarial_every: >= 1; on every such step the block works against the network.
      adversarial_share: a, share of the network's loss in the block's loss on these steps.
      linear_share: b, share of plain mixtures in the loss of head "one".
      block: options of `AdversarialMixBlock`, or a module (see `models.mix_block`).

    Raises:
      ValueError: an unknown name, or a value out of range.
    """

    alpha: float = 1.0
    lam_margin: float = 0.03
    images: int = 3
    adversarial_every: int = 2
    adversarial_share: float = 0.3
    linear_share: float = 0.5
    block: AdversarialMixBlockOptions | nn.Module = AdversarialMixBlockOptions()

    def __post_init__(self):
        super().__post_init__()
        checks.whole(2, images=self.images)
        checks.whole(1, adversarial_every=self.adversarial_every)
        checks.fraction(adversarial_share=self.adversarial_share, linear_share=self.linear_share)

    def make_block(self) -> nn.Module:
        """The mix block."""
        return self.block if isinstance(self.block, nn.Module) else AdversarialMixBlock(self.block)


def network(backbone: nn.Module, num_classes: int, options: Options = Options()) -> nn.Module:
    """The backbone with heads "one" and "mix" and a feature map; see `mixtures.network`."""
    return mixtures.network(backbone, num_classes, options)


def make(
    model: Model,
    tx: optax.GradientTransformation,
    options: Options = Options(),
    *,
    rule: Rule | None = None,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    run: RunInfo | None = None,
) -> Method:
    """AdAutoMix: like `automix.make`, with mixtures of n images and these losses.

        L_phi = CE(k(M x), l y) ; on every `adversarial_every`-th step, c being a cosine of logits,
                -a CE(k(M x), l y) + (1 - a) mean sum_i l_i c(k(M x), k(x_p(i)))
        L_q   = CE(q(N x), l y) + (1 - b) CE(q(x), y) + b CE(q(sum_i l_i x_p(i)), l y)

    The last term of L_q uses head "one".

    >>> from saflex_jax.models import ResNet18, from_linen
    >>> run = RunInfo(num_samples=50_000, num_classes=100, num_steps=100_000)
    >>> method = make(from_linen(network(ResNet18(), 100)), optax.sgd(0.1), run=run)

    Args:
      model: of `network`.
      tx: optax transformation of {**parameters of q, "mix_block": phi}.
      options: see `Options`.
      rule: for the mixtures' weights and labels; None = as given.
      loss: of the mixtures N x with the refined labels.
      run: gives `num_steps`, where the momentum's schedule ends.

    Raises:
      ValueError: a run that does not say `num_steps`, or clean samples (not supported).
    """
    steps_of_run = mixtures.num_steps(run)
    networks = Networks(model, options.make_block(), AsGiven() if rule is None else rule)

    def step(state, streams, *, reduce=identity):
        no_clean("adautomix", streams.clean)
        batch, k, phi = streams.candidates, state.extra.momentum, state.params["mix_block"]
        keys = jax.random.split(steps.step_key(state, batch.index), 8)
        for_block, for_network = (
            mixtures.draw(key, batch, options.alpha, options.images) for key in keys[:2]
        )

        k_outputs, k_stats = model.train(k, state.model_state["k"], batch.inputs, keys[3])
        masks = networks.masks(phi, k_outputs["map"], for_network, batch)
        masks = mixtures.constant_at_margin(masks, for_network, options.lam_margin)
        candidates = mixtures.mixed(batch, for_network, masks)
        plain = mixtures.mixed(
            batch, for_network, mixtures.constant_masks(for_network, masks.shape)
        )
        targets, arrays, of_rule = networks.refine(
            state, streams._replace(candidates=candidates), reduce=reduce
        )

        def mean(losses):
            return masked_mean(losses, batch.mask, reduce=reduce)

        def cross_entropy(logits, labels):
            return weighted_cross_entropy(logits, labels, mask=batch.mask)

        def block_loss(phi):
            masks = networks.masks(phi, k_outputs["map"], for_block, batch)
            mixture = mixtures.mixed(batch, for_block, masks)
            outputs, stats = model.train(k, k_stats, mixture.inputs, keys[4])
            value = mean(cross_entropy(outputs["mix"], mixture.labels))
            alike = mean(similarity(outputs["mix"], k_outputs["mix"], for_block))
            share = options.adversarial_share
            against = -share * value + (1 - share) * alike
            return jnp.where(state.step % options.adversarial_every == 0, against, value), stats

        def loss_fn(params):
            q = q_of(params)
            of_block, k_after = block_loss(params["mix_block"])
            one, stats = model.train(q, state.model_state["q"], batch.inputs, keys[5])
            mix, stats = model.train(q, stats, candidates.inputs, keys[6])
            linear, stats = model.train(q, stats, plain.inputs, keys[7])
            losses = loss(mix["mix"], targets, candidates)
            direct = cross_entropy(one["one"], batch.labels)
            of_linear = cross_entropy(linear["one"], plain.labels)
            metrics = {
                "candidate_loss": steps.total(losses, batch.mask, reduce),
                "image_loss": steps.total(direct, batch.mask, reduce),
                "generator_loss": (reduce(of_block), jnp.ones(())),
            }
            share = options.linear_share
            value = mean(losses) + of_block + mean((1 - share) * direct + share * of_linear)
            return value, ({"q": stats, "k": k_after}, metrics)

        m = mixtures.momentum_at(
            state.step, steps_of_run, start=options.momentum, end=options.momentum_end
        )
        state, metrics = steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)
        k = moving_average(k, q_of(state.params), m)
        return state._replace(extra=MomentumAndRule(k, arrays)), {**metrics, **of_rule}

    return Method(
        init=partial(networks.init, tx=tx, images=options.images),
        step=step,
        predict=partial(networks.predict, which=options.predict),
        targets=networks.targets,
    )


def similarity(mixed: jax.Array, logits: jax.Array, mixture: Mixture) -> jax.Array:
    """sum_i l_i cos(mixed_b, logits_(p_i(b))), f32[B, K] each -> f32[B]."""

    def unit(x):
        return x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-12)

    cosines = jnp.einsum("bk,nbk->nb", unit(mixed), unit(logits)[mixture.rows])
    return mixture.shares @ cosines


SPEC = MethodSpec(
    make, takes=("options", "rule", "loss", "run"), options=Options(), network=network
)
