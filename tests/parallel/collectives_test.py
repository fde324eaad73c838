"""What travels between the devices in a step, read from the program that XLA compiles for eight."""

from functools import partial

import jax
import numpy as np
import pytest

from benchmarks.pods import collectives
from saflex_jax import TrainState
from saflex_jax.core import memory, tree
from saflex_jax.core.losses import augmix_loss
from saflex_jax.methods import supervised
from saflex_jax.models import MLP, Classifier, from_linen
from saflex_jax.parallel import jit_runner, runners
from saflex_jax.rules import Posterior, Refinement, Scoring, Simplex, VisitMean
from saflex_jax.train import Checkpoints
from tests.parallel import setup_

LINES = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%end (p: (s32[], f32[4])) -> pred[] {
  %ten = s32[]{:T(128)} constant(10)
  ROOT %less = pred[] compare(%i, %ten), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %inner = f32[4]{0} all-reduce(%x), channel_id=2, to_apply=%sum
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %start = (f32[4]{0}, u32[8,2]{1,0}) all-gather-start(%x), channel_id=1
  %loop = (s32[], f32[4]) while(%start), condition=%end, body=%body, BACKEND
}
"""


def test_loops_are_multiplied_out():
    for known, trips in (("", 10), ('backend_config={"known_trip_count":{"n":"7"}}', 7)):
        outer, inner = sorted(collectives(LINES.replace("BACKEND", known)))
        assert outer == ("all-gather", 4 * 4 + 16 * 4, 1, False)
        assert inner == ("all-reduce", 16, trips, True)
    unknown = LINES.replace("constant(10)", "add(%a, %b)")
    with pytest.raises(ValueError, match="trips of the loop around a all-reduce"):
        collectives(unknown)


def program(rule):
    method = supervised.make(setup_.make_model(), setup_.TX, rule)
    batch = setup_.make_batches("posterior_memory_padding")[0]
    state = jax.eval_shape(method.init, jax.random.key(0), batch.candidates.inputs[:1])
    lowered = runners.jitted(method.step, state, jax.devices()).lower(state, batch, None)
    return collectives(lowered.compile().as_text())


@pytest.fixture(scope="module")
def plain():
    return len(program(None))


@pytest.mark.parametrize("iterations", [2, 10])
def test_head_variants_gather_once_and_reduce_nothing_in_the_solver(plain, iterations):
    rule = Posterior(setup_.RUN, memory=VisitMean(0.9))
    found = program(Refinement(Scoring(f"cg({iterations})"), rule))
    assert len(found) <= plain + 2 and not any(one.in_loop for one in found)
    assert {one.times for one in found} == {1}


def test_the_paper_s_head_variant_gathers_once(plain):
    assert len(program(Refinement(Scoring("identity"), Simplex()))) <= plain + 1


def test_all_parameters_add_the_validation_gradient_and_the_scores(plain, monkeypatch):
    monkeypatch.setattr("saflex_jax.rules.scoring.is_little", only_scores)
    found = program(Refinement(Scoring("identity", predicate=""), Simplex()))
    assert len(found) <= plain + 2


def only_scores(numbers, rows=0, size=0):
    return size == 0


@pytest.mark.parametrize("variant", ["cg_head", "posterior_memory_padding"])
def test_gathered_and_reduced_solves_agree(variant, monkeypatch):
    gathered = setup_.run(jit_runner, variant)
    monkeypatch.setattr("saflex_jax.rules.scoring.is_little", lambda *args, **sizes: False)
    reduced = setup_.run(jit_runner, variant)
    for name, value in reduced.items():
        np.testing.assert_allclose(gathered[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_arrays_travel_as_they_are():
    replicated, split = runners.shardings_over(jax.devices())
    reduce = tree.Everywhere(replicated)
    arrays = {
        "f32": np.float32([0, -0.0, np.nan, np.inf, 1e-42, 1, 2, 3]),
        "bf16": np.arange(16).reshape(8, 2).astype("bfloat16"),
        "i32": np.int32([2**31 - 1, -(2**31), 0, 1, 2, 3, 4, 5]),
        "bool": np.arange(16).reshape(16) % 3 == 0,
        "weights": np.arange(6, dtype=np.float32).reshape(3, 2),  # of no rows
    }
    places = dict.fromkeys(arrays, split) | {"weights": replicated}
    gather = partial(reduce.gather_rows, sizes={8, 16})
    compiled = jax.jit(gather, in_shardings=(places,), out_shardings=replicated).lower(arrays)
    compiled = compiled.compile()
    assert len(collectives(compiled.as_text())) == 1
    found = compiled(jax.device_put(arrays, places))
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(found[name]).view(np.uint8), value.view(np.uint8))


@pytest.mark.parametrize("numbers, rows, size, little", [
    (2**23, 0, 0, True),
    (2**23 + 1, 0, 0, False),
    (16 * 85_440, 16 * 160, 5_130, True),  # ResNet-18, ten classes, 16 chips
    (256 * 85_440, 256 * 160, 5_130, False),  # on 256
    (16 * 600_000, 16 * 160, 2_049_000, False),  # a thousand classes: the work repeated is too much
])  # fmt: skip
def test_sizes_choose(numbers, rows, size, little):
    assert tree.is_little(numbers, rows=rows, size=size) is little


def test_a_memory_of_few_classes_agrees_with_one_device(monkeypatch):
    rule = Posterior(setup_.RUN, noise_rate=0.4, memory=VisitMean(0.9, top=1))
    of_variant = Refinement(Scoring(), rule), setup_.PADDING, False
    monkeypatch.setitem(setup_.VARIANTS, "posterior_top", of_variant)
    setup_.assert_agrees(setup_.run(jit_runner, "posterior_top"), "posterior_top")


def trained(**options):
    """The state after some steps of a network without batch statistics; padding in each batch."""
    model = from_linen(Classifier(MLP((16, 16)), setup_.CLASSES))
    rule = Refinement(Scoring(), Posterior(setup_.RUN, noise_rate=0.4))
    own = {name: options.pop(name) for name in ("microbatches", "loss") if name in options}
    method = supervised.make(model, setup_.TX, rule, **own)
    batches = setup_.make_batches("posterior_memory_padding")
    runner = jit_runner(method.step, **options)
    state = runner.put_state(jax.jit(method.init)(jax.random.key(0), batches[0].candidates.inputs))
    for batch in batches:
        state, _ = runner.step(state, runner.put_batch(batch))
    return state


def assert_same(found, expected, atol=setup_.ROUNDING):
    pairs = zip(setup_.flatten(found).items(), setup_.flatten(expected).values(), strict=True)
    for (name, one), other in pairs:
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def expected():
    return trained(devices=jax.devices()[:1])


def test_shared_parameters_are_the_same_and_lie_on_all_devices(expected, monkeypatch):
    monkeypatch.setattr(runners, "_LARGE", 64)
    found = trained(shard_params=True)
    kernel = found.params["backbone"]["Dense_0"]["kernel"]
    momentum = found.opt_state[0].trace["backbone"]["Dense_1"]["kernel"]
    assert kernel.shape == (36, 16) and kernel.addressable_shards[0].data.shape == (36, 2)
    assert momentum.addressable_shards[0].data.shape == (2, 16)
    assert_same(found, expected)


@pytest.mark.parametrize("devices, parts", [(1, 4), (8, 2)])
def test_added_gradients_are_the_whole_batch_s(expected, devices, parts):
    # Sums in another order, which five steps of solves amplify.
    assert_same(trained(devices=jax.devices()[:devices], microbatches=parts), expected, atol=1e-5)


def test_parts_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"microbatches must divide the 2 candidates .* given 4"):
        trained(microbatches=4)
    # Two parts would hold half of each device's pair of views, and compare halves of two pairs.
    with pytest.raises(ValueError, match="a device in groups of 2 rows; given 2"):
        trained(microbatches=2, loss=augmix_loss(views=2))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_memory_of_few_classes_is_saved_and_resumed_on_other_devices(tmp_path, devices):
    def placed(kept, number):
        state = TrainState(np.int32(3), {}, {}, (), jax.random.key(0), {"memory": kept})
        return jit_runner(lambda *_, **__: None, devices=jax.devices()[:number]).put_state(state)

    empty = memory.init(1024, 1000, top=8)
    rows = np.arange(16, dtype=np.int32), np.eye(1000, dtype=np.float32)[-16:], np.ones(16, bool)
    kept, _ = memory.update(empty, *rows)
    saver = Checkpoints(tmp_path, config={}, every=1)
    saver.save(3, placed(kept, 9 - devices), {}, force=True)
    saver.close()
    loaded, _ = Checkpoints(tmp_path, config={}, every=1).load(placed(empty, devices))
    found = loaded.extra["memory"]
    assert found.classes.dtype == np.uint16
    assert found.classes.addressable_shards[0].data.shape == (1024 // devices, 8)
    for one, other in zip(found, kept):
        np.testing.assert_array_equal(one, other)
