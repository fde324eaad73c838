import grain
import jax
import numpy as np
import pytest

from saflex_jax import Batch, Streams
from saflex_jax.data import SOURCES, ArrayStream, stratified_split, symmetric_noise
from saflex_jax.train import Checkpoints, fit
from tests.train.setup_ import (
    CLASSES,
    FEATURES,
    ROWS,
    Tampered,
    assert_same_bits,
    make_run,
    pool,
)


def stream(size=21, rows=8, *, val=6, seed=0, **kwargs):
    return ArrayStream(Streams(pool(size), pool(val, seed=1)), batch_size=rows, seed=seed, **kwargs)


def indices(batches, part="candidates"):
    return np.concatenate([getattr(b, part).index for b in batches])


# --- ArrayStream -----------------------------------------------------------------------------


@pytest.mark.parametrize("size, rows", [(21, 8), (24, 8), (5, 8), (3, 8), (7, 1)])
def test_every_sample_once_an_epoch(size, rows):
    # Also where an epoch ends inside a batch, or a batch holds several.
    batches, epochs = stream(size, rows), 6
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
    whole, resumed = stream(), stream()
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
    whole = stream(21, 8, val=8)
    parts = [stream(21, 8, val=8, process_index=i, process_count=count) for i in range(count)]
    for _ in range(9):
        shares = [next(part) for part in parts]
        assert all(len(s.candidates.index) == 8 // count for s in shares)
        assert_same_bits(jax.tree.map(lambda *x: np.concatenate(x), *shares), next(whole))


def test_the_whole_validation_set_in_every_batch():
    for val_batch_size in (None, 6):
        batches = stream(val=6, val_batch_size=val_batch_size)
        for _ in range(5):
            assert sorted(next(batches).val.index) == list(range(6))
    assert next(ArrayStream(Streams(pool(9)), batch_size=2, seed=0)).val is None


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: stream(rows=0), "batch_size must be positive and finite; given 0"),
        (lambda: stream(val_batch_size=-2), "val_batch_size must be positive and finite; given -2"),
        (lambda: stream(size=0), "candidates must hold at least one sample; given 0"),
        (lambda: stream(val=0), "val must hold at least one sample; given 0"),
        (lambda: stream(process_count=3), "batch of candidates must be a multiple of 3 .*given 8"),
        (
            lambda: stream(val=6, process_count=4),
            "batch of val must be a multiple of 4 processes; given 6",
        ),
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


# --- sources, splits, noise ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size, shape, dtype",
    [("digits", 1797, (8, 8, 1), np.float32), ("wdbc", 569, (30,), np.float64)],
)
def test_sources(name, size, shape, dtype):
    data = SOURCES[name]()
    assert data.inputs.shape == (size, *shape) and data.inputs.dtype == dtype
    assert data.labels.shape == (size,)
    assert sorted(set(data.labels.tolist())) == list(range(data.num_classes))
    assert np.isfinite(data.inputs).all()
    if len(shape) == 3:
        assert data.inputs.min() == 0 and data.inputs.max() == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.333, 1.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_noise_changes_exactly_a_share(share, classes):
    labels = np.random.default_rng(0).integers(classes, size=500)
    original = labels.copy()
    noisy = symmetric_noise(labels, classes, share=share, seed=3)
    assert (noisy != labels).sum() == round(share * 500)
    assert noisy.min() >= 0 and noisy.max() < classes
    np.testing.assert_array_equal(labels, original)
    np.testing.assert_array_equal(noisy, symmetric_noise(labels, classes, share=share, seed=3))
    if 0 < share < 1:
        assert (noisy != symmetric_noise(labels, classes, share=share, seed=4)).any()


def test_noise_is_uniform_over_the_other_classes():
    labels = np.zeros(30_000, int)
    counts = np.bincount(symmetric_noise(labels, 4, share=1.0, seed=0), minlength=4)
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:], 10_000, atol=5 * np.sqrt(30_000 * 2 / 9))  # 5 sigma


@pytest.mark.parametrize(
    "labels, kwargs, message",
    [
        (np.arange(3), {"share": 1.1}, r"share must lie in \[0, 1\]; given 1.1"),
        (np.arange(3), {"share": -0.1}, r"share must lie in \[0, 1\]; given -0.1"),
        (np.arange(4), {"share": 0.5}, r"labels must lie in \[0, 3\); row 3 is 3"),
        (np.array([0, -1]), {"share": 0.5}, r"labels must lie in \[0, 3\); row 1 is -1"),
        (np.ones(3), {"share": 0.5}, r"labels must be integers of shape \[N\]; given float64\[3\]"),
    ],
)
def test_noise_errors(labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        symmetric_noise(labels, 3, seed=0, **kwargs)


@pytest.mark.parametrize("val, test", [(30, 60), (7, 3), (150, 100)])
def test_splits_are_disjoint_complete_and_in_proportion(val, test):
    labels = np.repeat([0, 1, 2], [150, 90, 60])[np.random.default_rng(0).permutation(300)]
    parts = stratified_split(labels, val=val, test=test, seed=0)
    assert [len(p) for p in parts] == [300 - val - test, val, test]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(300))
    for part in parts:
        counts = np.bincount(labels[part], minlength=3)
        # Two draws, each of which rounds a class up or down.
        assert (np.abs(counts - len(part) * np.array([0.5, 0.3, 0.2])) <= 2).all()
    again = stratified_split(labels, val=val, test=test, seed=0)
    assert all((a == b).all() for a, b in zip(parts, again))
    other = stratified_split(labels, val=val, test=test, seed=1)
    assert any((a != b).any() for a, b in zip(parts, other))


@pytest.mark.parametrize(
    "val, test, message",
    [
        (0, 10, "the val split must hold at least one sample for each of 3 classes; given 0 of 30"),
        (10, 2, "the test split .*given 2 of 30"),
        (14, 14, "the train split .*given 2 of 30"),
        (20, 20, "the train split .*given -10 of 30"),
    ],
)
def test_split_errors(val, test, message):
    with pytest.raises(ValueError, match=message):
        stratified_split(np.arange(30) % 3, val=val, test=test, seed=0)
