"""AutoMix and SAMix: a small network learns where to mix two images, from the training loss alone.

    maps of the momentum network -> masks -> mixed candidates -> (weights, labels) -> one step of
    network and mix block together, each on its own loss -> momentum network

Sources: Liu et al., "AutoMix: Unveiling the Power of Mixup for Stronger Classifiers", ECCV 2022;
Li et al., "SAMix", arXiv 2111.15454; where the papers are silent, the repository
Westlake-AI/openmixup.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from saflex_jax import calls, checks
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
from saflex_jax.methods.mixtures import MixtureOptions, MomentumAndRule, Networks, q_of
from saflex_jax.models import MixBlock, MixBlockOptions
from saflex_jax.rules import AsGiven
from saflex_jax.types import Method, Model, Rule, RunInfo

# (M_0 f32[B, H, W], l f32[], rows that count bool[B]) -> f32[]
MaskLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


# --- mask losses: over all pixels of the rows that count, a = mean(M_0)


def none() -> MaskLoss:
    """No mask loss."""
    return lambda own, share, mask: jnp.zeros(())


def l1(weight: float = 0.1, margin: float = 0.1) -> MaskLoss:
    """weight max(|a - l| - margin, 0).

    >>> half = jnp.full((1, 2, 2), 0.5)
    >>> print(l1(weight=2.0, margin=0.25)(half, 0.0, jnp.array([True])))
    0.5
    """
    checks.at_least_zero(weight=weight, margin=margin)

    def loss(own, share, mask):
        off = jnp.abs(_mean(own, mask) - share)
        return weight * jnp.maximum(off - margin, 0.0)

    return loss


def l1_variance(weight: float = 0.1, margin: float = 0.1) -> MaskLoss:
    """weight (max(|a - l| - margin, 0) - 2 Var(M_0))."""
    checks.at_least_zero(weight=weight, margin=margin)

    def loss(own, share, mask):
        off = jnp.abs(_mean(own, mask) - share)
        return weight * (jnp.maximum(off - margin, 0.0) - 2 * _variance(own, mask))

    return loss


def l2_variance(weight: float = 0.1, margin: float = 0.1) -> MaskLoss:
    """weight (max((a - l)^2 - margin^2, 0) - 2 Var(M_0))."""
    checks.at_least_zero(weight=weight, margin=margin)

    def loss(own, share, mask):
        off = jnp.abs(_mean(own, mask) - share)
        return weight * (jnp.maximum(off**2 - margin**2, 0.0) - 2 * _variance(own, mask))

    return loss


def sparsity(weight: float = 0.1, margin: float = 0.1) -> MaskLoss:
    """weight max(mean(M_0 (1 - M_0)) - margin, 0)."""
    checks.at_least_zero(weight=weight, margin=margin)

    def loss(own, share, mask):
        del share
        return weight * jnp.maximum(_mean(own * (1 - own), mask) - margin, 0.0)

    return loss


MASK_LOSSES = {
    "none": none,
    "l1": l1,
    "l1_variance": l1_variance,
    "l2_variance": l2_variance,
    "sparsity": sparsity,
}


def _mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Of the pixels f32[B, H, W] of rows that count, f32[]."""
    weight, count = _pixels(x, mask)
    return jnp.sum(weight * x) / count


def _variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    """With the number of pixels less one below."""
    _, count = _pixels(x, mask)
    return _mean((x - _mean(x, mask)) ** 2, mask) * count / (count - 1)


def _pixels(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which pixels count, f32[B, H, W], and how many."""
    weight = jnp.broadcast_to(mask[:, None, None], x.shape).astype(x.dtype)
    return weight, jnp.maximum(jnp.sum(weight), 2.0)


# --- the method


@dataclasses.dataclass(frozen=True)
class Options(MixtureOptions):
    """Options of AutoMix; `SAMIX` has those of SAMix.

    Attributes:
      alpha, lam_margin, momentum, momentum_end, predict, stage: see `mixtures.MixtureOptions`.
      mask_loss: a `MaskLoss`, or the text of one of MASK_LOSSES, with or without arguments: "none",
        "l1", "l1_variance(weight=0.1, margin=0.1)".
      mask_adjust: probability of scaling the network's masks to mean l.
      block: options of `MixBlock`, or a module (see `models.mix_block`).
      images: n = 2, images in a mixture; not an option.

    Raises:
      ValueError: an unknown name, or a value out of range.
    """

    images: ClassVar[int] = 2
    mask_loss: str | MaskLoss = "l1"
    mask_adjust: float = 0.0
    block: MixBlockOptions | nn.Module = MixBlockOptions()

    def __post_init__(self):
        super().__post_init__()
        self.make_mask_loss()
        checks.fraction(mask_adjust=self.mask_adjust)

    def make_mask_loss(self) -> MaskLoss:
        """The mask loss that `mask_loss` is or names."""
        if callable(self.mask_loss):
            return self.mask_loss
        return calls.parse(MASK_LOSSES, mask_loss=self.mask_loss)

    def make_block(self, axis_name: str | None = None) -> nn.Module:
        """The mix block.

        Args:
          axis_name: mapped axis, for batch statistics under pmap.
        """
        if isinstance(self.block, nn.Module):
            return self.block
        return MixBlock(self.block, axis_name)


# SAMix's for CIFAR-100.
SAMIX = Options(
    mask_loss="l1_variance",
    block=MixBlockOptions(
        upsample="bilinear", lam_mul=1.0, lam_mul_k=0.25, qk_concat=True, v_neck=True
    ),
)


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
    """AutoMix; with `SAMIX` SAMix.

    A step draws two mixtures with masks M and N, each with its own shares l and partners p. q is
    the network, k its moving average, phi the mix block.

        M, N = phi(maps of k)                                          # N without gradient
        L_phi = CE(k(M x), l y) + mask_loss(M)                            -> phi
        L_q   = CE(q(N x), l y) + CE(q(x), y)                             -> q
        (q, phi) <- (q, phi) + tx(grad (L_phi + L_q)) ;  k <- m k + (1 - m) q

    Mixtures use head "mix", images head "one". M x = sum_i M_i x_p(i); labels l y are mixed by the
    drawn shares at any masks. q and k run in training mode. The rule learns weights and labels of
    the mixtures N x, with head "mix". Under pmap every device draws its own mixtures.

    >>> from saflex_jax.models import ResNet18, from_linen
    >>> run = RunInfo(num_samples=50_000, num_classes=100, num_steps=100_000)
    >>> model = from_linen(network(ResNet18(norm="batch"), 100))
    >>> method = make(model, optax.sgd(0.1), SAMIX, run=run)

    Args:
      model: of `network`.
      tx: optax transformation of {**parameters of q, "mix_block": phi}.
      options: see `Options`.
      rule: for the mixtures' weights and labels; None = as given.
      loss: of the mixtures in L_q with the refined labels.
      run: gives `num_steps`, where the momentum's schedule ends, and `axis_name`, of the mix
        block's batch statistics.

    Raises:
      ValueError: a run that does not say `num_steps`, or clean samples (not supported).
    """
    steps_of_run = mixtures.num_steps(run)
    mask_loss = options.make_mask_loss()
    networks = Networks(
        model,
        options.make_block(checks.given(run=run).axis_name),
        AsGiven() if rule is None else rule,
    )

    def step(state, streams, *, reduce=identity):
        no_clean("automix", streams.clean)
        batch, k, phi = streams.candidates, state.extra.momentum, state.params["mix_block"]
        keys = jax.random.split(steps.step_key(state, batch.index), 8)
        for_block, for_network = (
            mixtures.draw(key, batch, options.alpha, options.images) for key in keys[:2]
        )

        k_outputs, k_stats = model.train(k, state.model_state["k"], batch.inputs, keys[3])
        masks = networks.masks(phi, k_outputs["map"], for_network, batch)
        if options.mask_adjust:
            adjusted = jax.random.bernoulli(keys[2], options.mask_adjust)
            masks = jnp.where(adjusted, with_mean(masks, for_network.shares[0]), masks)
        masks = mixtures.constant_at_margin(masks, for_network, options.lam_margin)
        candidates = mixtures.mixed(batch, for_network, masks)
        targets, arrays, of_rule = networks.refine(
            state, streams._replace(candidates=candidates), reduce=reduce
        )

        def mean(losses):
            return masked_mean(losses, batch.mask, reduce=reduce)

        def block_loss(phi):
            masks = networks.masks(phi, k_outputs["map"], for_block, batch)
            mixture = mixtures.mixed(batch, for_block, masks)
            outputs, stats = model.train(k, k_stats, mixture.inputs, keys[4])
            losses = weighted_cross_entropy(outputs["mix"], mixture.labels, mask=batch.mask)
            return mean(losses) + mask_loss(masks[0], for_block.shares[0], batch.mask), stats

        def loss_fn(params):
            of_block, k_after = block_loss(params["mix_block"])
            one, stats = model.train(q_of(params), state.model_state["q"], batch.inputs, keys[5])
            mix, stats = model.train(q_of(params), stats, candidates.inputs, keys[6])
            losses = loss(mix["mix"], targets, candidates)
            direct = weighted_cross_entropy(one["one"], batch.labels, mask=batch.mask)
            metrics = {
                "candidate_loss": steps.total(losses, batch.mask, reduce),
                "image_loss": steps.total(direct, batch.mask, reduce),
                "generator_loss": (reduce(of_block), jnp.ones(())),
            }
            value = mean(losses) + of_block + mean(direct)
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


def with_mean(masks: jax.Array, share: jax.Array) -> jax.Array:
    """Masks f32[2, B, H, W], scaled so that the first's mean over pixels is the share.

    M_0 <- M_0 l / a   where a = mean(M_0) > l ,  else  M_1 <- M_1 (1 - l) / (1 - a)
    """
    mean = jnp.mean(masks[0], (1, 2), keepdims=True)
    tiny = jnp.finfo(masks.dtype).tiny
    less = masks[0] * share / jnp.maximum(mean, tiny)
    more = 1 - masks[1] * (1 - share) / jnp.maximum(1 - mean, tiny)
    first = jnp.where(mean > share, less, more)
    return jnp.stack([first, 1 - first])


SPEC = MethodSpec(
    make, takes=("options", "rule", "loss", "run"), options=Options(), network=network
)
