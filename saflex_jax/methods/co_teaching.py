"""Co-teaching: two networks, each trained on the samples that the other one fits best.

Source: Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy
Labels", NeurIPS 2018.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core import steps
from saflex_jax.core.losses import CandidateLoss, masked_mean, weighted_soft_cross_entropy
from saflex_jax.core.tree import identity
from saflex_jax.methods.base import MethodSpec, no_clean
from saflex_jax.rules.small_loss import SmallLoss, select
from saflex_jax.types import Method, Model, PyTree, TrainState

OTHER = {"a": "b", "b": "a"}
PREDICTIONS = ("a", "mean")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of co-teaching.

    Attributes:
      forget: share of samples left out after the ramp, in [0, 1); see `rules.small_loss.SmallLoss`.
      ramp: steps until `forget` is reached, >= 1.
      predict: "a": the logits of network a, which the source reports. "mean": the logarithm of the
        mean probability of both, two forward passes; compare it with ensembles only, since a mean
        of two networks is better even without wrong labels.

    Raises:
      ValueError: an unknown name, or a value out of range.
    """

    forget: float = 0.2
    ramp: int = 1000
    predict: str = "a"

    def __post_init__(self):
        SmallLoss(self.forget, self.ramp)
        checks.choice(PREDICTIONS, predict=self.predict)


def make(
    model: Model,
    tx: optax.GradientTransformation,
    options: Options = Options(),
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
) -> Method:
    """Two networks that pick each other's samples from every batch.

        w^a, w^b = `small_loss.select` by the logits of a, of b, with R(t) = forget min(t / ramp, 1)
        L = mean_i w^b_i CE(a(x_i), q_i) + mean_i w^a_i CE(b(x_i), q_i)

    A step costs two plain ones: the logits come from the training step's own forward pass, in
    training mode, as in the source. The networks differ in initial parameters and noise (dropout).
    One tx holds the parameters of both, which matters only to transformations that read all of them
    (clipping by the global norm). Under pmap each device ranks its own rows.

    >>> from saflex_jax.models import MLP, Classifier, from_linen
    >>> method = make(from_linen(Classifier(MLP(), 10)), optax.sgd(0.1), Options(forget=0.4))

    Args:
      model: see `types.Model`.
      tx: optax transformation of {"a": parameters, "b": parameters}.
      options: see `Options`.
      loss: of the picked samples, instead of w_i CE; samples are picked by the cross-entropy.

    Returns:
      Method. "loss" is L; the other metrics are means over the networks. `targets` are those of
      network a, picked by b.

    Raises:
      ValueError: clean samples (not supported).
    """
    rate_at = SmallLoss(options.forget, options.ramp).rate_at

    def init(key, inputs):
        return steps.init_state(key, *init_both(model, key, inputs), tx)

    def forward(params, state, batch, reduce):
        """Network -> logits, model_state and targets."""
        keys = dict(zip(OTHER, jax.random.split(steps.step_key(state, batch.index))))
        outputs = {
            name: model.train(params[name], state.model_state[name], batch.inputs, keys[name])
            for name in OTHER
        }
        logits, model_state = _split(outputs)
        rate = rate_at(state.step)
        targets = {
            name: select(logits[other], batch, rate, reduce=reduce) for name, other in OTHER.items()
        }
        return logits, model_state, targets

    def step(state, streams, *, reduce=identity):
        no_clean("co_teaching", streams.clean)
        batch = streams.candidates

        def loss_fn(params):
            logits, model_state, targets = forward(params, state, batch, reduce)
            losses = sum(loss(logits[name], targets[name], batch) for name in OTHER)
            kept = sum(targets[name].weights > 0 for name in OTHER)
            metrics = {
                "candidate_loss": steps.total(losses / 2, batch.mask, reduce),
                "kept": steps.total(kept / 2, batch.mask, reduce),
            }
            return masked_mean(losses, batch.mask, reduce=reduce), (model_state, metrics)

        return steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)

    def predict(state, inputs):
        return predict_by(options.predict, model, state, inputs)

    def targets(state, streams):
        return forward(state.params, state, streams.candidates, identity)[2]["a"]

    return Method(init, step, predict, targets)


def init_both(model: Model, key: jax.Array, inputs: PyTree) -> tuple[PyTree, PyTree]:
    """Parameters and model_state of {"a", "b"}; a is initialised as a single network would be."""
    keys = {"a": key, "b": jax.random.fold_in(key, 1)}
    return tuple(_split({name: model.init(keys[name], inputs) for name in OTHER}))


def predict_by(which: str, model: Model, state: TrainState, inputs: PyTree) -> jax.Array:
    """Logits of network a, or the logarithm of the mean probability of both, f32[B, K].

    Args:
      which: one of PREDICTIONS.
      model: of one network.
      state: with parameters and model_state of {"a", "b"}.
      inputs: of B rows.
    """

    def logits(name):
        return model.logits(state.params[name], state.model_state[name], inputs)

    if which == "a":
        return logits("a")
    log_p, log_q = (jax.nn.log_softmax(logits(name)) for name in OTHER)
    return jnp.logaddexp(log_p, log_q) - jnp.log(2.0)


def _split(pairs):
    """Network -> (x, y) as network -> x and network -> y."""
    return ({name: pair[part] for name, pair in pairs.items()} for part in (0, 1))


SPEC = MethodSpec(make, takes=("options", "loss"), options=Options())
