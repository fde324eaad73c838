"""AutoMix: a small network learns where to mix two images, from the training loss alone.

    maps of the momentum network -> masks -> mixed candidates -> (weights, labels) -> one step of
    network and mix block together, each on its own loss -> momentum network

Sources: Liu et al., "AutoMix: Unveiling the Power of Mixup for Stronger Classifiers", ECCV 2022;
Li et al., "SAMix", arXiv 2111.15454; Qin et al., "Adversarial AutoMixup", ICLR 2024; where the
papers are silent, the repositories Westlake-AI/openmixup and JinXins/Adversarial-AutoMixup.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.augment import mixing
from saflex_jax.augment.base import record
from saflex_jax.core import steps
from saflex_jax.core.losses import (
    CandidateLoss,
    masked_mean,
    weighted_cross_entropy,
    weighted_soft_cross_entropy,
)
from saflex_jax.core.tree import identity
from saflex_jax.methods.base import check_outputs, no_clean, prior_refiner
from saflex_jax.models import AdversarialMixBlock, Heads, MixBlock
from saflex_jax.types import Batch, Method, Model, Params, PyTree, Refiner, TrainState

HEADS = ("one", "mix")
NETWORKS = ("q", "k")
MASK_LOSSES = ("none", "l1", "l1_variance", "l2_variance", "sparsity")

# Options of `make` that give the relatives; of SAMix, those for CIFAR-100.
SAMIX = {"upsample": "bilinear", "lam_mul": 1.0, "lam_mul_k": 0.25, "qk_concat": True,
         "v_neck": True, "mask_loss": "l1_variance"}  # fmt: skip
ADAUTOMIX = {"adversarial_every": 2, "images": 3, "alpha": 1.0, "lam_margin": 0.03,
             "upsample": "bilinear", "mask_loss": "none"}  # fmt: skip


class Mixture(NamedTuple):
    """Which images make each row, and what share each has: one draw for the whole batch.

    Attributes:
      rows: i32[n, B]; the first are the rows themselves.
      shares: lambda, f32[n], summing to one.
    """

    rows: jax.Array
    shares: jax.Array


class Kept(NamedTuple):
    """What the method keeps between steps.

    Attributes:
      momentum: parameters of k, the moving average of q's.
      refiner: the refiner's arrays.
    """

    momentum: Params
    refiner: PyTree


def network(backbone: nn.Module, num_classes: int, *, stage: int = -2) -> nn.Module:
    """The backbone with two heads, "one" for images and "mix" for mixtures, and a feature map."""
    return Heads(backbone, dict.fromkeys(HEADS, num_classes), stage)


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    refiner: Refiner | None = None,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    num_steps: int,
    alpha: float = 2.0,
    mask_loss: str = "l1",
    mask_weight: float = 0.1,
    mask_margin: float = 0.1,
    lam_margin: float = 0.08,
    mask_adjust: float = 0.0,
    momentum: float = 0.999,
    momentum_end: float = 0.999999,
    predict: str = "one_q",
    images: int = 2,
    adversarial_every: int = 0,
    adversarial_share: float = 0.3,
    linear_share: float = 0.5,
    reduction: int = 2,
    upsample: str = "nearest",
    lam_concat: bool = False,
    lam_concat_v: bool = False,
    lam_mul: float = 0.0,
    lam_mul_k: float = -1.0,
    qk_concat: bool = False,
    v_concat: bool = False,
    v_neck: bool = False,
    axis_name: str | None = None,
) -> Method:
    """AutoMix; with SAMIX's or ADAUTOMIX's options its relatives.

    A step draws two mixtures, with shares l and partners p of their own, M and N being their masks.
    q is the network, k its moving average, phi the mix block.

        M, N = phi(maps of k)                                          # N without gradient
        L_phi = CE(k(M x), l y) + mask_weight mask_loss(M)                -> phi
        L_q   = CE(q(N x), l y) + CE(q(x), y)                             -> q
        (q, phi) <- (q, phi) + tx(grad (L_phi + L_q)) ;  k <- m k + (1 - m) q

    with heads "mix" of mixtures and "one" of images, M x = sum_i M_i x_p(i), l y likewise with the
    drawn shares, whatever the masks. q and k compute in training mode. k's running statistics are
    its own. The refiner learns weights and labels of the mixtures N x, by head "mix".

    The adversarial rule (AdAutoMix) has neither a mask loss nor that L_phi, but

        L_phi = CE(k(M x), l y) ; on every `adversarial_every`-th step, c being a cosine of logits,
                -a CE(k(M x), l y) + (1 - a) mean sum_i l_i c(k(M x), k(x_p(i)))
        L_q   = CE(q(N x), l y) + (1 - b) CE(q(x), y) + b CE(q(sum_i l_i x_p(i)), l y)

    Args:
      model: of `network`.
      tx: optax transformation of {**parameters of q, "mix_block": phi}.
      refiner: rule for the mixtures' weights and labels; None = the prior.
      loss: of the mixtures in L_q with the refined labels.
      num_steps: of the run; the momentum's schedule ends there.
      alpha: l ~ Beta(alpha, alpha); of n images, n such draws, divided by their sum.
      mask_loss: of a = mean(M_0) and the drawn l: "none", "l1": max(|a - l| - margin, 0),
        "l1_variance": that - 2 Var(M_0), "l2_variance": max((a - l)^2 - margin^2, 0) - 2 Var(M_0),
        "sparsity": max(mean(M_0 (1 - M_0)) - margin, 0).
      mask_weight: >= 0.
      mask_margin: >= 0.
      lam_margin: where l_0 is so near to 0 or 1, N is l everywhere: mixup.
      mask_adjust: probability with which each row's N is scaled to have the mean l (two images).
      momentum: m of the first tenth of the run, and before the cosine.
      momentum_end: m at the end.
      predict: whose logits are reported: head and network, "mix_q", "one_q", "mix_k" or "one_k".
        The default is the head that learns from images as they are, as those to predict are,
        without averages of parameters.
      images: n.
      adversarial_every: > 0: the adversarial rule; its block is `AdversarialMixBlock`.
      adversarial_share: a.
      linear_share: b.
      reduction, upsample, lam_concat: see the block, `MixBlock` or `AdversarialMixBlock`.
      lam_concat_v, lam_mul, lam_mul_k, qk_concat, v_concat, v_neck, axis_name: see `MixBlock`.

    Under pmap every device draws its own mixtures and compares its own masks with them.

    Raises:
      ValueError: an unknown name, a value out of range, switches of the other rule, or clean
        samples (not supported).
    """
    checks.choice(MASK_LOSSES, mask_loss=mask_loss)
    checks.choice([f"{head}_{net}" for head in HEADS for net in NETWORKS], predict=predict)
    checks.positive(alpha=alpha)
    checks.whole(1, num_steps=num_steps)
    checks.whole(2, images=images)
    checks.whole(adversarial_every=adversarial_every)
    for name, value in {"mask_weight": mask_weight, "mask_margin": mask_margin}.items():
        checks.at_least_zero(**{name: value})
    for name, value in {
        "lam_margin": lam_margin, "mask_adjust": mask_adjust, "momentum": momentum,
        "momentum_end": momentum_end, "adversarial_share": adversarial_share,
        "linear_share": linear_share,
    }.items():  # fmt: skip
        checks.fraction(**{name: value})
    if images > 2 and not adversarial_every:
        raise ValueError(f"images must be 2 without adversarial_every; given {images}")
    if adversarial_every and (mask_loss != "none" or mask_adjust):
        raise ValueError(
            "mask_loss and mask_adjust must be 'none' and 0 with adversarial_every; given "
            f"{mask_loss!r} and {mask_adjust}"
        )
    block = make_block(
        adversarial=adversarial_every > 0,
        reduction=reduction,
        upsample=upsample,
        lam_concat=lam_concat,
        lam_concat_v=lam_concat_v,
        lam_mul=lam_mul,
        lam_mul_k=lam_mul_k,
        qk_concat=qk_concat,
        v_concat=v_concat,
        v_neck=v_neck,
        axis_name=axis_name,
    )
    refiner = prior_refiner() if refiner is None else refiner
    head, reported = predict.split("_")

    def q(params):
        return {name: part for name, part in params.items() if name != "mix_block"}

    def init(key, inputs):
        checks.images(inputs=inputs)
        params, model_state = model.init(key, inputs)
        outputs = jax.eval_shape(model.logits, params, model_state, inputs)
        check_outputs(outputs, *HEADS, "map")
        maps = jnp.zeros((images, *outputs["map"].shape))
        of_block = jax.random.fold_in(key, 1)
        phi = block.init(of_block, maps, jnp.ones(images) / images, size=inputs.shape[1:3])
        k, k_state = jax.tree.map(jnp.copy, (params, model_state))  # a step may donate q's
        params = {**params, "mix_block": phi["params"]}
        kept = Kept(k, refiner.init(params))
        return steps.init_state(key, params, {"q": model_state, "k": k_state}, tx, kept)

    def settled(key, own, mixture):
        """N: the constant lambda at the margin, and scaled to it where that is drawn."""
        lam = mixture.shares[0]
        if mask_adjust:
            drawn = jax.random.bernoulli(key, mask_adjust)
            own = jnp.where(drawn, with_mean(own, lam), own)
        at_margin = (lam <= lam_margin) | (1 - lam <= lam_margin)
        return jnp.where(at_margin, mixture.shares[:, None, None, None], own)

    def step(state, streams, *, reduce):
        no_clean("automix", streams.clean)
        batch = streams.candidates
        keys = jax.random.split(steps.step_key(state, batch.index), 8)
        train = lambda number, params, stats, x: model.train(params, stats, x, keys[number])
        of_phi, of_q = (draw(key, batch, alpha, images) for key in keys[:2])
        k, phi = state.extra.momentum, state.params["mix_block"]

        seen, k_stats = train(3, k, state.model_state["k"], batch.inputs)
        masks = partial(make_masks, block, size=batch.inputs.shape[1:3])
        own = settled(keys[2], masks(phi, seen["map"], of_q), of_q)
        candidates = mixed(batch, of_q, own)
        targets, arrays, refined = refine(state, streams._replace(candidates=candidates), reduce)
        mean = lambda losses: masked_mean(losses, batch.mask, reduce=reduce)
        cross_entropy = lambda logits, labels: weighted_cross_entropy(
            logits, labels, mask=batch.mask
        )

        def generator_loss(phi):
            own = masks(phi, seen["map"], of_phi)
            made = mixed(batch, of_phi, own)
            outputs, stats = train(4, k, k_stats, made.inputs)
            value = mean(cross_entropy(outputs["mix"], made.labels))
            if adversarial_every:
                alike = mean(similarity(outputs["mix"], seen["mix"], of_phi))
                against = -adversarial_share * value + (1 - adversarial_share) * alike
                value = jnp.where(state.step % adversarial_every == 0, against, value)
            else:
                off = distance(
                    own[0], of_phi.shares[0], batch.mask, kind=mask_loss, margin=mask_margin
                )
                value += mask_weight * off
            return value, stats

        def loss_fn(params):
            of_generator, k_after = generator_loss(params["mix_block"])
            one, stats = train(5, q(params), state.model_state["q"], batch.inputs)
            mix, stats = train(6, q(params), stats, candidates.inputs)
            losses = loss(mix["mix"], targets, candidates)
            direct = cross_entropy(one["one"], batch.labels)
            value = mean(losses) + of_generator
            if adversarial_every:
                shares = jnp.broadcast_to(of_q.shares[:, None, None, None], own.shape)
                linear = mixed(batch, of_q, shares)
                both, stats = train(7, q(params), stats, linear.inputs)
                of_linear = cross_entropy(both["one"], linear.labels)
                value += mean((1 - linear_share) * direct + linear_share * of_linear)
            else:
                value += mean(direct)
            metrics = {
                "candidate_loss": steps.total(losses, batch.mask, reduce),
                "image_loss": steps.total(direct, batch.mask, reduce),
                "generator_loss": (reduce(of_generator), jnp.ones(())),
            }
            return value, ({"q": stats, "k": k_after}, metrics)

        m = momentum_at(state.step, num_steps, start=momentum, end=momentum_end)
        state, metrics = steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)
        average = lambda k, q: (m * k + (1 - m) * q).astype(k.dtype)
        averaged = jax.tree.map(average, k, q(state.params))
        return state._replace(extra=Kept(averaged, arrays)), {**metrics, **refined}

    def refine(state, streams, reduce):
        def logits_fn(params, inputs):
            return model.logits(q(params), state.model_state["q"], inputs)["mix"]

        return refiner.apply(state.extra.refiner, state, logits_fn, streams, reduce=reduce)

    def predict_fn(state, inputs):
        params = q(state.params) if reported == "q" else state.extra.momentum
        return model.logits(params, state.model_state[reported], inputs)[head]

    # Of the candidates as they are, not mixed.
    targets = lambda state, streams: refine(state, streams, identity)[0]
    return Method(init, step, predict_fn, targets)


def make_block(*, adversarial: bool, **switches) -> nn.Module:
    """The mix block of a rule.

    Args:
      adversarial: `AdversarialMixBlock`, else `MixBlock`.
      switches: of `MixBlock`; the other block has some of them, the rest must be at their defaults.

    Raises:
      ValueError: a switch that the block does not have is not at its default.
    """
    if not adversarial:
        return MixBlock(**switches)
    known = AdversarialMixBlock.__dataclass_fields__
    for name, value in switches.items():
        off = getattr(MixBlock, name)
        if name not in known and name != "axis_name" and value != off:
            raise ValueError(f"{name} must be {off!r} with adversarial_every; given {value!r}")
    return AdversarialMixBlock(**{k: v for k, v in switches.items() if k in known})


def make_masks(
    block: nn.Module, phi: Params, maps: jax.Array, mixture: Mixture, *, size: Sequence[int]
) -> jax.Array:
    """Masks f32[n, B, H, W] of one mixture, from feature maps f32[B, h, w, C] of the images."""
    return block.apply({"params": phi}, maps[mixture.rows], mixture.shares, size=size)


def look(
    model: Model, block: nn.Module, state: TrainState, batch: Batch, mixture: Mixture
) -> tuple[jax.Array, Batch]:
    """Masks and mixed candidates as a step at `state` makes them of a mixture; to look at."""
    key = steps.step_key(state, batch.index)
    seen, _ = model.train(state.extra.momentum, state.model_state["k"], batch.inputs, key)
    size, phi = batch.inputs.shape[1:3], state.params["mix_block"]
    masks = make_masks(block, phi, seen["map"], mixture, size=size)
    return masks, mixed(batch, mixture, masks)


def draw(key: jax.Array, batch: Batch, alpha: float, images: int) -> Mixture:
    """Shares and partners; nobody is mixed with padding."""
    of_share, of_rows = jax.random.split(key)
    if images == 2:
        lam = mixing.beta(of_share, alpha)
        shares = jnp.stack([lam, 1 - lam])
    else:
        drawn = jax.vmap(lambda key: mixing.beta(key, alpha))(jax.random.split(of_share, images))
        shares = drawn / jnp.sum(drawn)
    own = jnp.arange(len(batch.index))
    others = [mixing.partners(key, batch) for key in jax.random.split(of_rows, images - 1)]
    others = [jnp.where(batch.mask[rows], rows, own) for rows in others]
    return Mixture(jnp.stack([own, *others]), shares)


def mixed(batch: Batch, mixture: Mixture, masks: jax.Array) -> Batch:
    """One mixture: images by the masks f32[n, B, H, W], labels by the drawn shares.

        x_b <- sum_i M_ib x_p(i, b) ,  q_b <- sum_i l_i q_p(i, b)

    `index` is the sample with the largest share.
    """
    inputs = jnp.sum(masks[..., None] * batch.inputs[mixture.rows], 0).astype(batch.inputs.dtype)
    labels = jnp.sum(mixture.shares[:, None, None] * batch.labels[mixture.rows], 0)
    made = batch._replace(inputs=inputs, labels=labels)
    made = record(made, "automix", mixture.shares[0], batch.index[mixture.rows[1]])
    return made._replace(index=batch.index[mixture.rows[jnp.argmax(mixture.shares)]])


def with_mean(own: jax.Array, share: jax.Array) -> jax.Array:
    """Masks f32[2, B, H, W], scaled so that the first's mean over pixels is the share.

    M_0 <- M_0 l / a   where a = mean(M_0) > l ,  else  M_1 <- M_1 (1 - l) / (1 - a)
    """
    mean = jnp.mean(own[0], (1, 2), keepdims=True)
    tiny = jnp.finfo(own.dtype).tiny
    less = own[0] * share / jnp.maximum(mean, tiny)
    more = 1 - own[1] * (1 - share) / jnp.maximum(1 - mean, tiny)
    first = jnp.where(mean > share, less, more)
    return jnp.stack([first, 1 - first])


def distance(
    own: jax.Array, share: jax.Array, mask: jax.Array, *, kind: str, margin: float
) -> jax.Array:
    """The mask loss, see `make`.

    Args:
      own: M_0, f32[B, H, W].
      share: l, f32[].
      mask: bool[B], rows that count.
      kind: of MASK_LOSSES.
      margin: >= 0.

    Returns:
      f32[]; over all pixels of the rows, Var with the number of them less one below.
    """
    weight = jnp.broadcast_to(mask[:, None, None], own.shape).astype(own.dtype)
    count = jnp.maximum(jnp.sum(weight), 2.0)
    mean = lambda x: jnp.sum(weight * x) / count
    off = jnp.abs(mean(own) - share)
    variance = mean((own - mean(own)) ** 2) * count / (count - 1)
    return {
        "none": jnp.zeros(()),
        "l1": jnp.maximum(off - margin, 0.0),
        "l1_variance": jnp.maximum(off - margin, 0.0) - 2 * variance,
        "l2_variance": jnp.maximum(off**2 - margin**2, 0.0) - 2 * variance,
        "sparsity": jnp.maximum(mean(own * (1 - own)) - margin, 0.0),
    }[kind]


def similarity(mixed: jax.Array, logits: jax.Array, mixture: Mixture) -> jax.Array:
    """sum_i l_i cos(mixed_b, logits_(p_i(b))), f32[B, K] each -> f32[B]."""

    def unit(x):
        return x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-12)

    cosines = jnp.einsum("bk,nbk->nb", unit(mixed), unit(logits)[mixture.rows])
    return mixture.shares @ cosines


def momentum_at(step: jax.Array, num_steps: int, *, start: float, end: float) -> jax.Array:
    """m of a step: `start` for the first tenth of the run, then a cosine that ends at `end`.

    m = end - (end - start) (cos(pi t / T) + 1) / 2
    """
    cosine = end - (end - start) * (jnp.cos(jnp.pi * (step / num_steps)) + 1) / 2
    return jnp.where(step < 0.1 * num_steps, start, cosine)
