"""Streams of batches: their order, reading ahead, data that stays on the devices."""

import re
import signal
import threading

import grain
import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from saflex_jax import Batch, Streams
from saflex_jax._compat import auto_mesh
from saflex_jax.batches import floats, take
from saflex_jax.data import ArrayStream, FoldStream, IndexStream, Pool, Prefetched, Rows, sizes
from saflex_jax.methods import saflex
from saflex_jax.models import MLP, Classifier, from_linen
from saflex_jax.parallel import RUNNERS, jit_runner
from saflex_jax.train import Checkpoints, fit
from saflex_jax.types import RunInfo
from tests.train.setup_ import (
    CLASSES,
    FEATURES,
    ROWS,
    Tampered,
    assert_same_bits,
    make_method,
    make_run,
    pool,
    summing_state,
    summing_step,
)

STEPS = 12


def images(size, seed, dtype=np.uint8, classes=3):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size, 6, 6, 1), dtype=np.uint8)
    return Batch(
        inputs=pixels if dtype == np.uint8 else floats(pixels),
        labels=np.eye(classes, dtype=np.float32)[rng.integers(classes, size=size)],
        mask=np.ones(size, bool),
        index=np.arange(size, dtype=np.int32),
    )


def pools(dtype=np.uint8):
    return Streams(images(21, 0, dtype), images(8, 1, dtype), images(13, 2, dtype))


# --- 8-bit levels ----------------------------------------------------------------------------


def test_levels_become_the_same_floats_on_the_host_and_in_compiled_code():
    levels = np.arange(256, dtype=np.uint8)
    found = floats(levels)
    assert found.dtype == np.float32 and found[0] == 0 and found[255] == 1
    np.testing.assert_allclose(found, np.arange(256) / 255, rtol=2**-23)
    np.testing.assert_array_equal(np.asarray(jax.jit(floats)(levels)), found)
    kept = {"a": np.zeros(2, np.int32), "b": np.ones(2, np.float16)}
    assert_same_bits(floats(kept), kept)


def test_a_stream_gives_floats_of_8_bit_images():
    eight, full = pools(), pools(np.float32)
    streams = [ArrayStream(p, batch_size=8, seed=3) for p in (eight, full)]
    for _ in range(6):
        assert_same_bits(*map(next, streams))


# --- ArrayStream -----------------------------------------------------------------------------


def host_stream(size=21, rows=8, *, val=6, seed=0, **kwargs):
    return ArrayStream(Streams(pool(size), pool(val, seed=1)), batch_size=rows, seed=seed, **kwargs)


def indices(batches, part="candidates"):
    return np.concatenate([getattr(b, part).index for b in batches])


@pytest.mark.parametrize("size, rows", [(21, 8), (24, 8), (5, 8), (3, 8), (7, 1)])
def test_every_sample_once_an_epoch(size, rows):
    # Also where an epoch ends inside a batch, or a batch holds several.
    batches, epochs = host_stream(size, rows, repeats=size < rows), 6
    seen = indices([next(batches) for _ in range(-(-epochs * size // rows))])[: epochs * size]
    orders = seen.reshape(epochs, size)
    assert (np.sort(orders, axis=1) == np.arange(size)).all()
    assert len({tuple(order) for order in orders}) > 1  # shuffled anew


def test_rows_stay_together_and_the_pools_untouched():
    pools = Streams(pool(21), pool(6, seed=1), pool(9, seed=2))
    before = jax.tree.map(np.copy, pools)
    batches = ArrayStream(pools, batch_size=4, val_batch_size=3, seed=0)
    for _ in range(8):
        batch = next(batches)
        for name, rows in {"candidates": 4, "val": 3, "clean": 4}.items():
            part, whole = getattr(batch, name), getattr(before, name)
            assert len(part.index) == rows
            assert_same_bits(part, jax.tree.map(lambda x, i=part.index: x[i], whole))
        jax.tree.map(lambda x: x.fill(0), batch)  # a batch is a copy, never a view
    assert_same_bits(pools, before)


def test_orders_differ_between_streams_and_seeds():
    pools = Streams(pool(50), pool(50), pool(50))
    first = next(ArrayStream(pools, batch_size=50, val_batch_size=50, seed=0))
    other = next(ArrayStream(pools, batch_size=50, val_batch_size=50, seed=1))
    orders = {tuple(b.index) for s in (first, other) for b in s}
    assert len(orders) == 6


@pytest.mark.parametrize("position", [0, 1, 2, 5, 13])
def test_a_position_gives_the_same_remaining_sequence(position):
    whole, resumed = host_stream(), host_stream()
    batches = [next(whole) for _ in range(20)]
    resumed.set_state({"step": position})
    assert resumed.get_state() == {"step": position}
    for batch in batches[position:]:
        assert_same_bits(next(resumed), batch)
    assert resumed.get_state() == whole.get_state() == {"step": 20}
    # Backwards, too, in the middle of a later epoch.
    resumed.set_state({"step": position})
    assert_same_bits(next(resumed), batches[position])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_give_the_global_batches(count):
    whole = host_stream(21, 8, val=8)
    parts = [host_stream(21, 8, val=8, process_index=i, process_count=count) for i in range(count)]
    for _ in range(9):
        shares = [next(part) for part in parts]
        assert all(len(s.candidates.index) == 8 // count for s in shares)
        assert_same_bits(jax.tree.map(lambda *x: np.concatenate(x), *shares), next(whole))


@pytest.mark.parametrize("count", [3, 5])
def test_processes_that_do_not_divide_a_batch_pad_it(count):
    whole = host_stream(21, 8, val=7)
    parts = [host_stream(21, 8, val=7, process_index=i, process_count=count) for i in range(count)]
    for _ in range(9):
        shares = [next(part) for part in parts]
        assert len({str(jax.tree.map(np.shape, s)) for s in shares}) == 1
        together = jax.tree.map(lambda *x: np.concatenate(x), *shares)
        for part, expected in zip(together, next(whole)):
            if part is not None:
                assert_same_bits(jax.tree.map(lambda x, m=part.mask: x[m], part), expected)


def test_the_whole_validation_set_in_every_batch():
    for val_batch_size in (None, 6):
        batches = host_stream(val=6, val_batch_size=val_batch_size)
        for _ in range(5):
            assert sorted(next(batches).val.index) == list(range(6))
    assert next(ArrayStream(Streams(pool(9)), batch_size=2, seed=0)).val is None


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: host_stream(rows=0), "batch_size must be a whole number >= 1; given 0"),
        (lambda: host_stream(rows=2.5), "batch_size must be a whole number >= 1; given 2.5"),
        (lambda: host_stream(val_batch_size=-2), "val_batch_size must be a whole .* given -2"),
        (lambda: host_stream(size=21, rows=22), "batch_size must be at most the 21 rows of cand"),
        (lambda: host_stream(val=3, val_batch_size=4), "val_batch_size must be at most the 3 rows"),
        (lambda: host_stream(size=0), "candidates must hold at least one sample; given 0"),
        (lambda: host_stream(val=0), "val must hold at least one sample; given 0"),
        (
            lambda: ArrayStream(
                Streams(pool(9)._replace(labels=np.zeros((9, CLASSES)))), batch_size=2, seed=0
            ),
            "candidates.labels must have rows .* sum to one",
        ),
    ],
)
def test_stream_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_together_see_every_sample_once_an_epoch(count):
    options = dict(batch_size=8, val_batch_size=4, seed=1, process_count=count)
    kinds = {
        "index": lambda i: IndexStream(sizes(pools()), process_index=i, **options),
        "array": lambda i: ArrayStream(pools(), process_index=i, **options),
        "ahead": lambda i: Prefetched(ArrayStream(pools(), process_index=i, **options)),
    }
    for kind, make in kinds.items():
        streams = [make(i) for i in range(count)]
        seen = {name: [] for name in Streams._fields}
        for _ in range(21):  # 168 candidates and clean samples, 84 for validation
            for name in seen:
                for stream in streams if name == "candidates" else []:
                    batch = next(stream)
                    for part in seen:
                        rows = getattr(batch, part)
                        seen[part].append(rows if kind == "index" else rows.index)
        for name, size in sizes(pools())._asdict().items():
            # In global order: batches one after the other, of each the processes' blocks.
            order = np.concatenate(seen[name])
            epochs = order[: len(order) // size * size].reshape(-1, size)
            assert len(epochs) >= 8
            assert (np.sort(epochs, axis=1) == np.arange(size)).all(), (kind, name)


def test_rows_name_the_samples_of_the_batch():
    index = IndexStream(sizes(pools()), batch_size=8, seed=5)
    whole = ArrayStream(pools(), batch_size=8, seed=5)
    for _ in range(5):
        assert_same_bits(take(pools(), next(index)), next(whole))


# --- generated candidates --------------------------------------------------------------------


def generated(size):
    """Two candidates for each source, of zeros and of ones."""
    inputs = np.tile(np.float32([0, 1]), size)[:, None]
    return Pool.from_arrays(
        inputs, np.zeros(2 * size, int), np.arange(2 * size) // 2, num_classes=3
    )


def test_sources_draw_independently_of_one_another():
    size = 2000
    whole = images(size, 0)._replace(inputs=np.full((size, 1), -1, np.float32))
    batches = ArrayStream(Streams(whole), batch_size=size, seed=0, generated=generated(size))
    ones = next(batches).candidates.inputs.sum()
    assert abs(ones - size / 2) < 5 * np.sqrt(size) / 2  # binomial


@pytest.mark.parametrize("shift, given", [(1, "1 to 4"), (-1, "-1 to 2")])
def test_a_candidate_without_a_source_is_refused(shift, given):
    whole = images(4, 0)._replace(inputs=np.zeros((4, 1), np.float32))
    shifted = whole._replace(index=whole.index + np.int32(shift))
    ArrayStream(Streams(whole), batch_size=4, seed=0, generated=generated(4))
    with pytest.raises(ValueError, match=rf"index must lie in \[0, 4\).* given {given}$"):
        ArrayStream(Streams(shifted), batch_size=4, seed=0, generated=generated(4))


# --- reading ahead ---------------------------------------------------------------------------


@pytest.mark.parametrize("threads, ahead", [(1, 1), (3, 6)])
@pytest.mark.parametrize("position", [0, 1, 7])
def test_reading_ahead_gives_the_same_batches_from_every_position(threads, ahead, position):
    plain = ArrayStream(pools(), batch_size=8, seed=0)
    read = Prefetched(ArrayStream(pools(), batch_size=8, seed=0), threads=threads, ahead=ahead)
    batches = [next(plain) for _ in range(11)]
    for batch in batches[:3]:
        assert_same_bits(next(read), batch)
    assert read.get_state() == {"step": 3}  # what was read ahead does not count
    read.set_state({"step": position})
    for batch in batches[position:]:
        assert_same_bits(next(read), batch)
    assert read.get_state() == plain.get_state()


def test_reading_ahead_begins_where_its_stream_is():
    plain, started = (ArrayStream(pools(), batch_size=8, seed=0) for _ in range(2))
    for stream in (plain, started):
        next(stream), next(stream)
    assert_same_bits(next(Prefetched(started)), next(plain))


def test_no_more_threads_than_said():
    seen = set()

    def place(batch):
        seen.add(threading.get_ident())
        return batch

    stream = IndexStream(sizes(pools()), batch_size=8, seed=0)
    read = Prefetched(stream, threads=1, ahead=8, place=place)
    for _ in range(20):
        next(read)
    assert len(seen) == 1 and threading.get_ident() not in seen


def test_batches_are_made_before_they_are_asked_for_and_no_more_than_said():
    made, enough = [], threading.Event()
    stream = IndexStream(sizes(pools()), batch_size=8, seed=0)

    def place(batch):
        made.append(batch)
        if len(made) == 5:
            enough.set()
        return batch

    read = Prefetched(stream, threads=2, ahead=4, place=place)
    next(read)
    assert enough.wait(timeout=60)  # one given, four ahead
    assert not threading.Event().wait(0.2) and len(made) <= 6


def test_what_a_thread_raises_reaches_the_loop():
    broken = Rows(lambda places: 1 / 0, 21, (2,), np.float32)
    whole = Streams(images(21, 0)._replace(inputs=broken))
    with pytest.raises(ZeroDivisionError):
        next(Prefetched(ArrayStream(whole, batch_size=8, seed=0)))


def test_a_batch_that_fails_is_not_passed_over():
    calls = []

    def place(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise OSError("the disk was away")
        return batch

    first, plain = (IndexStream(sizes(pools()), batch_size=8, seed=0) for _ in range(2))
    read = Prefetched(first, threads=1, ahead=1, place=place)
    for _ in range(2):
        assert_same_bits(next(read), next(plain))
    with pytest.raises(OSError, match="the disk was away"):
        next(read)
    for _ in range(3):
        assert_same_bits(next(read), next(plain))
    assert read.get_state() == plain.get_state()


@pytest.mark.parametrize("name, value", [("threads", 0), ("ahead", 0), ("threads", 1.5)])
def test_prefetch_errors(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= 1; given {value}"):
        Prefetched(IndexStream(sizes(pools()), batch_size=8, seed=0), **{name: value})


def test_a_process_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"process_index must lie in \[0, 2\); given 2"):
        IndexStream(Streams(4), batch_size=2, seed=0, process_index=2, process_count=2)


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="the number of val must be a whole number >= 1; given 0"):
        IndexStream(Streams(3, 0), batch_size=1, seed=0)


# --- grain -----------------------------------------------------------------------------------


class Samples:
    """A random-access source of single samples, as grain asks for."""

    def __init__(self, samples: Batch):
        self.samples = samples

    def __len__(self):
        return len(self.samples.labels)

    def __getitem__(self, i):
        return jax.tree.map(lambda x: x[i], self.samples)


def grain_stream(steps=1000):
    def batches(samples, seed):
        endless = grain.MapDataset.source(Samples(samples)).seed(seed).shuffle().repeat()
        return endless.batch(ROWS).slice(slice(0, steps))

    both = grain.experimental.ZipMapDataset([batches(pool(21), 0), batches(pool(ROWS, seed=1), 1)])
    few = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(both.map(lambda parts: Streams(*parts)).to_iter_dataset(few))


class Recorded(Tampered):
    """A grain iterator whose batches are written down; its position has a form of its own."""

    def __next__(self):
        batch = next(self.stream)
        self.seen.append(batch.candidates.index.tolist())
        return batch


def test_a_grain_iterator_is_a_stream(tmp_path):
    def run(folder, steps):
        runner, state = make_run()
        batches = Recorded(grain_stream())
        checkpoints = Checkpoints(tmp_path / folder, every=4)
        result = fit(
            runner, state, batches, num_steps=steps, checkpoints=checkpoints, progress=False
        )
        checkpoints.close()
        return result.state, batches.seen

    whole, order = run("whole", 12)
    _, first = run("parts", 7)
    resumed, then = run("parts", 12)
    assert first + then == order
    assert_same_bits(resumed, whole)
    batch = next(grain_stream())
    assert batch.candidates.inputs.shape == (ROWS, FEATURES) and batch.val.mask.dtype == bool


# --- on the devices --------------------------------------------------------------------------


def trained(runner, method, stream):
    state = method.init(jax.random.key(0), floats(pools().candidates.inputs[:1]))
    return fit(runner, state, stream, num_steps=STEPS, progress=False).state


# On four devices: tests/parallel/two_process_test.py.
@pytest.mark.parametrize("kind, devices", [("jit", 1), ("pmap", 2)])
def test_the_same_training_whichever_way_the_data_come(kind, devices):
    method = saflex.make(from_linen(Classifier(MLP((8,)), 3)), optax.adam(1e-2), RunInfo(21, 3))
    options = dict(devices=jax.devices()[:devices])
    host = RUNNERS[kind](method.step, **options)
    held = host.hold(pools())
    first, second = (ArrayStream(pools(), batch_size=8, val_batch_size=8, seed=0) for _ in range(2))
    rows = IndexStream(sizes(pools()), batch_size=8, val_batch_size=8, seed=0)
    expected = trained(host, method, first)
    assert int(expected.step) == STEPS
    ahead = Prefetched(second, place=host.put_batch)
    assert_same_bits(trained(host, method, ahead), expected)
    assert_same_bits(trained(held, method, rows), expected)


def test_held_data_are_gathered_where_they_are():
    # Every device picks its rows of its own copy: no sample travels.
    mesh = auto_mesh(jax.devices(), "data")
    on_all, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    held = jax.device_put(Streams(pool(64), pool(16)), on_all)
    rows = jax.device_put(Streams(np.arange(16), np.arange(8)), split)
    text = jax.jit(take, out_shardings=split).lower(held, rows).compile().as_text()
    assert "gather" in text
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.parametrize("holds", [False, True])
def test_the_wrong_kind_of_batch_is_named(holds):
    runner, state = make_run()
    whole = Streams(pool(21), pool(8, seed=1))
    stream = ArrayStream if holds else lambda pools, **options: IndexStream(sizes(pools), **options)
    runner = runner.hold(whole) if holds else runner
    kinds = ["rows of its data .*IndexStream.", "samples .*ArrayStream."]
    message = f"batches must be {kinds[not holds]}; given {kinds[holds]}"
    with pytest.raises(ValueError, match=message):
        fit(runner, state, stream(whole, batch_size=8, seed=0), num_steps=1, progress=False)


@pytest.mark.parametrize("kind", RUNNERS)
def test_what_is_placed_stays_and_what_lies_elsewhere_moves(kind):
    runner, batch = RUNNERS[kind](summing_step), Streams(pool(16))
    placed = runner.put_batch(batch)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x is y, runner.put_batch(placed), placed)))
    moved = runner.put_batch(jax.device_put(batch, jax.devices()[3]))
    assert_same_bits(moved, placed)
    assert jax.tree.map(lambda x: x.sharding, moved) == jax.tree.map(lambda x: x.sharding, placed)


@pytest.mark.parametrize("kind", RUNNERS)
def test_steps_on_held_data_transfer_nothing(kind):
    held = RUNNERS[kind](summing_step).hold(Streams(pool(21)))
    rows = np.arange(20, 4, -1)
    state, placed = held.put_state(summing_state()), held.put_batch(Streams(rows))
    with jax.transfer_guard("disallow"):
        _, metrics = held.step(state, placed)
    mean = pool(21).inputs[rows].sum(-1).mean()
    assert float(np.divide(*metrics["loss"])) == pytest.approx(mean, rel=1e-5)


def test_rows_past_the_end_of_held_data_are_refused():
    runner, _ = make_run()
    rows = Streams(np.arange(14, 22), np.arange(8))
    with pytest.raises(ValueError, match=r"rows of candidates must lie in \[0, 21\); row 7 is 21"):
        runner.hold(Streams(pool(21), pool(8, seed=1))).put_batch(rows)


def test_held_data_are_checked():
    bad = pools()._replace(val=images(8, 1)._replace(labels=np.ones((8, 3), np.float32)))
    with pytest.raises(ValueError, match=r"val.labels must have rows .* sum to one"):
        jit_runner(make_method().step).hold(bad)


def test_a_stopped_run_goes_on_with_another_way_of_reading(tmp_path):
    whole = Streams(pool(21), pool(8, seed=1))

    def plain():
        return ArrayStream(whole, batch_size=8, seed=0)

    def run(folder, steps, stream, changes=()):
        runner, state = make_run()
        checkpoints = Checkpoints(tmp_path / folder, every=100)
        result = fit(
            runner,
            state,
            Tampered(stream, changes),
            num_steps=steps,
            checkpoints=checkpoints,
            progress=False,
        )
        checkpoints.close()
        return result

    def interrupt(batch):
        signal.raise_signal(signal.SIGINT)
        return batch

    expected = run("whole", STEPS, plain())
    stopped = run("parts", STEPS, Prefetched(plain()), {5: interrupt})
    assert stopped.stopped_by == signal.SIGINT and int(stopped.state.step) < STEPS
    assert_same_bits(run("parts", STEPS, plain()).state, expected.state)


# --- folds -----------------------------------------------------------------------------------

NUMBER, TRUSTED, FOLDS = 20, np.array([18, 3, 7, 11, 0, 5, 9]), 3  # folds of 3, 2 and 2


def folded(**options):
    given = {"trusted": TRUSTED, "folds": FOLDS, "seed": 4, "batch_size": 4, "val_batch_size": 2}
    return FoldStream(Streams(NUMBER, len(TRUSTED)), **(given | options))


def test_no_sample_validates_a_batch_that_it_may_train_in():
    stream = folded()
    batches = [next(stream) for _ in range(60)]
    validates = [set(TRUSTED[b.val]) for b in batches]
    for turn in range(FOLDS):  # over the run, all of a fold's rows and all others
        val = set.union(*validates[turn::FOLDS])
        trained = np.concatenate([b.candidates for b in batches[turn::FOLDS]])
        assert not val & set(trained) and val | set(trained) == set(range(NUMBER))
    folds = [set.union(*validates[turn::FOLDS]) for turn in range(FOLDS)]
    assert sorted(map(len, folds)) == [2, 2, 3] and set.union(*folds) == set(TRUSTED)


def test_folds_give_every_sample_its_share():
    # Per fold an epoch of the others takes 20 - n_fold rows: after so many batches of one row each,
    # every other row came once.
    stream = folded(folds=7, batch_size=1, val_batch_size=None)
    batches = [next(stream) for _ in range(7 * 19)]
    assert all(len(b.val) == 1 for b in batches)
    trained = np.bincount([int(b.candidates[0]) for b in batches], minlength=NUMBER)
    np.testing.assert_array_equal(trained, np.where(np.isin(np.arange(NUMBER), TRUSTED), 6, 7))
    validated = np.bincount([int(b.val[0]) for b in batches])
    np.testing.assert_array_equal(validated, np.full(7, 19))


def test_folds_are_a_function_of_seed_and_step_for_any_number_of_processes():
    whole = folded()
    batches = [next(whole) for _ in range(9)]
    resumed = folded()
    resumed.set_state({"step": 5})
    assert_same_bits(next(resumed), batches[5])
    parts = [folded(process_index=p, process_count=2) for p in range(2)]
    for batch in batches:
        shares = [next(part) for part in parts]
        assert_same_bits(jax.tree.map(lambda *x: np.concatenate(x), *shares), batch)
    other = [next(stream) for stream in [folded(seed=5)] for _ in range(9)]
    assert any((a.candidates != b.candidates).any() for a, b in zip(batches, other))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"folds": 1}, "folds must be a whole number >= 2; given 1"),
        ({"folds": 8}, "at least one a fold; given 7 of 7 in 8 folds"),
        ({"trusted": TRUSTED[:6]}, "trusted must be .* given 6 of 7 in 3 folds"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_malformed_folds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        folded(**options)
    with pytest.raises(ValueError, match="clean samples are not supported"):
        FoldStream(Streams(9, 3, 9), trusted=np.arange(3), folds=3, seed=0, batch_size=2)
