"""A small problem for AutoMix and AdAutoMix, and their two losses differentiated apart."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, RunInfo, Streams, Targets
from saflex_jax.core import steps
from saflex_jax.methods import mixtures
from saflex_jax.methods.mixtures import Mixture, MixtureOptions, MomentumAndRule
from saflex_jax.models import from_linen
from saflex_jax.models.feature_map import with_map
from tests import problems
from tests.parallel import setup_
from tests.problems import CLASSES, assert_close

SIZE, REAL, PIXELS = 8, 6, (8, 8)  # rows, those that are no padding
KEY, LR, NUM_STEPS = jax.random.key(0), 0.2, 10
TX = optax.sgd(LR, momentum=0.9)  # its state is the first step's gradient
RUN = RunInfo(num_samples=SIZE, num_classes=CLASSES, num_steps=NUM_STEPS)
LAM_MARGIN = 0.0625
MOMENTUM = {"momentum": 0.5, "momentum_end": 0.9}


class Patches(nn.Module):
    """Features of patches of 2 x 2 pixels, and their mean: quick to compile."""

    batch_norm: bool = False

    @nn.compact
    def __call__(self, x, *, train, stage=None):
        size, height, width, channels = x.shape
        x = x.reshape(size, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
        x = x.reshape(size, height // 2, width // 2, 4 * channels)
        x = nn.Dense(4)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x) if self.batch_norm else x)
        return with_map(jnp.mean(x, (1, 2)), [x], stage)


@functools.cache
def model(batch_norm=False):
    return from_linen(mixtures.network(Patches(batch_norm), CLASSES, MixtureOptions(stage=-1)))


def make_batch(seed=0):
    """Images in quarters, which a mixture by sixteenths rounds nowhere; the last rows padding."""
    rng = np.random.default_rng(seed)
    return Batch(
        inputs=rng.integers(-8, 9, (SIZE, *PIXELS, 2)).astype(np.float32) / 4,
        labels=problems.hard_labels(rng, SIZE),
        mask=np.arange(SIZE) < REAL,
        index=np.arange(20, 20 + SIZE, dtype=np.int32),
    )


STREAMS = Streams(make_batch(), make_batch(1))
ROWS = np.array(
    [[0, 1, 2, 3, 4, 5, 6, 7], [3, 0, 2, 5, 1, 4, 6, 7], [1, 4, 0, 2, 5, 3, 6, 7]], np.int32
)


def mixture(*shares, rows=(0, 1)):
    return Mixture(ROWS[list(rows)], np.array(shares, np.float32))


# Of the mix block, and of the network.
MIDDLE = mixture(0.25, 0.75), mixture(0.625, 0.375, rows=(0, 2))
MARGIN = mixture(0.9375, 0.0625), mixture(0.0625, 0.9375, rows=(0, 2))
THREE = mixture(0.25, 0.25, 0.5, rows=(0, 1, 2)), mixture(0.5, 0.375, 0.125, rows=(0, 2, 1))
THREE_AT_MARGIN = THREE[0], mixture(0.0625, 0.5, 0.4375, rows=(0, 2, 1))


def start(method, step=7):
    """A state in which nothing is as after `init`: k is not q, nor are its running statistics."""
    shapes = jax.eval_shape(method.init, KEY, STREAMS.candidates.inputs)
    rng = np.random.default_rng(5)

    def draw(path, shape):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, shape.shape).astype(np.float32)
        # Masks far from equal, and a network that is no chaos.
        scale = 1.0 if path[0].key == "mix_block" else 0.5 if name == "kernel" else 1.0
        return scale * rng.normal(size=shape.shape).astype(np.float32)

    def drawn(tree):
        return jax.tree_util.tree_map_with_path(draw, tree)

    params, k = drawn(shapes.params), drawn(shapes.extra.momentum)
    extra = MomentumAndRule(k, GIVING.init(params) if shapes.extra.rule else ())
    state = steps.init_state(KEY, params, drawn(shapes.model_state), TX, extra)
    return state._replace(step=jnp.int32(step))


# --- a rule that gives what it was given, and keeps what it was shown ------------------------

_rng = np.random.default_rng(2)
GIVEN = Targets(
    _rng.uniform(0.2, 2.0, SIZE).astype(np.float32),
    problems.soft_labels(_rng, SIZE),
    np.zeros(SIZE, np.float32),
)


class Giving:
    """The rule; its arrays have one structure from the start on."""

    def init(self, params):
        masks = np.zeros((2, SIZE, *PIXELS), np.float32)
        shown = jax.eval_shape(mixtures.mixed, STREAMS.candidates, MIDDLE[0], masks)
        shown = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shown)
        logits = np.zeros((SIZE, CLASSES), np.float32)
        return {"targets": GIVEN, "shown": STREAMS._replace(candidates=shown), "logits": logits}

    def apply(self, arrays, state, logits_fn, streams, *, reduce):
        logits = logits_fn(state.params, streams.candidates.inputs)
        return arrays["targets"], {**arrays, "shown": streams, "logits": logits}, {}


GIVING = Giving()


def checked_step(method, reference):
    """(state, streams, mixtures, m, *weights) -> (what a step returns, what `reference` does).

    The step takes these mixtures, of block and network, in the place of draws. One program is
    quicker to compile than two.
    """

    @jax.jit
    def step(state, streams, given, m, *weights):
        left = iter(given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mixtures, "draw", lambda *_: next(left))
            returned = method.step(state, streams)
        return returned, reference(state, streams.candidates, given, m, *weights)

    return lambda state, streams, given, m=0.5, *weights: step(state, streams, given, m, *weights)


draw = jax.jit(mixtures.draw)


def recorded_step(method):
    """(state, streams) -> (what a step returns, keys and mixtures that it draws)."""

    def step(state, streams):
        draw, keys, drawn = mixtures.draw, [], []

        def recorded(key, batch, *args):
            keys.append(key)
            drawn.append(draw(key, batch, *args))
            return drawn[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mixtures, "draw", recorded)
            return method.step(state, streams), (keys, drawn)

    return step


# --- the step, by two gradients --------------------------------------------------------------


def parts(params):
    params = dict(params)
    return params.pop("mix_block"), params


def cross_entropy(logits, labels):
    return -jnp.sum(labels * (logits - jax.nn.logsumexp(logits, 1, keepdims=True)), 1)[:REAL]


def images(masks, batch, of):
    return sum(m[..., None] * batch.inputs[rows] for m, rows in zip(masks, of.rows))


def labels(batch, of):
    return sum(share * batch.labels[rows] for share, rows in zip(of.shares, of.rows))


def constant(of):
    return jnp.ones((len(of.shares), SIZE, *PIXELS)) * of.shares[:, None, None, None]


def unchanged(masks, of):
    return masks


def at_margin(masks, of):
    lam = of.shares[0]
    return jnp.where((lam <= LAM_MARGIN) | (lam >= 1 - LAM_MARGIN), constant(of), masks)


def expected(model, block, generator, network, *, settle=unchanged, third=False):
    """(state, batch, mixtures, m, *weights) -> what a step makes of them.

    `generator` is (logits of k for mixtures, labels, M, mixture, logits of k for images, *weights),
    `network` (logits "mix" of the mixtures, labels, logits "one" of images, batch, logits "one" of
    the constant mixtures if `third`), -> loss f32[].
    """

    def train(params, stats, inputs):
        return model.train(params, stats, inputs, KEY)

    def step(state, batch, mixtures, m, *weights):
        of_block, of_network = mixtures
        (phi, q), k = parts(state.params), state.extra.momentum
        clean, k_stats = train(k, state.model_state["k"], batch.inputs)

        def masks(phi, of):
            return block.apply({"params": phi}, clean["map"][of.rows], of.shares, size=PIXELS)

        def generator_loss(phi):
            own = masks(phi, of_block)
            out, stats = train(k, k_stats, images(own, batch, of_block))
            args = labels(batch, of_block), own, of_block, clean["mix"]
            return generator(out["mix"], *args, *weights), stats

        mixed = images(settle(masks(phi, of_network), of_network), batch, of_network)

        def network_loss(q):
            one, stats = train(q, state.model_state["q"], batch.inputs)
            mix, stats = train(q, stats, mixed)
            target, linear = labels(batch, of_network), None
            if third:
                both = images(constant(of_network), batch, of_network)
                linear, stats = train(q, stats, both)
                linear = linear["one"]
            return network(mix["mix"], target, one["one"], batch, linear), stats

        (loss_phi, k_stats), grad_phi = jax.value_and_grad(generator_loss, has_aux=True)(phi)
        (loss_q, q_stats), grad_q = jax.value_and_grad(network_loss, has_aux=True)(q)
        new_q = jax.tree.map(lambda x, g: x - LR * g, q, grad_q)
        return {
            "grads": (grad_phi, grad_q),
            "k": jax.tree.map(lambda a, b: m * a + (1 - m) * b, k, new_q),
            "stats": {"q": q_stats, "k": k_stats},
            "losses": (loss_phi, loss_q),
            "mixed": mixed,
        }

    return step


def momentum_of(step):
    """m of MOMENTUM after the first tenth of the run."""
    return float(0.9 - 0.4 * (np.cos(np.pi * step / NUM_STEPS) + 1) / 2)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def assert_step(returned, reference, state):
    """Gradients, and what an optimiser's step and an average make of them."""
    new, metrics = returned
    grads = new.opt_state[0].trace
    for part, wanted in zip(parts(grads), reference["grads"]):
        largest = np.abs(flat(wanted)).max()
        assert largest > 1e-4
        np.testing.assert_allclose(flat(part), flat(wanted), rtol=0, atol=2e-5 * largest)
    assert_close(new.params, jax.tree.map(lambda x, g: x - LR * g, state.params, grads), 1e-6)
    assert_close(new.extra.momentum, reference["k"], 1e-5)
    assert_close(new.model_state, reference["stats"], 1e-5)
    of_phi, of_q = reference["losses"]
    np.testing.assert_allclose(np.divide(*metrics["generator_loss"]), of_phi, rtol=1e-5)
    np.testing.assert_allclose(np.divide(*metrics["loss"]), of_phi + of_q, rtol=1e-5)
    assert new.step == state.step + 1


def assert_agree(one, other):
    """What two runners made of the same steps, (state, metrics): all arrays, and the averages."""
    wanted, found = (
        setup_.flatten((state, {name: total / count for name, (total, count) in metrics.items()}))
        for state, metrics in (one, other)
    )
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)
