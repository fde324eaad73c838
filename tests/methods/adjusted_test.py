import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Streams, augment, parallel
from saflex_jax.augment.alternatives import Alternatives
from saflex_jax.core.pooled import Pooled, pooled
from saflex_jax.data import IndexStream, sizes
from saflex_jax.methods import adjusted, supervised
from saflex_jax.methods.adjusted import Adjusted, Options, shares
from saflex_jax.methods.upstream import upstream
from saflex_jax.models import from_function
from saflex_jax.rules import Scoring

GREEDY = Scoring(direction="identity", predicate="")
START = jnp.array([0.4, 0.1, 0.5])
SHARES = jax.jit(shares)  # one compilation for each shape


def found(mean, error=0.1):
    """Alike in both of two classes."""
    mean = jnp.tile(jnp.array(mean)[:, None], 3)
    return Pooled(jnp.full((3, 3), 9.0), mean, jnp.full((3, 3), error))


def drawn(stats, **options):
    """Shares f64[C] that both classes have."""
    options = {"floor": 0.1, "margin": 0.0, "strength": 1.0, **options}
    share = np.asarray(SHARES(stats, START, **options))
    np.testing.assert_allclose(share[:, 0], share[:, 1], rtol=1e-6)
    return share[:, 0]


def test_shares_are_a_distribution_that_harm_alone_moves():
    np.testing.assert_allclose(drawn(found([0.0, 0.3, 9.0])), START, rtol=1e-6)
    np.testing.assert_allclose(drawn(found([-1.0, -2.0, 0.0], jnp.inf)), START, rtol=1e-6)
    np.testing.assert_allclose(drawn(found([0.0, 0.0, 0.0], 0.0)), START, rtol=1e-6)
    harmed = [drawn(found([0.3, 0.3, u]))[2] for u in (0, -0.1, -0.2, -9)]
    assert harmed == sorted(harmed, reverse=True) and harmed[0] == pytest.approx(0.5)
    assert harmed[-1] == pytest.approx(0.1 * 0.5, rel=1e-3)
    np.testing.assert_allclose(drawn(found([0.3, -9, -9]), floor=0.0).sum(), 1, rtol=1e-6)
    lazy = drawn(found([0.4, 0.1, 0.8], 0.01), floor=0.0, margin=0.25)
    np.testing.assert_allclose(lazy, START / 0.9 * np.array([1, 0, 1]), atol=1e-3)  # .1 < .2 < .4
    off = drawn(found([0.3, -9.0, -9.0]), floor=0.0, strength=0.0)
    np.testing.assert_allclose(off, START, rtol=1e-6)


CLASSES = 10


def drawn_by_class(overall, by_class, own_error=0.05):
    """Shares f32[C, K], given an alternative's utilities in the first class and in each other."""
    first, others = np.array(by_class).T
    mean = np.column_stack([overall, first, *[others] * (CLASSES - 1)])
    error = np.full(mean.shape, own_error)
    error[:, 0] = 0.02
    stats = Pooled(np.full(mean.shape, 9.0), mean, error)
    return np.asarray(SHARES(stats, START, floor=0.01, margin=0.5, strength=1.0))


def test_what_harms_one_class_is_drawn_less_there_alone():
    share = drawn_by_class([0.2, 0.2, 0.2], [[0.2, 0.2], [0.2, 0.2], [-0.9, 0.3]])
    np.testing.assert_allclose(share.sum(0), 1, rtol=1e-6)
    assert share[2, 0] < 0.02
    np.testing.assert_allclose(share[:, 1:], np.tile(START[:, None], CLASSES - 1), rtol=1e-6)
    # What is left goes to the others in proportion.
    np.testing.assert_allclose(share[0, 0] / share[1, 0], 4, rtol=1e-5)


@pytest.mark.parametrize("own_error", [jnp.inf, 5.0], ids=["unknown", "by chance"])
def test_without_evidence_a_class_has_the_overall_shares(own_error):
    overall, mean = [0.2, 0.2, -0.03], [[0.2, 0.2], [0.2, 0.2], [-0.9, 0.3]]
    alike = drawn_by_class(overall, np.tile(np.array(overall)[:, None], 2))
    np.testing.assert_allclose(drawn_by_class(overall, mean, own_error), alike, rtol=1e-5)
    assert 0.001 < alike[2, 0] < 0.3


def test_what_a_class_gives_to_every_alternative_prefers_none():
    mean = [[-0.1, 0.2], [-0.13, 0.2], [-0.07, 0.2]]  # in the first class all of them look harmful
    share = drawn_by_class([0.2, 0.2, 0.2], mean)
    np.testing.assert_allclose(share, np.tile(START[:, None], CLASSES), rtol=1e-6)


def test_help_to_the_class_that_is_still_drawn_does_not_bring_harm_back():
    # Nine classes are harmed; nearly all rows drawn are of the tenth, and so is the overall mean.
    share = drawn_by_class([0.2, 0.2, 0.4], [[0.2, 0.2], [0.2, 0.2], [0.6, -0.5]])
    assert share[2].max() < 0.02


# Two classes on a line, told apart by the first input; the second is noise.
RNG = np.random.default_rng(0)
SIZE = 240


def pool(size):
    y = np.arange(size) % 2
    x = (
        RNG.normal(size=(size, 2)).astype(np.float32)
        + np.float32([[1.5, 0]]) * (2 * y - 1)[:, None]
    )
    rows = np.arange(size, dtype=np.int32)
    return Batch(x, np.eye(2, dtype=np.float32)[y], rows >= 0, rows)


POOLS = Streams(pool(SIZE), pool(60))


def moved(name, op):
    augment.register_operation(name)
    return augment.per_example(name, lambda key, x: (op(x), 1.0))


KINDS = {
    "none": augment.identity,
    "negated": moved("negated", lambda x: -x),  # the other class's
    "jitter": moved("jitter", lambda x: x + jnp.array([0.0, 0.5])),
}
# Makes samples of the second class look like the first one's, and leaves those of the first.
ONE_SIDED = {"none": KINDS["none"], "left": moved("left", lambda x: x.at[0].set(-jnp.abs(x[0])))}


def linear():
    return from_function(
        lambda key, inputs: {"head": {"kernel": jnp.zeros((2, 2))}},
        lambda params, inputs: inputs @ params["head"]["kernel"],
    )


def make(kinds=KINDS, start=None, **options):
    plain = supervised.make(linear(), optax.sgd(0.1))
    chosen = Options(**{"scoring": GREEDY, **options})
    return adjusted.adjusted(plain, augment.of_pipelines(kinds), chosen, start=start)


def trained(method, steps=120):
    runner = parallel.jit_runner(method.step, devices=jax.devices()[:1]).hold(POOLS)
    state = runner.put_state(jax.jit(method.init)(jax.random.key(0), POOLS.candidates.inputs[:1]))
    stream, metrics = IndexStream(sizes(POOLS), batch_size=40, seed=0), {}
    for _ in range(steps):
        state, metrics = runner.step(state, runner.put_batch(next(stream)))
    return state, {name: float(total / count) for name, (total, count) in metrics.items()}


@functools.cache
def runs():
    start = (0.3, 0.5, 0.2)
    return {a: trained(make(start=start, strength=a)) for a in (0.0, 1.0)}


def test_a_planted_operation_is_drawn_no_more_and_the_others_keep_their_proportion():
    fixed, moved = (runs()[a] for a in (0.0, 1.0))
    assert fixed[1]["share/negated"] == pytest.approx(0.5)
    assert moved[1]["utility/negated"] < 0 < moved[1]["utility/jitter"]
    assert moved[1]["share/negated"] < 0.04
    # Of what is left, 3 : 2 as at the start.
    assert moved[1]["share/none"] / moved[1]["share/jitter"] == pytest.approx(1.5, rel=1e-3)


def test_without_strength_it_is_the_pipeline_with_fixed_shares():
    start = jnp.array([0.3, 0.5, 0.2])
    alternatives = augment.of_pipelines(KINDS)
    plain = supervised.make(linear(), optax.sgd(0.1))
    whole = upstream(plain, lambda key, b: alternatives.draw(key, b, jnp.log(start))[0])
    same, _ = trained(whole)
    np.testing.assert_allclose(same.params["head"]["kernel"],
                               runs()[0.0][0].params["head"]["kernel"], rtol=1e-4)  # fmt: skip


def test_harm_to_one_class_is_seen_by_class_and_drawn_less_there():
    state, _ = trained(make(ONE_SIDED))
    mean = np.asarray(jax.jit(pooled)(state.extra.pools).mean)
    none, left = mean
    assert left[2] < 0 < left[1] and none[1] > 0 and none[2] > 0  # columns: all, class 0, class 1
    share = SHARES(pooled(state.extra.pools), jnp.array([0.5, 0.5]), floor=0.01, margin=0.5)
    assert share[1, 1] < 0.02 and share[1, 0] == pytest.approx(0.5)


def test_members_of_a_sweep_have_shares_of_their_own():
    options = {"start": np.float32([[1, 0, 0], [0, 1, 0]]), "strength": np.float32([0, 1])}

    def step(state, streams, *, reduce, options):
        return make(start=options["start"], strength=options["strength"]).step(
            state, streams, reduce=reduce
        )

    runner = parallel.sweep_runner(step, options=options, devices=jax.devices()[:1]).hold(POOLS)
    state = jax.jit(make().init)(jax.random.key(0), POOLS.candidates.inputs[:1])
    state = runner.put_state(parallel.stack_states([state, state]))
    rows = Streams(np.tile(np.arange(40), (2, 1)), np.tile(np.arange(60), (2, 1)))
    for _ in range(3):
        state, _ = runner.step(state, runner.put_batch(rows))
    kernel = np.asarray(state.params["head"]["kernel"])
    assert kernel[0, 0, 1] > 0 > kernel[1, 0, 1]  # the second saw negated samples alone
    assert isinstance(state.extra, Adjusted)


def test_behind_a_pipeline_it_draws_with_another_key():
    def added(key, batch):
        noise = jax.random.normal(key, batch.inputs.shape)
        return augment.record(batch._replace(inputs=batch.inputs + noise), "negated", 1.0)

    def subtracted(key, batch, log_p):
        del log_p
        noise = jax.random.normal(key, batch.inputs.shape)
        return batch._replace(inputs=batch.inputs - noise), jnp.zeros(SIZE, jnp.int32)

    def shown(state, streams, *, reduce):
        return state, {"inputs": streams.candidates.inputs}

    plain = supervised.make(linear(), optax.sgd(0.1))._replace(step=shown)
    inner = adjusted.adjusted(plain, Alternatives(("subtracted",), subtracted))
    state = jax.jit(inner.init)(jax.random.key(0), POOLS.candidates.inputs[:1])
    same, apart = (
        np.asarray(jax.jit(method.step)(state, POOLS)[1]["inputs"]) - POOLS.candidates.inputs
        for method in (upstream(inner, lambda key, batch: added(key, batch)._replace(trace=None)),
                       upstream(inner, added))
    )  # fmt: skip
    assert np.abs(same).max() < 1e-5 and apart.std() > 1


def test_bad_input():
    with pytest.raises(ValueError, match=r"start must have shape \[3\]"):
        make(start=(0.5, 0.5))
    with pytest.raises(ValueError, match="start must have rows >= 0 that sum to one"):
        make(start=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="floor must lie in"):
        Options(floor=2.0)
    with pytest.raises(ValueError, match="scoring must compute the validation gradient on every"):
        Options(scoring=Scoring(val_every=2))
    method = make()
    state = method.init(jax.random.key(0), POOLS.candidates.inputs[:1])
    with pytest.raises(ValueError, match="adjusted needs validation samples"):
        method.step(state, Streams(POOLS.candidates))
