"""Reading ahead and data that stays on the devices: the same batches, the same training."""

import re
import signal
import threading

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from saflex_jax import Batch, Streams
from saflex_jax._compat import auto_mesh
from saflex_jax.batches import floats, take
from saflex_jax.data import ArrayStream, IndexStream, Prefetched, Rows, sizes
from saflex_jax.methods import saflex
from saflex_jax.models import Classifier, SmallCNN, from_linen
from saflex_jax.parallel import RUNNERS, jit_runner
from saflex_jax.train import Checkpoints, fit
from tests.train.setup_ import Tampered, assert_same_bits, make_method, make_run, pool

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


@pytest.mark.parametrize("name, value", [("threads", 0), ("ahead", 0), ("threads", 1.5)])
def test_prefetch_errors(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= 1; given {value}"):
        Prefetched(IndexStream(sizes(pools()), batch_size=8, seed=0), **{name: value})


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="the number of val must be a whole number >= 1; given 0"):
        IndexStream(Streams(3, 0), batch_size=1, seed=0)


# --- on the devices --------------------------------------------------------------------------


def trained(runner, method, stream):
    state = method.init(jax.random.key(0), floats(pools().candidates.inputs[:1]))
    return fit(runner, state, stream, num_steps=STEPS, progress=False).state


@pytest.mark.parametrize("kind, devices", [("jit", 1), ("jit", 4), ("pmap", 2)])
def test_the_same_training_whichever_way_the_data_come(kind, devices):
    backbone = SmallCNN(widths=(4,), norm="group")
    method = saflex.make(from_linen(Classifier(backbone, 3)), optax.adam(1e-2))
    options = dict(devices=jax.devices()[:devices])
    host = RUNNERS[kind](method.step, **options)
    held = host.hold(pools())
    stream = lambda: ArrayStream(pools(), batch_size=8, val_batch_size=8, seed=0)
    rows = IndexStream(sizes(pools()), batch_size=8, val_batch_size=8, seed=0)
    expected = trained(host, method, stream())
    assert int(expected.step) == STEPS
    ahead = Prefetched(stream(), place=host.put_batch)
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


def test_held_data_are_checked():
    bad = pools()._replace(val=images(8, 1)._replace(labels=np.ones((8, 3), np.float32)))
    with pytest.raises(ValueError, match=r"val.labels must have rows .* sum to one"):
        jit_runner(make_method().step).hold(bad)


def test_a_stopped_run_goes_on_with_another_way_of_reading(tmp_path):
    whole = Streams(pool(21), pool(8, seed=1))
    plain = lambda: ArrayStream(whole, batch_size=8, seed=0)

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
