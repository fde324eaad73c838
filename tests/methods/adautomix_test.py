"""AdAutoMix against its losses, written down and differentiated apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax import Streams
from saflex_jax.methods import adautomix
from saflex_jax.methods.adautomix import Options
from saflex_jax.models import AdversarialMixBlock
from saflex_jax.parallel import jit_runner
from tests.methods.mixture_setup_ import (
    LAM_MARGIN,
    MOMENTUM,
    REAL,
    RUN,
    SIZE,
    STREAMS,
    THREE,
    THREE_AT_MARGIN,
    TX,
    assert_agree,
    assert_step,
    at_margin,
    checked_step,
    cross_entropy,
    expected,
    make_batch,
    model,
    momentum_of,
    start,
)


def test_the_step():
    share, linear_share = 0.2, 0.25

    def norm(x):
        return jnp.sqrt(jnp.sum(x**2, 1))

    def generator(logits, labels, masks, of, clean, of_loss, of_likeness):
        likeness = 0.0
        for lam, rows in zip(of.shares, of.rows):
            products = jnp.sum(logits * clean[rows], 1)
            likeness += lam * products / (norm(logits) * norm(clean[rows]))
        value = jnp.mean(cross_entropy(logits, labels))
        return of_loss * value + of_likeness * jnp.mean(likeness[:REAL])

    def network(logits, labels, one, batch, linear):
        value = jnp.mean(cross_entropy(logits, labels))
        value += (1 - linear_share) * jnp.mean(cross_entropy(one, batch.labels))
        return value + linear_share * jnp.mean(cross_entropy(linear, labels))

    options = Options(
        adversarial_every=3,
        adversarial_share=share,
        linear_share=linear_share,
        lam_margin=LAM_MARGIN,
        **MOMENTUM,
    )
    method = adautomix.make(model(), TX, options, run=RUN)
    losses = generator, network
    reference = expected(model(), AdversarialMixBlock(), *losses, settle=at_margin, third=True)
    step = checked_step(method, reference)
    # The last of three steps is cooperative: against every third only.
    against, with_it = (-share, 1 - share), (1.0, 0.0)
    for number, weights, of in (
        (6, against, THREE),
        (8, with_it, THREE),
        (9, against, THREE_AT_MARGIN),
    ):
        state = start(method, number)
        returned, wanted = step(state, STREAMS, of, momentum_of(number), *weights)
        assert_step(returned, wanted, state)


def test_similarity_is_the_weighted_mean_of_cosines():
    rng = np.random.default_rng(0)
    mixed, logits = rng.normal(size=(2, SIZE, 4)).astype(np.float32)
    of = THREE[0]

    @jax.jit
    def with_gradient(mixed):
        def total(mixed):
            values = adautomix.similarity(mixed, logits, of)
            return values.sum(), values

        return jax.grad(total, has_aux=True)(mixed)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    cosines = [(unit(mixed) * unit(logits)[rows]).sum(1) for rows in of.rows]
    values = with_gradient(mixed)[1]
    np.testing.assert_allclose(values, of.shares @ np.stack(cosines), atol=1e-6)
    assert np.isfinite(with_gradient(np.zeros_like(mixed))[0]).all()


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    method = adautomix.make(model(), TX, Options(**MOMENTUM), run=RUN)

    def trained(devices):
        runner = jit_runner(method.step, devices=jax.devices()[:devices])
        state = runner.put_state(start(method, 0))
        for seed in (0, 1):
            state, metrics = runner.step(state, runner.put_batch(Streams(make_batch(seed))))
        return state, metrics

    assert_agree(trained(1), trained(8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"images": 1}, "images must be a whole number >= 2; given 1"),
        ({"adversarial_every": 0}, "adversarial_every must be a whole number >= 1; given 0"),
        ({"adversarial_share": 1.5}, "adversarial_share must lie in .0, 1.; given 1.5"),
        ({"linear_share": 1.5}, "linear_share must lie in .0, 1.; given 1.5"),
    ],
)
def test_an_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)
