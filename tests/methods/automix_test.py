"""AutoMix and SAMix against their two losses, written down and differentiated apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.methods import automix, mixtures
from saflex_jax.methods.automix import SAMIX, Options
from saflex_jax.models import MixBlock
from saflex_jax.parallel import jit_runner
from tests.methods.mixture_setup_ import (
    GIVEN,
    GIVING,
    LAM_MARGIN,
    MARGIN,
    MIDDLE,
    MOMENTUM,
    REAL,
    RUN,
    STREAMS,
    TX,
    assert_step,
    at_margin,
    checked_step,
    constant,
    cross_entropy,
    draw,
    expected,
    images,
    labels,
    make_batch,
    mixture,
    model,
    momentum_of,
    parts,
    recorded_step,
    start,
)
from tests.problems import assert_close

WEIGHT, LIMIT = 0.7, 0.05


# --- the step, by two gradients --------------------------------------------------------------


def block_loss(weight, margin):
    def loss(logits, labels, masks, of, clean):
        own = masks[0, :REAL]
        off = jnp.maximum(jnp.abs(jnp.mean(own) - of.shares[0]) - margin, 0)
        return jnp.mean(cross_entropy(logits, labels)) + weight * (off - 2 * jnp.var(own, ddof=1))

    return loss


def given_targets(logits, labels, one, batch, linear):
    losses = GIVEN.weights[:REAL] * cross_entropy(logits, GIVEN.labels)
    return jnp.mean(losses) + jnp.mean(cross_entropy(one, batch.labels))


@functools.cache
def plain():
    """AutoMix with a mask loss and a margin of this file."""
    options = Options(
        mask_loss=f"l1_variance({WEIGHT}, margin={LIMIT})", lam_margin=LAM_MARGIN, **MOMENTUM
    )
    method = automix.make(model(), TX, options, rule=GIVING, run=RUN)
    losses = block_loss(WEIGHT, LIMIT), given_targets
    return method, checked_step(method, expected(model(), MixBlock(), *losses, settle=at_margin))


def test_each_part_moves_by_its_own_loss_and_k_follows():
    method, step = plain()
    for number, pair in ((7, MIDDLE), (9, MARGIN)):  # the block's draw knows no margin
        state = start(method, number)
        returned, wanted = step(state, STREAMS, pair, momentum_of(number))
        assert_step(returned, wanted, state)
    assert returned[1]["candidate_loss"][1] == returned[1]["image_loss"][1] == REAL


def test_the_rule_is_shown_the_mixtures_and_the_networks_logits():
    method, step = plain()
    state, batch, of = start(method), STREAMS.candidates, MIDDLE[1]
    (new, _), _ = step(state, STREAMS, MIDDLE)
    shown = new.extra.rule["shown"]
    np.testing.assert_array_equal(shown.candidates.labels, labels(batch, of))
    np.testing.assert_array_equal(shown.candidates.index, batch.index)  # .625 is one's own
    np.testing.assert_array_equal(shown.candidates.mask, batch.mask)
    assert_close(shown.val, STREAMS.val, 0)
    assert_close(method.targets(state, STREAMS), GIVEN, 0)

    @jax.jit
    def seen(state, inputs):
        q, stats = parts(state.params)[1], state.model_state["q"]
        look = mixtures.look(model(), MixBlock(), state, *jax.tree.map(jnp.asarray, (batch, of)))
        return model().logits(q, stats, inputs)["mix"], look

    logits, (masks, looked) = seen(state, shown.candidates.inputs)
    assert_close(new.extra.rule["logits"], logits)
    assert_close(looked, shown.candidates)
    assert_close(looked.inputs, np.asarray(images(np.asarray(masks), batch, of)))


def test_at_the_margin_a_mixture_is_mixups():
    method, step = plain()
    state, batch = start(method), STREAMS.candidates

    def shown(of):
        (new, _), _ = step(state, STREAMS, (MIDDLE[0], of))
        return new.extra.rule["shown"].candidates

    for lam in (0.0625, 0.9375):
        of = mixture(lam, 1 - lam)
        x, y = batch.inputs, batch.labels
        np.testing.assert_array_equal(shown(of).inputs, lam * x + (1 - lam) * x[of.rows[1]])
        np.testing.assert_array_equal(shown(of).labels, lam * y + (1 - lam) * y[of.rows[1]])
    for lam in (0.0626, 0.9374):
        of = mixture(lam, 1 - lam)
        apart = shown(of).inputs - images(np.asarray(constant(of)), batch, of)
        assert np.abs(apart[:REAL]).max() > 0.1


def test_padding_changes_nothing():
    method, step = plain()
    other = make_batch(9)

    def beside(real, padding):
        mask = STREAMS.candidates.mask.reshape(-1, *[1] * (real.ndim - 1))
        return np.where(mask, real, padding)

    garbage = STREAMS.candidates._replace(
        inputs=beside(STREAMS.candidates.inputs, 50 * other.inputs),
        labels=beside(STREAMS.candidates.labels, other.labels),
    )
    (state, metrics), (again, metrics_again) = (
        step(start(method), STREAMS._replace(candidates=batch), MIDDLE)[0]
        for batch in (STREAMS.candidates, garbage)
    )
    assert_close(metrics, metrics_again, 0)
    for name in ("params", "opt_state"):
        assert_close(getattr(state, name), getattr(again, name), 0)
    assert_close(state.extra.momentum, again.extra.momentum, 0)


def test_batch_statistics_of_the_block_are_over_the_runs_axis():
    run = RUN._replace(axis_name="data")
    method = automix.make(model(), TX, SAMIX, run=run)
    with pytest.raises(NameError, match="data"):  # where nothing is mapped
        jax.eval_shape(method.step, start(automix.make(model(), TX, SAMIX, run=RUN)), STREAMS)


def test_every_step_makes_two_draws_of_its_own():
    method, _ = plain()
    step = recorded_step(method)
    keys_of = jax.jit(lambda state, streams: step(state, streams)[1][0])
    keys = [key for number in (0, 1, 2) for key in keys_of(start(method, number), STREAMS)]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 6
    assert keys_of(start(method, 1), STREAMS) == keys[2:4]
    drawn = [jax.device_get(draw(key, STREAMS.candidates, 2.0)) for key in keys]
    assert len({float(of.shares[0]) for of in drawn}) == 6
    assert (drawn[0].rows != drawn[1].rows).any()


def brier(logits, targets, candidates):
    apart = jnp.sum((jax.nn.softmax(logits) - targets.labels) ** 2, 1)
    return jnp.where(candidates.mask, targets.weights * apart, 0.0)


def test_samix_on_eight_devices_with_batch_statistics_adjusted_masks_and_another_loss():
    def scaled(masks, of):
        """Each row's mask has the mean lambda, by NumPy's formula of the less and the more."""
        first, lam = masks[0], of.shares[0]
        mean = first.mean((1, 2), keepdims=True)
        more = 1 - (1 - first) * (1 - lam) / (1 - mean)
        first = jnp.where(mean > lam, first * lam / mean, more)
        return jnp.stack([first, 1 - first])

    def network(logits, labels, one, batch, linear):
        apart = jnp.sum((jax.nn.softmax(logits) - GIVEN.labels) ** 2, 1)[:REAL]
        direct = jnp.mean(cross_entropy(one, batch.labels))
        return jnp.mean(GIVEN.weights[:REAL] * apart) + direct

    net, options = model(batch_norm=True), dataclasses.replace(SAMIX, mask_adjust=1.0, **MOMENTUM)
    method = automix.make(net, TX, options, rule=GIVING, loss=brier, run=RUN)
    state, batch = start(method), STREAMS.candidates
    runner = jit_runner(method.step)
    shards = runner.put_state(state), runner.put_batch(STREAMS)
    assert len(shards[1].candidates.inputs.sharding.device_set) == 8
    returned, (keys, drawn) = jax.device_get(jax.jit(recorded_step(method))(*shards))
    for key, of in zip(keys, drawn, strict=True):
        assert_close(draw(key, batch, 2.0), of, 0)
        assert 0.1 < of.shares[0] < 0.9
    losses = block_loss(0.1, 0.1), network
    reference = jax.jit(expected(net, MixBlock(SAMIX.block), *losses, settle=scaled))
    wanted = reference(state, batch, drawn, momentum_of(7))
    assert_step(returned, wanted, state)
    rule = returned[0].extra.rule
    assert_close(rule["shown"].candidates.inputs, wanted["mixed"])
    stats = state.model_state["q"]  # the rule sees evaluation mode
    logits = jax.jit(net.logits)(parts(state.params)[1], stats, wanted["mixed"])["mix"]
    assert_close(rule["logits"], logits)


# --- the parts -------------------------------------------------------------------------------

MASK = np.array([True, False, True, True])


def mask_losses(own, lam, margin):
    """In double precision, over the pixels of rows that count."""
    own = np.float64(own)[MASK]
    off, variance = abs(own.mean() - lam), own.var(ddof=1)
    return {
        "none": 0.0,
        "l1": max(off - margin, 0),
        "l1_variance": max(off - margin, 0) - 2 * variance,
        "l2_variance": max(off**2 - margin**2, 0) - 2 * variance,
        "sparsity": max((own * (1 - own)).mean() - margin, 0),
    }


@jax.jit
def with_gradients(own, lam, margin):
    """Kind -> (value, gradient) with a weight of one half."""
    losses = {
        kind: make() if kind == "none" else make(0.5, margin)
        for kind, make in automix.MASK_LOSSES.items()
    }
    return {kind: jax.value_and_grad(loss)(own, lam, MASK) for kind, loss in losses.items()}


def test_mask_losses():
    rng = np.random.default_rng(0)
    own = rng.uniform(0.2, 1.0, (4, 3, 5)).astype(np.float32)
    own[1] = 7.0  # padding
    for lam, margin in ((0.1, 0.1), (1.0, 0.1), (0.1, 0.0)):  # on either side of the mean
        wanted = mask_losses(own, lam, margin)
        assert wanted["l1"] > 0.1 and wanted["sparsity"] > 0
        values = with_gradients(own, lam, margin)
        assert values.keys() == wanted.keys()
        for kind, (value, _) in values.items():
            np.testing.assert_allclose(value, 0.5 * wanted[kind], rtol=1e-5, err_msg=kind)

    # Inside the margin nothing is asked of the mean; what rewards binary masks stays.
    inside = with_gradients(own, float(own[MASK].mean()) + 0.05, 0.3)
    counted = np.where(MASK[:, None, None], own, own[MASK].mean())
    variance, slope = own[MASK].var(ddof=1), 2 * (counted - own[MASK].mean()) / (own[MASK].size - 1)
    for kind, (value, grad) in inside.items():
        reward = -1 if "variance" in kind else 0
        np.testing.assert_allclose(value, reward * variance, rtol=1e-5, err_msg=kind)
        np.testing.assert_allclose(grad, reward * slope, rtol=1e-4, atol=1e-7, err_msg=kind)


def test_a_mask_loss_is_a_function_or_its_text():
    rng = np.random.default_rng(0)
    own, share = rng.uniform(0.2, 1.0, (4, 3, 5)).astype(np.float32), np.float32(0.1)
    wanted = {
        "l1": mask_losses(own, share, 0.1)["l1"] * 0.1,
        "l2_variance(0.5, margin=0.2)": mask_losses(own, share, 0.2)["l2_variance"] * 0.5,
        "none": 0.0,
    }
    losses = {text: Options(mask_loss=text).make_mask_loss() for text in wanted}
    values = jax.jit(lambda: {text: loss(own, share, MASK) for text, loss in losses.items()})()
    for text, value in values.items():
        np.testing.assert_allclose(value, wanted[text], rtol=1e-5, err_msg=text)
    assert Options(mask_loss=max).make_mask_loss() is max


def test_masks_are_scaled_to_the_mean_lambda():
    rng = np.random.default_rng(0)
    first = rng.uniform(size=(6, 4, 5)).astype(np.float32) ** rng.uniform(0.2, 4, (6, 1, 1))
    first[4], first[5] = 0, 1
    masks = np.stack([first, 1 - first]).astype(np.float32)
    with_mean = jax.jit(automix.with_mean)
    for lam in (0.0, 0.3, 0.5, 0.8, 1.0):
        scaled = np.asarray(with_mean(masks, np.float32(lam)))
        np.testing.assert_allclose(scaled.mean((2, 3))[0], lam, atol=1e-6)
        np.testing.assert_allclose(scaled.sum(0), 1, atol=1e-6)
        assert -1e-6 <= scaled.min() and scaled.max() <= 1 + 1e-6
        # What is too much shrinks towards 0 in proportion, what is too little grows towards 1.
        own, partner = masks[:, :4]
        mean = own.mean((1, 2), keepdims=True)
        less, more = own * lam / mean, 1 - partner * (1 - lam) / (1 - mean)
        np.testing.assert_allclose(scaled[0, :4], np.where(mean > lam, less, more), atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_loss": "l2"}, "mask_loss must be one of .* given 'l2'"),
        ({"mask_loss": "l1(-0.1)"}, "mask_loss .*: weight must be >= 0; given -0.1"),
        ({"mask_loss": "l1(margin=-0.1)"}, "mask_loss .*: margin must be >= 0; given -0.1"),
        ({"mask_loss": "none(0.1)"}, "mask_loss 'none.0.1.': "),
        ({"mask_adjust": 1.5}, "mask_adjust must lie in .0, 1.; given 1.5"),
    ],
)
def test_an_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)
