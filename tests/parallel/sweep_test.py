"""A sweep: the results of its members' single runs, in one program, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, RunInfo, Streams
from saflex_jax.batches import take
from saflex_jax.data import ArrayStream, IndexStream, StackedStream, sizes
from saflex_jax.methods import supervised
from saflex_jax.methods.upstream import upstream
from saflex_jax.models import MLP, Classifier, from_linen
from saflex_jax.parallel import jit_runner, member, stack_states, sweep_runner
from saflex_jax.rules import Posterior, Refinement, Schedule, Scoring, VisitMean, directions
from tests.parallel import setup_

SAMPLES, TRUSTED, CLASSES, STEPS = 24, 8, 3, 5
ONE, TWO = jax.devices()[:1], jax.devices()[:2]
RUN = RunInfo(SAMPLES, CLASSES, num_trusted=TRUSTED, num_val=TRUSTED)
DEFAULTS = {"rate": 0.1, "decay": 1e-3, "damping": 0.1, "sharpness": 2.0, "memory": 0.9}
CHANGED = {"rate": 0.3, "decay": 0.5, "damping": 1.0, "sharpness": 1.0, "memory": 0.2}


def shuffle_features(key, batch):
    """An augmentation that draws."""
    return batch._replace(inputs=jax.random.permutation(key, batch.inputs, axis=1))


def make(options, every=1):
    """SAFLEX on a network, all continuous options given; any of them may be traced."""
    scoring = Scoring(directions.cg(5, damping=options["damping"]))
    memory = VisitMean(options["memory"])
    # Five steps from the start no share of wrong labels would be found, hence one is given.
    rule = Posterior(RUN, noise_rate=0.4, sharpness=options["sharpness"], memory=memory)
    schedule = optax.cosine_decay_schedule(options["rate"], STEPS)
    tx = optax.adamw(schedule, weight_decay=options["decay"])
    return trained(MLP((5,)), tx, Refinement(scoring, rule, Schedule(every=every)))


def trained(network, tx, rule=None):
    model = from_linen(Classifier(network, CLASSES))
    return upstream(supervised.make(model, tx, rule), shuffle_features)


PLAIN = trained(MLP((5,), norm="batch"), optax.sgd(0.1))


def pools(seed):
    rng = np.random.default_rng(seed)
    labels = np.eye(CLASSES, dtype=np.float32)[rng.integers(CLASSES, size=SAMPLES)]
    inputs = rng.normal(size=(SAMPLES, 6)).astype(np.float32)
    batch = Batch(inputs, labels, np.ones(SAMPLES, bool), np.arange(SAMPLES, dtype=np.int32))
    return Streams(batch, jax.tree.map(lambda x: x[-TRUSTED:], batch))


def stream(seed):
    return IndexStream(sizes(pools(0)), batch_size=8, seed=seed)


@functools.cache
def new_state(seed, init=PLAIN.init):
    return init(jax.random.key(seed), pools(0).val.inputs[:1])


def single(runner, seed, data, init=PLAIN.init):
    """(state, metrics) of a run by jit on one device."""
    runner = runner.hold(pools(data))
    state, batches = runner.put_state(new_state(seed, init)), stream(seed)
    for _ in range(STEPS):
        state, metrics = runner.step(state, runner.put_batch(next(batches)))
    return state, metrics


PLAIN_RUNNER = jit_runner(PLAIN.step, devices=ONE)


@functools.cache
def plain(seed, data):
    return single(PLAIN_RUNNER, seed, data)


def swept(runner, seeds, init=PLAIN.init):
    """(state, metrics) of the members of these seeds."""
    state = runner.put_state(stack_states([new_state(seed, init) for seed in seeds]))
    batches = StackedStream([stream(seed) for seed in seeds])
    for _ in range(STEPS):
        state, metrics = runner.step(state, runner.put_batch(next(batches)))
    return state, metrics


def assert_same(found, expected):
    """To rounding; whole numbers and keys exactly."""
    found, expected = (setup_.flatten(tree) for tree in (found, expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact = not np.issubdtype(value.dtype, np.floating)
        # A residual is a difference of numbers near one, and rounds as they do.
        least = 0.05 if name.startswith("solve_residual") else 1e-3
        scale = max(np.abs(value).max(initial=0), least)
        np.testing.assert_allclose(
            found[name], value, rtol=0, atol=0 if exact else 2e-5 * scale, err_msg=name
        )


def assert_members(found, expected):
    """A sweep's (state, metrics) are those of the single runs."""
    state, metrics = found
    for number, (own, measured) in enumerate(expected):
        assert_same(member(state, number), own)
        assert_same(jax.tree.map(lambda x, n=number: x[n], metrics), measured)


# --- the results of single runs ------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2])
def test_seeds_with_data_of_their_own(devices):
    seeds = (3, 0, 1, 2)
    runner = sweep_runner(PLAIN.step, devices=jax.devices()[:devices])
    found = swept(runner.hold([pools(seed) for seed in seeds]), seeds)
    assert_members(found, [plain(seed, seed) for seed in seeds])
    apart = {len(x.sharding.device_set) for x in jax.tree.leaves(found[0].params)}
    assert apart == {devices} and int(found[0].step) == STEPS
    # The members are no copies of one another.
    assert len({float(loss) for loss in found[1]["loss"][0]}) == len(seeds)


def test_data_that_all_members_share():
    runner = sweep_runner(PLAIN.step, devices=ONE).hold(pools(7))
    assert_members(swept(runner, (0, 1)), [plain(seed, 7) for seed in (0, 1)])


def test_samples_in_the_place_of_rows():
    def samples(seed):
        return ArrayStream(pools(seed), batch_size=8, seed=seed)

    runner = sweep_runner(PLAIN.step, devices=ONE)
    state = runner.put_state(stack_states([new_state(seed) for seed in (0, 1)]))
    batches = StackedStream([samples(seed) for seed in (0, 1)])
    for _ in range(STEPS):
        state, metrics = runner.step(state, runner.put_batch(next(batches)))
    assert_members((state, metrics), [plain(seed, seed) for seed in (0, 1)])


def collectives(text):
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return [kind for kind in kinds if f"{kind}(" in text or f"{kind}-start(" in text]


def test_every_continuous_option_is_a_members_own_and_devices_exchange_nothing():
    members = [{}, CHANGED, *({name: value} for name, value in CHANGED.items()), {}]
    every = [DEFAULTS | own for own in members]
    options = {k: np.array([own[k] for own in every], np.float32) for k in DEFAULTS}
    traces = []

    def step(state, streams, *, reduce, options):
        traces.append(1)
        return make(options).step(state, streams, reduce=reduce)

    runner = sweep_runner(step, options=options, devices=TWO).hold(pools(0))
    init = make(DEFAULTS).init
    found = swept(runner, [0] * len(members), init)
    expected = single(jit_runner(make(CHANGED).step, devices=ONE), 0, 0, init)
    assert_same(member(found[0], 1), expected[0])
    assert_same(jax.tree.map(lambda x: x[1], found[1]), expected[1])
    kernels = np.asarray(found[0].params["head"]["kernel"])
    np.testing.assert_array_equal(kernels[0], kernels[-1])
    for name, kernel in zip(CHANGED, kernels[2:]):
        assert np.abs(kernel - kernels[0]).max() > 1e-4, name

    state, rows = found[0], next(StackedStream([stream(0)] * len(members)))
    placed = runner.put_batch(rows)
    with jax.transfer_guard("disallow"):
        runner.step(state, placed)
    assert all(x.is_deleted() for x in jax.tree.leaves(state)) and len(traces) == 1
    state = runner.put_state(stack_states([new_state(0, init)] * len(members)))
    text = jax.jit(runner.step).lower(state, placed).compile().as_text()
    assert " while(" in text and collectives(text) == []  # conjugate gradients end by members


def test_a_branch_on_the_step_stays_a_branch():
    method = make(DEFAULTS, every=2)
    runner = sweep_runner(method.step, devices=ONE).hold(pools(0))
    state = runner.put_state(stack_states([new_state(seed, method.init) for seed in (0, 1)]))
    placed = runner.put_batch(next(StackedStream([stream(0), stream(1)])))
    assert "stablehlo.case" in jax.jit(runner.step).lower(state, placed).as_text()


# --- states --------------------------------------------------------------------------------------


def test_states_are_stacked_and_taken_apart():
    states = [new_state(seed) for seed in (0, 1, 2)]
    stacked = stack_states(states)
    assert stacked.step.shape == () and stacked.key.shape == (3,)
    for number, state in enumerate(states):
        found = setup_.flatten(member(stacked, number))
        for name, value in setup_.flatten(state).items():
            np.testing.assert_array_equal(found[name], value)


# --- bad input -----------------------------------------------------------------------------------


def test_members_that_do_not_divide_are_refused():
    runner = sweep_runner(PLAIN.step, devices=jax.devices()[:2])
    state = stack_states([new_state(seed) for seed in (0, 1, 2)])
    message = r"state must have .* a multiple of 2 devices; given \[3\]"
    with pytest.raises(ValueError, match=message):
        runner.put_state(state)
    with pytest.raises(ValueError, match=r"options must have .* of members, .*; given \[0\]"):
        sweep_runner(PLAIN.step, options={"rate": 0.1})
    with pytest.raises(ValueError, match=r"options must have .*; given \[2, 4\]"):
        options = {"rate": np.ones(2), "damping": np.ones(4)}
        sweep_runner(PLAIN.step, options=options, devices=ONE)


def test_members_that_differ_in_shape_or_step_are_refused():
    short = jax.tree.map(lambda x: x[1:], pools(1))
    runner = sweep_runner(PLAIN.step, devices=ONE)
    message = r"candidates.inputs must have one shape in all members; given \[\(23, 6\), \(24, 6\)"
    with pytest.raises(ValueError, match=message):
        runner.hold([pools(0), short])
    later = new_state(1)._replace(step=jnp.int32(4))
    with pytest.raises(ValueError, match=r"states must be at one step; given \[0, 4\]"):
        stack_states([new_state(0), later])


def test_rows_that_are_no_rows_of_the_data_are_refused():
    runner = sweep_runner(PLAIN.step, devices=ONE).hold([pools(0), pools(1)])
    rows = next(StackedStream([stream(0), stream(1)]))
    rows.candidates[1, 3] = SAMPLES
    with pytest.raises(ValueError, match=rf"rows of candidates must lie in \[0, {SAMPLES}\)"):
        runner.put_batch(rows)


def test_a_malformed_pool_is_refused():
    bad = pools(1)._replace(val=pools(1).val._replace(mask=np.ones(3, bool)))
    with pytest.raises(ValueError, match=r"val.mask must have shape \[8\]"):
        sweep_runner(PLAIN.step, devices=ONE).hold([pools(0), bad])


def test_a_stacked_batch_is_the_batches():
    rows = [next(stream(seed)) for seed in (0, 1)]
    found = next(StackedStream([stream(0), stream(1)]))
    for number in (0, 1):
        own = take(pools(number), jax.tree.map(lambda x, n=number: x[n], found))
        expected = take(pools(number), rows[number])
        np.testing.assert_array_equal(own.candidates.inputs, expected.candidates.inputs)
