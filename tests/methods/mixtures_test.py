"""What AutoMix and AdAutoMix share: draws, mixtures, the two networks, momentum."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.augment import OPERATIONS
from saflex_jax.core import parents
from saflex_jax.methods import adautomix, automix, mixtures
from saflex_jax.methods.mixtures import PREDICTIONS, MixtureOptions
from saflex_jax.models import Heads, SmallCNN, from_linen
from tests.methods.mixture_setup_ import (
    CLASSES,
    GIVEN,
    GIVING,
    KEY,
    MARGIN,
    MIDDLE,
    PIXELS,
    REAL,
    RUN,
    SIZE,
    STREAMS,
    THREE,
    TX,
    model,
    parts,
    start,
)
from tests.problems import assert_close

METHODS = {"automix": automix, "adautomix": adautomix}


class Equal(nn.Module):
    """A mix block: masks about the shares."""

    @nn.compact
    def __call__(self, maps, shares, *, size):
        bias = self.param("bias", nn.initializers.zeros, (len(maps), 1, 1, 1))
        return jnp.ones((*maps.shape[:2], *size)) * shares[:, None, None, None] + bias


# --- drawing ---------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def drawn(alpha, images):
    keys = jax.random.split(jax.random.key(3), 4000)
    batch = jax.tree.map(jnp.asarray, STREAMS.candidates)
    return jax.vmap(lambda key: mixtures.draw(key, batch, alpha, images))(keys)


@functools.cache
def draws(alpha, images):
    return jax.tree.map(np.asarray, drawn(alpha, images))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_lambda_is_drawn_from_a_beta_distribution(alpha):
    shares = draws(alpha, 2).shares.astype(np.float64)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    lam = np.sort(shares[:, 0])
    cdf = {1.0: lam, 2.0: 3 * lam**2 - 2 * lam**3}[alpha]
    empirical = np.arange(1, len(lam) + 1) / len(lam)
    assert np.abs(cdf - empirical).max() < 1.63 / np.sqrt(len(lam))  # Kolmogorov: 1 % beyond
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 4 * np.sqrt(variance / len(lam))
    np.testing.assert_allclose(lam.var(), variance, rtol=0.1)


def test_shares_of_several_images_are_normalised_beta_draws():
    shares = draws(1.0, 3).shares.astype(np.float64)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    uniform = np.random.default_rng(0).uniform(size=(400_000, 3))
    wanted = uniform / uniform.sum(1, keepdims=True)
    error = wanted.std() / np.sqrt(len(shares))
    np.testing.assert_allclose(shares.mean(0), 1 / 3, atol=4 * error)
    np.testing.assert_allclose(shares.std(0), wanted.std(), rtol=0.05)
    # Each of the three is another draw.
    np.testing.assert_allclose(np.corrcoef(shares.T)[~np.eye(3, dtype=bool)], -0.5, atol=0.05)


def test_partners_are_any_real_row():
    rows = draws(1.0, 3).rows
    np.testing.assert_array_equal(rows[:, 0], np.broadcast_to(np.arange(SIZE), rows[:, 0].shape))
    assert (rows[:, 1] != rows[:, 2]).mean() > 0.5
    for partners in (rows[:, 1], rows[:, 2]):
        own = partners == np.arange(SIZE)
        assert ((partners < REAL) | own).all()
        for row in range(REAL):  # those that met padding stay alone
            wanted = np.full(REAL, 1 / SIZE)
            wanted[row] += (SIZE - REAL) / SIZE
            shares = np.bincount(partners[:, row], minlength=SIZE)[:REAL] / len(partners)
            np.testing.assert_allclose(shares, wanted, atol=4 * np.sqrt(0.25 / len(partners)))


# --- mixtures --------------------------------------------------------------------------------

mixed = jax.jit(mixtures.mixed)


@pytest.mark.parametrize("of", [*MIDDLE, MARGIN[1], *THREE])
def test_a_mixture(of):
    batch = STREAMS.candidates
    masks = np.random.default_rng(0).dirichlet(np.ones(len(of.shares)), (SIZE, *PIXELS))
    masks = np.moveaxis(masks, -1, 0).astype(np.float32)
    made = mixed(batch, of, masks)
    inputs, target = np.zeros_like(batch.inputs), np.zeros_like(batch.labels)
    for mask, share, rows in zip(masks, of.shares, of.rows):
        for b, row in enumerate(rows):
            inputs[b] += mask[b, :, :, None] * batch.inputs[row]
            target[b] += share * batch.labels[row]
    np.testing.assert_allclose(made.inputs, inputs, atol=1e-6)
    np.testing.assert_allclose(made.labels, target, atol=1e-6)  # whatever the masks
    np.testing.assert_array_equal(made.index, batch.index[of.rows[np.argmax(of.shares)]])
    np.testing.assert_array_equal(made.mask, batch.mask)
    assert {OPERATIONS[i] for i in np.unique(made.trace.operation)} == {"automix"}
    again = jax.eval_shape(mixtures.mixed, made, of, masks)
    assert again.trace.operation.shape == (SIZE, 2 * (len(of.shares) - 1))


@pytest.mark.parametrize("of", [*MIDDLE, MARGIN[1], *THREE])
def test_what_is_known_of_the_parents_mixes_as_their_labels(of):
    batch, images = STREAMS.candidates, len(of.shares)
    batch = batch._replace(index=np.arange(SIZE, dtype=np.int32))
    beliefs = np.random.default_rng(0).dirichlet(np.ones(CLASSES), SIZE)
    made = mixed(batch, of, np.ones((images, SIZE, *PIXELS), np.float32))
    largest = of.rows[np.argmax(of.shares)]
    own = of.shares @ (np.asarray(of.rows) == largest)
    np.testing.assert_allclose(parents.own_share(made), own, atol=1e-6)
    found = parents.mixture(made, lambda index: beliefs[index], np.zeros((SIZE, CLASSES)))
    wanted = np.einsum("n,nbk->bk", of.shares, beliefs[np.asarray(of.rows)])
    wanted = np.where((own >= parents.WHOLE)[:, None], beliefs[largest], wanted)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


# --- the two networks ------------------------------------------------------------------------


def test_k_starts_as_q_and_the_block_is_the_one_that_is_given():
    known = start(automix.make(model(), TX, run=RUN))
    q = jax.tree.map(jnp.asarray, parts(known.params)[1])
    stats = {"batch_stats": {"some": jnp.ones(3)}}
    fixed = model()._replace(init=lambda key, inputs: (q, stats))
    method = automix.make(fixed, TX, automix.Options(block=Equal()), rule=GIVING, run=RUN)
    state = method.init(KEY, jnp.zeros((1, *PIXELS, 2)))
    phi, params = parts(state.params)
    assert_close(params, q, 0)
    assert_close(state.extra.momentum, q, 0)
    assert_close(state.model_state, {"q": stats, "k": stats}, 0)
    assert state.extra.rule["targets"] == GIVEN
    assert set(phi) == {"bias"} and set(parts(known.params)[0]) == {"query", "value"}
    own, twin = (x.unsafe_buffer_pointer() for x in (params["head"]["one"]["bias"],
                 state.extra.momentum["head"]["one"]["bias"]))  # fmt: skip
    assert own != twin  # a step may donate q's


def test_momentum_is_constant_for_a_tenth_and_then_a_cosine():
    times = {}
    for num_steps in (10, 30, 70, 100, 330, 1000, 100_000):
        t = np.unique(np.linspace(0, num_steps, 11).astype(np.int32)[:, None] + [-1, 0, 1])
        times[num_steps] = t[(0 <= t) & (t <= num_steps)].astype(np.int32)

    @jax.jit  # a compiled quotient rounds another way
    def momenta(times):
        return {
            num_steps: mixtures.momentum_at(t, num_steps, start=0.999, end=0.999999)
            for num_steps, t in times.items()
        }

    for num_steps, values in momenta(times).items():
        t = times[num_steps]
        cosine = 0.999999 - (0.999999 - 0.999) * (np.cos(np.pi * t / num_steps) + 1) / 2
        exact = np.where(10 * t < num_steps, 0.999, cosine)
        np.testing.assert_allclose(values, exact, rtol=0, atol=1.3e-7, err_msg=str(num_steps))
        if num_steps == 1000:
            jump = np.asarray(values)[np.isin(t, [99, 100])]
            np.testing.assert_allclose(jump, [0.999, 0.9990245], rtol=0, atol=1e-7)


def test_the_reported_head_and_network():
    methods = {
        name: automix.make(model(batch_norm=True), TX, automix.Options(predict=name), run=RUN)
        for name in PREDICTIONS
    }
    default = automix.make(model(batch_norm=True), TX, run=RUN)
    state, inputs = start(default), STREAMS.val.inputs

    @jax.jit
    def predictions(state):
        reported = {name: method.predict(state, inputs) for name, method in methods.items()}
        networks = {"q": parts(state.params)[1], "k": state.extra.momentum}
        wanted = {
            name: model(batch_norm=True).logits(params, state.model_state[name], inputs)
            for name, params in networks.items()
        }
        return reported, default.predict(state, inputs), wanted

    reported, by_default, wanted = predictions(state)
    for network in ("q", "k"):
        for head in ("one", "mix"):
            assert_close(reported[f"{head}_{network}"], wanted[network][head])
    for a in PREDICTIONS:
        for b in PREDICTIONS:
            assert a == b or np.abs(reported[a] - reported[b]).max() > 1e-2
    assert_close(by_default, reported["one_q"])


@pytest.mark.parametrize("name", METHODS)
def test_the_network_has_its_parts(name):
    images = jnp.zeros((2, *PIXELS, 2))
    spec = METHODS[name].SPEC
    network = from_linen(spec.network(SmallCNN((4, 6, 8)), CLASSES, spec.options))
    params, stats = jax.eval_shape(network.init, KEY, images)
    assert set(params) == {"backbone", "head"} and set(params["head"]) == {"one", "mix"}
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(network.logits, params, stats, images))
    assert shapes == {"one": (2, CLASSES), "mix": (2, CLASSES), "map": (2, 4, 4, 6)}


# --- errors ----------------------------------------------------------------------------------

FRACTIONS = ("lam_margin", "momentum", "momentum_end")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"predict": "mix"}, "predict must be one of .* given 'mix'"),
        ({"alpha": 0.0}, "alpha must be positive and finite; given 0.0"),
        *(({name: 1.5}, f"{name} must lie in .0, 1.; given 1.5") for name in FRACTIONS),
    ],
)
def test_an_option_is_refused(options, message):
    for kind in (MixtureOptions, automix.Options, adautomix.Options):
        with pytest.raises(ValueError, match=message):
            kind(**options)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_run_a_step_and_init_refuse(name):
    make, stage = METHODS[name].make, METHODS[name].Options(stage=-1)
    for run in (None, RUN._replace(num_steps=0)):
        with pytest.raises(ValueError, match=r"run\.num_steps must be a whole number >= 1"):
            make(model(), TX, run=run)
    method = make(model(), TX, stage, run=RUN)
    streams = STREAMS._replace(clean=STREAMS.val)
    with pytest.raises(ValueError, match=f"^{name} trains on candidates alone"):
        jax.eval_shape(method.step, start(method), streams)
    with pytest.raises(ValueError, match="inputs must be images of floats"):
        method.init(KEY, jnp.zeros((2, 7)))
    plain = from_linen(Heads(SmallCNN((4,)), {"one": 2, "mix": 2}))
    with pytest.raises(ValueError, match="model must hand out 'one', 'mix' and 'map'"):
        jax.eval_shape(make(plain, TX, run=RUN).init, KEY, jnp.zeros((1, *PIXELS, 2)))
