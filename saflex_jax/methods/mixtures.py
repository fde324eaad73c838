"""What AutoMix and AdAutoMix share: mixtures, the networks of a step, momentum's schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.augment import mixing
from saflex_jax.augment.base import record
from saflex_jax.core import steps
from saflex_jax.core.tree import identity
from saflex_jax.methods.base import check_outputs
from saflex_jax.models import Heads
from saflex_jax.types import (
    Batch,
    Metrics,
    Model,
    Params,
    PyTree,
    Reduce,
    Rule,
    RunInfo,
    Streams,
    Targets,
    TrainState,
)

HEADS = ("one", "mix")
PREDICTIONS = ("one_q", "mix_q", "one_k", "mix_k")


@dataclasses.dataclass(frozen=True)
class MixtureOptions:
    """Options of both methods; each adds `images`, the number in a mixture, and `make_block`.

    Attributes:
      alpha: > 0. Shares of two images are l ~ Beta(alpha, alpha) and 1 - l; for more images, one
        such draw each, divided by their sum.
      lam_margin: if l_0 is closer than this to 0 or 1, the masks are constant, as mixup's.
      momentum: m during the first tenth of the run and at the start of the cosine; see
        `momentum_at`.
      momentum_end: m at the end.
      predict: head and network of the reported logits: "one_q", "mix_q", "one_k" or "mix_k". The
        default head learns from unmixed images, with the trained parameters.
      stage: stage of the backbone whose feature map the mix block sees; -1 = the last.
    """

    alpha: float = 2.0
    lam_margin: float = 0.08
    momentum: float = 0.999
    momentum_end: float = 0.999999
    predict: str = "one_q"
    stage: int = -2

    def __post_init__(self):
        checks.positive(alpha=self.alpha)
        checks.fraction(
            lam_margin=self.lam_margin, momentum=self.momentum, momentum_end=self.momentum_end
        )
        checks.choice(PREDICTIONS, predict=self.predict)


def network(backbone: nn.Module, num_classes: int, options: MixtureOptions) -> nn.Module:
    """The backbone with two heads, "one" for images and "mix" for mixtures, and a feature map."""
    return Heads(backbone, dict.fromkeys(HEADS, num_classes), options.stage)


def num_steps(run: RunInfo | None) -> int:
    """The length of the run, for the momentum's schedule.

    Raises:
      ValueError: a run that does not know it.
    """
    steps_of_run = 0 if run is None else run.num_steps
    checks.whole(1, **{"run.num_steps": steps_of_run})
    return steps_of_run


# --- mixtures


class Mixture(NamedTuple):
    """Which images make up each row, and their shares: one draw for the whole batch.

    Attributes:
      rows: i32[n, B]; the first are the rows themselves.
      shares: lambda, f32[n], sum one.
    """

    rows: jax.Array
    shares: jax.Array


def draw(key: jax.Array, batch: Batch, alpha: float, images: int = 2) -> Mixture:
    """Shares and partners; padding is never a partner."""
    share_key, rows_key = jax.random.split(key)
    if images == 2:
        lam = mixing.beta(share_key, alpha)
        shares = jnp.stack([lam, 1 - lam])
    else:
        drawn = jax.vmap(lambda key: mixing.beta(key, alpha))(jax.random.split(share_key, images))
        shares = drawn / jnp.sum(drawn)
    own = jnp.arange(len(batch.index))
    others = [mixing.partners(key, batch) for key in jax.random.split(rows_key, images - 1)]
    others = [jnp.where(batch.mask[rows], rows, own) for rows in others]
    return Mixture(jnp.stack([own, *others]), shares)


def mixed(batch: Batch, mixture: Mixture, masks: jax.Array) -> Batch:
    """One mixture: images by the masks f32[n, B, H, W], labels by the drawn shares.

        x_b <- sum_i M_ib x_p(i, b) ,  q_b <- sum_i l_i q_p(i, b)

    `index` is the sample with the largest share, and the trace starts with its columns. The others
    are its partners, one column each, in the order of their shares; a magnitude is the share of all
    before its partner among these and the partner.
    """
    inputs = jnp.sum(masks[..., None] * batch.inputs[mixture.rows], 0).astype(batch.inputs.dtype)
    labels = jnp.sum(mixture.shares[:, None, None] * batch.labels[mixture.rows], 0)
    order = jnp.argsort(-mixture.shares)
    rows, shares = mixture.rows[order], mixture.shares[order, None]
    index, trace = jax.tree.map(lambda x: x[rows[0]], (batch.index, batch.trace))
    candidates = batch._replace(inputs=inputs, labels=labels, index=index, trace=trace)
    # A row that met padding is a partner of its own, which counts as the row itself.
    apart = jnp.where(rows == rows[:1], 0.0, shares)
    so_far = 1 - jnp.sum(apart, 0, keepdims=True) + jnp.cumsum(apart, 0)
    for partner, magnitude in zip(rows[1:], (1 - apart / so_far)[1:]):
        candidates = record(candidates, "automix", magnitude, batch.index[partner])
    return candidates


def constant_masks(mixture: Mixture, shape: Sequence[int]) -> jax.Array:
    """Masks of a shape [n, B, H, W] that equal the shares everywhere, as mixup's."""
    return jnp.broadcast_to(mixture.shares[:, None, None, None], shape)


def constant_at_margin(masks: jax.Array, mixture: Mixture, margin: float) -> jax.Array:
    """Masks f32[n, B, H, W], constant where the first image's share is close to 0 or 1."""
    lam = mixture.shares[0]
    near = (lam <= margin) | (1 - lam <= margin)
    return jnp.where(near, constant_masks(mixture, masks.shape), masks)


def make_masks(
    block: nn.Module, phi: Params, maps: jax.Array, mixture: Mixture, *, size: Sequence[int]
) -> jax.Array:
    """Masks f32[n, B, H, W] of one mixture, from feature maps f32[B, h, w, C] of the images."""
    masks = block.apply({"params": phi}, maps[mixture.rows], mixture.shares, size=size)
    return cast(jax.Array, masks)  # and no variables, of which none is mutable


def look(
    model: Model, block: nn.Module, state: TrainState, batch: Batch, mixture: Mixture
) -> tuple[jax.Array, Batch]:
    """Masks of a mixture by the networks of `state`, and what they mix, for inspection.

    As in a step, but for what it makes of masks further: `constant_at_margin`, `automix.with_mean`.
    """
    key = steps.step_key(state, batch.index)
    outputs, _ = model.train(state.extra.momentum, state.model_state["k"], batch.inputs, key)
    size, phi = batch.inputs.shape[1:3], state.params["mix_block"]
    masks = make_masks(block, phi, outputs["map"], mixture, size=size)
    return masks, mixed(batch, mixture, masks)


# --- networks


class MomentumAndRule(NamedTuple):
    """What both methods keep between steps besides the trained parameters.

    Attributes:
      momentum: parameters of k, the moving average of q's.
      rule: the rule's arrays.
    """

    momentum: Params
    rule: PyTree


@dataclasses.dataclass(frozen=True)
class Networks:
    """The network q, its moving average k, and the mix block phi, which trains beside q.

        params = {**q, "mix_block": phi} ,  model_state = {"q": ..., "k": ...}

    in a TrainState whose `extra` is `MomentumAndRule`. k's running statistics are its own.

    Attributes:
      model: of `network`; q and k are its parameters.
      block: see `models.mix_block`.
      rule: for the mixtures' weights and labels, by q's head "mix".
    """

    model: Model
    block: nn.Module
    rule: Rule

    def init(
        self, key: jax.Array, inputs: jax.Array, tx: optax.GradientTransformation, images: int
    ) -> TrainState:
        """A state at step 0, with k = q, for mixtures of `images` images."""
        checks.images(inputs=inputs)
        params, model_state = self.model.init(key, inputs)
        outputs = jax.eval_shape(self.model.logits, params, model_state, inputs)
        check_outputs(outputs, *HEADS, "map")
        maps, shares = jnp.zeros((images, *outputs["map"].shape)), jnp.ones(images) / images
        block_key = jax.random.fold_in(key, 1)
        phi = self.block.init(block_key, maps, shares, size=inputs.shape[1:3])
        k, k_state = jax.tree.map(jnp.copy, (params, model_state))  # a step may donate q's
        params = {**params, "mix_block": phi["params"]}
        extra = MomentumAndRule(k, self.rule.init(params))
        return steps.init_state(key, params, {"q": model_state, "k": k_state}, tx, extra)

    def masks(self, phi: Params, maps: jax.Array, mixture: Mixture, batch: Batch) -> jax.Array:
        """See `make_masks`; of the size of the batch's images."""
        return make_masks(self.block, phi, maps, mixture, size=batch.inputs.shape[1:3])

    def refine(
        self, state: TrainState, streams: Streams, *, reduce: Reduce
    ) -> tuple[Targets, PyTree, Metrics]:
        """What the rule makes of the candidates, see `types.Rule`."""

        def logits_fn(params, inputs):
            return self.model.logits(q_of(params), state.model_state["q"], inputs)["mix"]

        return self.rule.apply(state.extra.rule, state, logits_fn, streams, reduce=reduce)

    def targets(self, state: TrainState, streams: Streams) -> Targets:
        """Targets of the unmixed candidates."""
        return self.refine(state, streams, reduce=identity)[0]

    def predict(self, state: TrainState, inputs: jax.Array, which: str) -> jax.Array:
        """Logits f32[B, K] of one of PREDICTIONS."""
        head, net = which.split("_")
        params = q_of(state.params) if net == "q" else state.extra.momentum
        return self.model.logits(params, state.model_state[net], inputs)[head]


def q_of(params: Params) -> Params:
    """The parameters of q, without the mix block's."""
    return {name: part for name, part in params.items() if name != "mix_block"}


def momentum_at(step: jax.Array, num_steps: int, *, start: float, end: float) -> jax.Array:
    """m of a step: `start` for the first tenth of the run, then a cosine that ends at `end`.

        m = end - (end - start) (cos(pi t / T) + 1) / 2

    >>> print(momentum_at(jnp.array([0, 9, 100]), 100, start=0.5, end=0.75))
    [0.5  0.5  0.75]
    """
    cosine = end - (end - start) * (jnp.cos(jnp.pi * (step / num_steps)) + 1) / 2
    return jnp.where(step < 0.1 * num_steps, start, cosine)
