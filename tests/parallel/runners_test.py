import functools
import math
import re
import warnings
from typing import NamedTuple

import jax
import numpy as np
import pytest

from saflex_jax import TrainState
from saflex_jax.core.memory import Memory
from saflex_jax.core.tree import identity
from saflex_jax.methods import supervised
from saflex_jax.models import MLP, Classifier, from_linen
from saflex_jax.parallel import RUNNERS, jit_runner, pmap_runner
from saflex_jax.rules import Posterior, Refinement, Scoring
from tests.parallel import setup_
from tests.problems import assert_close

AXIS = {"jit": None, "pmap": "data"}  # what BatchNorm averages over
VARIANTS = [name for name in setup_.VARIANTS if name != "cg_head"]  # its parts are in the others


def leaves(tree):
    return list(setup_.flatten(tree).values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_has_what_makes_the_comparison_hard(variant):
    state = setup_.reference(variant)
    weights, labels = np.split(state["extra/targets"], [1], axis=-1)
    visited = labels.sum(-1) > 0
    least, most = (f(weights[..., 0], 1, where=visited, initial=1.0) for f in (np.min, np.max))
    if variant.startswith("posterior"):
        assert (most - least > 0.1).all()  # a weight is never zero, but uneven in every step
    else:
        assert ((least == 0) & (most > 0)).any()  # a batch whose weights are partly zero
    one_hot = (labels == 1).any(-1)
    assert (visited & ~one_hot).any(1).all()  # labels are learned in every step
    variances = [v for name, v in state.items() if name.startswith("model_state") and "var" in name]
    assert variances and all((v != 1).all() for v in variances)  # BatchNorm's have moved


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_devices_agree_with_one(variant, runner):
    assert jax.device_count() == 8
    found = setup_.run(RUNNERS[runner], variant, axis_name=AXIS[runner])
    setup_.assert_agrees(found, variant)


@pytest.mark.parametrize("val_rows", [16, 5])
def test_a_rule_of_no_run_counts_validation_samples_on_all_devices_without_padding(val_rows):
    # How far a step is believed depends on their number: 5 rows are 8 with padding, 1 on a device.
    model = from_linen(Classifier(MLP(()), setup_.CLASSES))
    rule = Refinement(Scoring("cg(damping=0.1)"), Posterior(noise_rate=0.4))
    method = supervised.make(model, setup_.TX, rule)
    start = jax.jit(method.init)(jax.random.key(0), setup_.POOL.inputs[:1])
    streams = setup_.make_batches("cg_head")[0]
    streams = streams._replace(val=jax.tree.map(lambda x: x[:val_rows], streams.val))

    def step(make_runner):
        runner = make_runner(method.step)
        state, _ = runner.step(runner.put_state(start), runner.put_batch(streams))
        return jax.device_get(state.params)

    expected = step(functools.partial(jit_runner, devices=jax.devices()[:1]))
    for make_runner in RUNNERS.values():
        assert_close(step(make_runner), expected, 1e-6)


@pytest.mark.parametrize("runner", RUNNERS)
def test_devices_of_a_cpu_take_one_step_at_a_time(runner):
    # They share one pool of threads, in which steps in flight can keep each other waiting.
    def step(state, batch, *, reduce):
        grown = jax.lax.fori_loop(0, 500, lambda _, x: jax.numpy.tanh(x @ x), batch[0])
        return state + reduce(jax.numpy.sum(grown)), {}

    runner = RUNNERS[runner](step)
    batch = runner.put_batch(np.ones((8, 100, 100), np.float32))
    state = runner.put_state(np.float32(0))
    for _ in range(3):
        state, _ = runner.step(state, batch)
        assert state.is_ready()


def test_pmap_needs_the_axis_name_of_its_batch_norm():
    # The documented condition is no formality: without it every device normalises by itself.
    variant = "identity_all_augmented_padding"
    with pytest.raises(AssertionError, match="params"):
        setup_.assert_agrees(setup_.run(pmap_runner, variant), variant)


def rows_of_a_shard(state):
    """How many rows of the memory a device holds."""
    (memory,) = (
        part
        for part in jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, Memory))
        if isinstance(part, Memory)
    )
    return {x.data.shape[0] for leaf in memory for x in leaf.addressable_shards}


@pytest.mark.parametrize("runner", RUNNERS)
def test_twenty_steps_compile_once_donate_and_transfer_nothing(runner, caplog):
    traces = []
    method = setup_.make_method("posterior_memory_padding", axis_name=AXIS[runner])

    @functools.wraps(method.step)
    def step(*args, **kwargs):
        traces.append(1)
        return method.step(*args, **kwargs)

    given = setup_.make_state("posterior_memory_padding")
    before = leaves(given)
    run = RUNNERS[runner](step)
    # pmap before JAX 0.8 compiles once more, when it is given a state that it returned.
    compilations = 2 if runner == "pmap" and jax.__version_info__ < (0, 8) else 1
    state = run.put_state(given)
    batches = 4 * setup_.make_batches("posterior_memory_padding")
    with warnings.catch_warnings(), jax.log_compiles():
        warnings.filterwarnings("error", message=".*donated buffers were not usable")
        for number, batch in enumerate(batches):
            placed = run.put_batch(batch)
            if number == compilations:
                caplog.clear()
            with jax.transfer_guard("disallow"):
                new, _ = run.step(state, placed)
            assert all(x.is_deleted() for x in jax.tree.leaves(state))
            state = new
    assert int(state.step) == len(batches) == 20
    assert len(traces) == compilations
    assert not [r for r in caplog.messages if "ompil" in r]
    for x, kept in zip(leaves(given), before):
        np.testing.assert_array_equal(x, kept)
    shards = 8 if runner == "jit" else 1
    assert rows_of_a_shard(state) == {1024 // shards}


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_state_moves_between_runners(runner):
    method = setup_.make_method("posterior_memory_padding")
    eight = jit_runner(method.step).put_state(setup_.make_state("posterior_memory_padding"))
    one = jit_runner(method.step, devices=jax.devices()[3:4]).put_state(eight)
    assert {d for x in jax.tree.leaves(one) for d in x.devices()} == {jax.devices()[3]}
    back = RUNNERS[runner](method.step).put_state(one)
    assert all(len(x.devices()) == 8 for x in jax.tree.leaves(back))
    for x, y, z in zip(leaves(eight), leaves(one), leaves(back)):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)


def test_only_rows_of_the_batch_travel():
    method = setup_.make_method("posterior_memory_padding")
    run = jit_runner(method.step)
    state = run.put_state(setup_.make_state("posterior_memory_padding"))
    batch = run.put_batch(setup_.make_batches("posterior_memory_padding")[0])
    step = jax.jit(functools.partial(method.step, reduce=identity))
    program = step.lower(state, batch).compile().as_text()
    sizes = [
        math.prod(map(int, filter(None, shape.split(","))))
        for line in program.splitlines()
        if re.search(r"= .* (all-gather|all-reduce|collective-permute|all-to-all)\(", line)
        for shape in re.findall(r"[a-z]+[0-9]+\[([0-9,]*)\]", line.split("(%")[0])
    ]
    assert sizes and max(sizes) < 1024  # the memory's rows


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("stream", ["candidates", "val"])
@pytest.mark.parametrize("rows", [4, 12])
def test_rows_that_do_not_divide_are_padded_with_masked_ones(runner, stream, rows):
    batch = setup_.make_batches("cg_head")[0]
    short = jax.tree.map(lambda x: x[:rows], getattr(batch, stream))
    run = RUNNERS[runner](setup_.make_method("cg_head").step)
    placed = getattr(run.put_batch(batch._replace(**{stream: short})), stream)
    placed = jax.tree.map(lambda x, y: np.asarray(x).reshape(-1, *y.shape[1:]), placed, short)
    assert len(placed.mask) == -(-rows // 8) * 8 and not placed.mask[rows:].any()
    for found, expected in zip(leaves(placed), leaves(short)):
        np.testing.assert_array_equal(found[:rows], expected)


@pytest.mark.parametrize("runner", RUNNERS)
def test_what_cannot_be_padded_is_named(runner):
    batch = setup_.make_batches("cg_head")[0]
    empty = jax.tree.map(lambda x: x[:0], batch.val)
    run = RUNNERS[runner](setup_.make_method("cg_head").step)
    with pytest.raises(ValueError, match=r"batch\.val\.inputs .* multiple of 8 .* 0$"):
        run.put_batch(batch._replace(val=empty))
    with pytest.raises(ValueError, match=r"batch must hold a positive multiple of 8 .* 12$"):
        run.put_batch(np.zeros(12))


class ByRows(NamedTuple):
    by_rows = True

    mean: jax.Array
    count: jax.Array


class Others(NamedTuple):
    mean: jax.Array
    count: jax.Array


def test_a_state_says_which_of_its_parts_are_split_by_rows():
    def shards(state, make_runner=jit_runner):
        placed = make_runner(lambda *_, **__: None).put_state(state)
        return jax.tree.map(lambda x: x.addressable_shards[0].data.shape, placed.extra)

    def state(part, rows=16):
        arrays = part(np.ones((rows, 3), np.float32), np.arange(rows))
        return TrainState(np.int32(0), {}, {}, (), jax.random.key(0), {"deep": (arrays,)})

    def whole(part, rows=16):
        return {"deep": (part((rows, 3), (rows,)),)}

    assert shards(state(ByRows)) == {"deep": (ByRows((2, 3), (2,)),)}
    assert shards(state(Others)) == whole(Others)
    assert shards(state(ByRows, 12), jit_runner) == whole(ByRows, 12)  # 12 rows on 8 devices
    assert shards(state(ByRows), pmap_runner) == whole(ByRows)
