"""MADAug: a policy, learned from the loss one step ahead, chooses each sample's operations.

    features -> policy: strengths and probabilities of all operations
    now and then: all operations, mixed -> look-ahead -> validation gradient -> policy
    always: drawn operations, on a growing share of the samples -> one step

Source: Hou, Zhang and Zhou, "When to Learn What: Model-Adaptive Data Augmentation Curriculum",
ICCV 2023; where the paper is silent, the repository JackHck/MADAug.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.augment import OPERATIONS, policies, record, sample_keys
from saflex_jax.augment.policies import STANDARD, Range
from saflex_jax.augment.rows import map_rows
from saflex_jax.core import steps
from saflex_jax.core.hypergrad import Loss
from saflex_jax.core.losses import CandidateLoss, masked_mean, weighted_soft_cross_entropy
from saflex_jax.core.scores import validation_gradient
from saflex_jax.core.targets import prior_targets
from saflex_jax.core.tree import axpy, identity
from saflex_jax.methods.base import MethodSpec, as_given, check_outputs
from saflex_jax.models import Heads
from saflex_jax.rules.base import needs_val
from saflex_jax.types import Batch, Method, Model, Params, PyTree, Reduce, RunInfo

# RandAugment's 14 operations and ranges, and three more. Cutout takes its share of each side.
SPACE = STANDARD | {"invert": Range(), "flip": Range(1.0, 1.0), "cutout": Range(0.0, 0.2)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of MADAug.

    Attributes:
      tau: time constant of the curriculum, epochs, > 0; see `share_at`.
      layers: number of different operations applied to an augmented sample, >= 1.
      jitter: drawn strengths are moved by U(-jitter, jitter), in [0, 1].
      temperature: T > 0, of the probabilities p.
      search_every: learn the policy once every `search_every` steps, >= 1. A search costs n
        augmented images per sample.
      inner_learning_rate: lr > 0, of the look-ahead.
      policy_tx: optax transformation for h; a number is the learning rate of the paper's Adam.

    Raises:
      ValueError: a value out of range.
    """

    tau: float = 40.0
    layers: int = 2
    jitter: float = 0.3
    temperature: float = 3.0
    search_every: int = 3
    inner_learning_rate: float = 0.1
    policy_tx: optax.GradientTransformation | float = 1e-3

    def __post_init__(self):
        checks.positive(
            tau=self.tau,
            temperature=self.temperature,
            inner_learning_rate=self.inner_learning_rate,
        )
        checks.whole(1, layers=self.layers, search_every=self.search_every)
        checks.fraction(jitter=self.jitter)
        if self.layers > len(SPACE):
            raise ValueError(f"layers must be at most {len(SPACE)}; given {self.layers}")
        if isinstance(self.policy_tx, int | float):
            checks.positive(policy_tx=self.policy_tx)

    @property
    def policy_optimizer(self) -> optax.GradientTransformation:
        """The transformation that `policy_tx` stands for."""
        tx = self.policy_tx
        return optax.adam(tx) if isinstance(tx, int | float) else tx


class PolicyOutput(NamedTuple):
    """The policy's output for every sample.

    Attributes:
      strength: f32[B, n], in [0, 1], of the n operations of SPACE.
      logits: f32[B, n], of choosing them.
    """

    strength: jax.Array
    logits: jax.Array


class PolicyState(NamedTuple):
    """`TrainState.extra` of MADAug.

    Attributes:
      params: h, see `policy`.
      opt_state: optax state of h.
    """

    params: Params
    opt_state: PyTree


def network(backbone: nn.Module, num_classes: int, options: Options = Options()) -> nn.Module:
    """The backbone with a head "class" that also returns its features."""
    del options
    return Heads(backbone, {"class": num_classes}, features=True)


def make(
    model: Model,
    tx: optax.GradientTransformation,
    options: Options = Options(),
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    run: RunInfo | None = None,
) -> Method:
    """Training with a learned policy for each sample's augmentation.

        m, p = policy(features of x; h)                         strengths, probabilities
        explore: x~(h) = sum_k p_k op_k(x, m_k)                 on every `search_every`-th step
                 theta^ = theta - lr grad mean_i CE(f(x~_i(h)), q_i)
                 h <- h + policy_tx(d L_val(theta^) / dh)
        exploit: theta <- theta + tx(grad mean_i CE(f(x'_i), q_i))
                 x'_i: `layers` operations drawn from p_i where u_i < share (`share_at`), else x_i

    h starts from zeros (uniform, strengths 1/2) and learns from the first step on, before the
    step's own draws. (In the released code it learns after epoch 300, in shorter runs.) The
    look-ahead is plain gradient descent for any training optimiser; it and the features use
    evaluation mode. Images are in [0, 1], and augmented ones are clipped to that.

    >>> from saflex_jax.models import SmallCNN, from_linen
    >>> from saflex_jax.types import RunInfo
    >>> run = RunInfo(num_samples=1000, num_classes=10, steps_per_epoch=10)
    >>> method = make(from_linen(network(SmallCNN(), 10)), optax.sgd(0.1), run=run)

    Args:
      model: of `network`.
      tx: optax transformation.
      options: see `Options`.
      loss: of the candidates (see `core.losses`), instead of the cross-entropy.
      run: gives `steps_per_epoch`, the clock of the curriculum; it must be known.

    Returns:
      Method; `extra` is `PolicyState`. The metric "val_loss" is that of theta^, "augmented" the
      share.

    Raises:
      ValueError: steps per epoch unknown, a model without features, or no validation samples.
    """
    steps_per_epoch = 0.0 if run is None else run.steps_per_epoch
    checks.positive(**{"run.steps_per_epoch": steps_per_epoch})

    def init(key, inputs):
        checks.images(inputs=inputs)
        params, model_state = model.init(key, inputs)
        outputs = jax.eval_shape(model.logits, params, model_state, inputs)
        check_outputs(outputs, "class", "features")
        width = outputs["features"].shape[1]
        h = {"kernel": jnp.zeros((width, 2 * len(SPACE))), "bias": jnp.zeros(2 * len(SPACE))}
        extra = PolicyState(h, options.policy_optimizer.init(h))
        return steps.init_state(key, params, model_state, tx, extra)

    def step(state, streams, *, reduce=identity):
        needs_val("madaug", streams.val)
        batch = streams.candidates
        search_key, draw_key = jax.random.split(steps.draws_key(state))
        features = model.logits(state.params, state.model_state, batch.inputs)["features"]

        def search(extra):
            return _search(
                search_key, state, extra, streams, features, options,
                model=model, loss=loss, reduce=reduce,
            )  # fmt: skip

        def wait(extra):
            return extra, (jnp.zeros(()), jnp.zeros(()))

        if options.search_every == 1:
            extra, val_loss = search(state.extra)
        else:
            due = state.step % options.search_every == 0
            extra, val_loss = jax.lax.cond(due, search, wait, state.extra)

        augmented, used = drawn_operations(
            draw_key,
            batch,
            policy(extra.params, features, options.temperature),
            share=share_at(state.step, steps_per_epoch=steps_per_epoch, tau=options.tau),
            layers=options.layers,
            jitter=options.jitter,
        )

        def train_fn(params, model_state, inputs, key):
            outputs, model_state = model.train(params, model_state, inputs, key)
            return outputs["class"], model_state

        state, metrics = steps.inner_step(
            state,
            augmented,
            prior_targets(augmented.labels, augmented.mask),
            train_fn=train_fn,
            tx=tx,
            clean=streams.clean,
            loss=loss,
            reduce=reduce,
        )
        metrics |= {"val_loss": val_loss, "augmented": steps.total(used, batch.mask, reduce)}
        return state._replace(extra=extra), metrics

    def predict(state, inputs):
        return model.logits(state.params, state.model_state, inputs)["class"]

    return Method(init, step, predict, as_given)


def _search(key, state, extra, streams, features, options, *, model, loss, reduce):
    """One step of the policy, "explore" of `make`: (PolicyState, metric of the validation loss)."""
    batch, val = streams.candidates, streams.val
    strength = policy(extra.params, features, options.temperature).strength
    variants = all_operations(key, batch, strength)

    def logits_fn(params, inputs):
        return model.logits(params, state.model_state, inputs)["class"]

    def inner_loss(params, h):
        mixed = mixture(variants, policy(h, features, options.temperature))
        logits = logits_fn(params, mixed.astype(batch.inputs.dtype))
        losses = loss(logits, prior_targets(batch.labels, batch.mask), batch)
        return masked_mean(losses, batch.mask, reduce=reduce)

    def val_gradient(params):
        return validation_gradient(
            logits_fn, params, val.inputs, val.labels, mask=val.mask, reduce=reduce
        )

    val_loss, grads = lookahead_gradient(
        inner_loss,
        val_gradient,
        state.params,
        extra.params,
        learning_rate=options.inner_learning_rate,
        reduce=reduce,
    )
    updates, opt_state = options.policy_optimizer.update(grads, extra.opt_state, extra.params)
    h = optax.apply_updates(extra.params, updates)
    return PolicyState(h, opt_state), (val_loss, jnp.ones(()))


def share_at(step: jax.Array, *, steps_per_epoch: float, tau: float) -> jax.Array:
    """The share of augmented samples, f32[]: min(tanh(epoch / tau) + .01, 1)."""
    return jnp.minimum(jnp.tanh(step / (steps_per_epoch * tau)) + 0.01, 1.0)


def policy(params: Params, features: jax.Array, temperature: float) -> PolicyOutput:
    """h, one linear map: strength = sigmoid(f W_1 + b_1), logits = (f W_2 + b_2) / T.

    Args:
      params: {"kernel" f32[D, 2n], "bias" f32[2n]}.
      features: f, f32[B, D].
      temperature: T.
    """
    out = features @ params["kernel"] + params["bias"][None]
    strength, logits = jnp.split(out, 2, axis=1)
    return PolicyOutput(jax.nn.sigmoid(strength), logits / temperature)


def lookahead_gradient(
    inner_loss: Loss,
    val_gradient: Callable[[Params], tuple[jax.Array, Params]],
    params: Params,
    meta: PyTree,
    *,
    learning_rate: float,
    reduce: Reduce = identity,
) -> tuple[jax.Array, PyTree]:
    """Validation loss after one step of gradient descent, and its gradient for `meta`.

        theta^ = theta - lr grad_theta L(theta, h)
        d L_val(theta^) / dh = -lr d/de grad_h L(theta + e v, h) at e = 0 ,  v = grad L_val(theta^)

    Exact: one forward-mode product along v replaces a backward pass through the step.

    Args:
      inner_loss: L, (params, meta) -> f32[]; under pmap the device's share.
      val_gradient: params -> (L_val f32[], its gradient), over all devices.
      params: theta.
      meta: h, pytree of floats, the same on every device.
      learning_rate: lr.
      reduce: mean over the data-parallel axis.

    Returns:
      (L_val(theta^) f32[], gradient like meta).
    """
    ahead = axpy(-learning_rate, reduce(jax.grad(inner_loss)(params, meta)), params)
    val_loss, v = val_gradient(ahead)
    _, cross = jax.jvp(lambda params: jax.grad(inner_loss, 1)(params, meta), (params,), (v,))
    return val_loss, jax.tree.map(lambda c: -learning_rate * c, reduce(cross))


def mixture(variants: jax.Array, output: PolicyOutput) -> jax.Array:
    """Every sample's mixture of its operations, differentiable in the policy.

        x~ = sum_k p_k op_k(x, m_k) ,  p = softmax(logits) ,  d op_k / d m_k := 1 at every pixel

    The last is a straight-through estimate: most operations have no useful derivative.

    Args:
      variants: op_k(x, m_k), f32[B, n, H, W, C], constants.
      output: PolicyOutput of B.

    Returns:
      f32[B, H, W, C].
    """
    p = jax.nn.softmax(output.logits)
    through = output.strength - jax.lax.stop_gradient(output.strength)  # zero, with a gradient
    return jnp.einsum("bn,bnhwc->bhwc", p, variants) + jnp.sum(p * through, 1)[:, None, None, None]


def all_operations(key: jax.Array, batch: Batch, strength: jax.Array) -> jax.Array:
    """Every image under every operation of SPACE, clipped to [0, 1]: f32[B, n, H, W, C].

    Args:
      key: of the signs and places; a sample's depend on its index alone.
      batch: Batch of B images.
      strength: f32[B, n].
    """
    size, number = strength.shape
    shape = batch.inputs.shape[1:]
    drawn = jnp.broadcast_to(jnp.arange(number)[None], (size, number))
    u = jax.vmap(lambda key: jax.random.uniform(key, (number, 3)))(sample_keys(key, batch))
    operation, value, centre = _settled(drawn, strength, u, shape[:2])
    # Row i n + k is operation k of sample i: a sample's images stay on its device.
    images = jnp.repeat(batch.inputs.astype(jnp.float32), number, 0)
    flat = jax.tree.map(
        lambda x: x.reshape(size * number, *x.shape[2:]), (operation, value, centre)
    )
    return jnp.clip(apply(images, *flat), 0, 1).reshape(size, number, *shape)


def drawn_operations(
    key: jax.Array,
    batch: Batch,
    output: PolicyOutput,
    *,
    share: jax.Array,
    layers: int,
    jitter: float,
) -> tuple[Batch, jax.Array]:
    """Augments a share of the samples with drawn operations: (batch, which rows bool[B]).

    An augmented sample gets `layers` different operations, drawn one after the other with the
    policy's probabilities, at strengths clip(m + U(-jitter, jitter), 0, 1). A sample's draws depend
    on the key and its index alone. The trace has one column per layer.
    """
    shape = batch.inputs.shape[1:3]

    def draw(key, strength, logits):
        use_key, operation_key, value_key = jax.random.split(key, 3)
        # The largest of logits with Gumbel noise are draws without replacement, in order.
        noise = jax.random.gumbel(operation_key, logits.shape)
        _, drawn = jax.lax.top_k(logits + noise, layers)
        u = jax.random.uniform(value_key, (layers, 4))
        moved = jnp.clip(strength[drawn] + jitter * (2 * u[:, 3] - 1), 0, 1)
        use = jax.random.uniform(use_key) < share
        return use, *_settled(drawn, moved, u[:, :3], shape)

    use, operation, value, centre = jax.vmap(draw)(
        sample_keys(key, batch), output.strength, output.logits
    )
    operation = jnp.where(use[:, None], operation, OPERATIONS.index("identity"))
    value = jnp.where(use[:, None], value, 0.0)

    def layer(images, drawn):
        return apply(images, *drawn), None

    by_layer = operation.T, value.T, centre.swapaxes(0, 1)
    images, _ = jax.lax.scan(layer, batch.inputs.astype(jnp.float32), by_layer)
    for column in range(layers):
        batch = record(batch, operation[:, column], value[:, column])
    return batch._replace(inputs=jnp.clip(images, 0, 1).astype(batch.inputs.dtype)), use


def _settled(drawn, strength, uniform, shape):
    """Places in OPERATIONS, values and centres of places in SPACE at strengths, [...] each.

    uniform: f32[..., 3], of the sign and the centre.
    """
    sign = jnp.where(uniform[..., 0] < 0.5, -1.0, 1.0)
    value = policies.values(SPACE, drawn, strength, sign, shape)
    places = jnp.array([OPERATIONS.index(name) for name in SPACE], jnp.int32)
    return places[drawn], value, uniform[..., 1:]


def apply(
    images: jax.Array, operation: jax.Array, value: jax.Array, centre: jax.Array
) -> jax.Array:
    """One operation of SPACE on every image, each sample its own; not clipped.

    Args:
      images: f32[B, H, W, C].
      operation: i32[B], places in OPERATIONS.
      value: f32[B], see `augment.policies.apply`; of a cutout its share of each side.
      centre: f32[B, 2], of a cutout, in shares of height and width.
    """
    flipped, cut = (operation == OPERATIONS.index(name) for name in ("flip", "cutout"))
    images = policies.apply(images, operation, value, names=SPACE)
    images = map_rows(lambda image: image[:, ::-1], flipped, images)
    return map_rows(_cutout, cut, images, value, centre)


def _cutout(image, share, centre):
    """Zero in a box about the centre, cut at the borders."""
    inside = [
        jnp.abs((jnp.arange(side) + 0.5) / side - middle) < share / 2
        for side, middle in zip(image.shape, centre)
    ]
    return jnp.where((inside[0][:, None] & inside[1][None])[..., None], 0.0, image)


SPEC = MethodSpec(
    make,
    takes=("options", "loss", "run"),
    options=Options(),
    network=network,
    needs=("val",),
)
