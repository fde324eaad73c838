import io

import jax
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image
from scipy import stats

from saflex_jax import Batch, Streams
from saflex_jax.data import ArrayStream, Pool, write_array_record
from tests.train.setup_ import assert_same_bits

SOURCE = np.array([4, 0, 2, 0, 0, 2])  # 1, 3 and everything after 4 have no candidates
SHAPE = (3, 2, 1)
INPUTS = np.random.default_rng(0).random((6, *SHAPE)).astype(np.float32)
CLASSES = np.array([1, 0, 2, 1, 1, 0])
SOFT = np.random.default_rng(1).dirichlet(np.ones(3), size=6).astype(np.float32)


def records(path, inputs=INPUTS, labels=SOFT, source=SOURCE):
    write_array_record(path, inputs, labels, source)
    return path


def folder(path, labels="soft", images=None):
    """Images whose pixels are their place in SOURCE; draws are numbered out of order, with gaps."""
    names = ["4/07.png", "0/3.png", "2/10.bmp", "0/20.PNG", "0/100.png", "2/9.png"]
    rows = ["file,label" if labels == "hard" else "file,p0,p1,p2"]
    for place, name in enumerate(names):
        (path / name).parent.mkdir(exist_ok=True)
        pixels = np.uint8(np.round(255 * INPUTS[place, ..., 0]))
        Image.fromarray(pixels if images is None else images[place]).save(path / name)
        values = [CLASSES[place]] if labels == "hard" else SOFT[place]
        rows.append(",".join([name, *map(str, values)]))
    (path / "labels.csv").write_text("\n".join(rows))
    return path


# what candidate (source, draw) is, as a place in SOURCE; draws follow the order given
PLACES = {(4, 0): 0, (0, 0): 1, (0, 1): 3, (0, 2): 4, (2, 0): 2, (2, 1): 5}
BY_NAME = {**PLACES, (2, 0): 5, (2, 1): 2}  # 2/9 comes before 2/10


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("storage", ["arrays", "records", "folder"])
def test_a_pool_gives_the_candidates_of_every_source(storage, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("saflex_jax.data.pool.CHUNK", 4)  # six records are a chunk and a half
    labels = SOFT if kind == "soft" else CLASSES
    known = {"num_classes": None if kind == "soft" else 3}
    if storage == "arrays":
        pool = Pool.from_arrays(INPUTS, labels, SOURCE, **known)
    elif storage == "records":
        pool = Pool.from_array_record(records(tmp_path / "x", labels=labels), **known)
    else:
        pool = Pool.from_folder(folder(tmp_path, kind), **known)
    assert len(pool) == 5 and pool.num_classes == 3 and pool.shape == SHAPE
    np.testing.assert_array_equal(pool.draws(np.arange(5)), [3, 0, 2, 0, 1])
    pairs, places = zip(*(BY_NAME if storage == "folder" else PLACES).items())
    inputs, found = pool(*np.array(pairs).T)
    assert inputs.dtype == found.dtype == np.float32
    exact = storage != "folder"  # images have 8 bits
    np.testing.assert_allclose(inputs, INPUTS[list(places)], atol=0 if exact else 0.5 / 255 + 1e-6)
    expected = SOFT if kind == "soft" else np.eye(3)[CLASSES]
    np.testing.assert_allclose(found, expected[list(places)], atol=1e-7)
    repeated, _ = pool(np.array([0, 4, 0]), np.array([2, 0, 2]))  # any order, also twice
    np.testing.assert_array_equal(repeated[0], repeated[2])
    assert pool(np.zeros(0, int), np.zeros(0, int))[0].shape == (0, *SHAPE)


def test_sources_may_go_on_after_the_last_candidate():
    pool = Pool.from_arrays(INPUTS, SOFT, SOURCE, num_sources=9)
    assert len(pool) == 9
    np.testing.assert_array_equal(pool.draws(np.arange(9)), [3, 0, 2, 0, 1, 0, 0, 0, 0])


def test_images_are_decoded_to_colour_and_resized(tmp_path):
    rng = np.random.default_rng(2)
    images = [rng.integers(256, size=(4 + i, 7, 3)).astype(np.uint8) for i in range(6)]
    pool = Pool.from_folder(folder(tmp_path, images=images), size=(5, 7))
    inputs, _ = pool(np.array([0, 4]), np.array([0, 0]))
    assert inputs.shape == (2, 5, 7, 3)
    np.testing.assert_allclose(inputs[0], images[1] / 255, atol=1e-6)  # of that size already
    # Halfway from rows of one image to the next: linear, up to the rounding to 8 bits.
    stripes = [np.repeat(np.uint8([0, 0, 100, 100, 200, 200])[:, None], 4, 1)] * 6
    inputs, _ = Pool.from_folder(folder(tmp_path, images=stripes), size=(3, 4))(
        np.array([0]), np.array([0])
    )
    assert inputs.shape == (1, 3, 4, 1)
    rows = 255 * inputs[0, :, 0, 0]
    # A triangle over four rows with weights 1 3 3 1, cut off at the edges.
    expected = [(3 * 0 + 3 * 0 + 100) / 7, (0 + 300 + 300 + 200) / 8, (100 + 600 + 600) / 7]
    np.testing.assert_allclose(rows, expected, atol=1.01)


@pytest.mark.parametrize("name", ["jpg", "jpeg", "webp"])
def test_lossy_images_decode(name, tmp_path):
    (tmp_path / "0").mkdir()
    Image.new("RGB", (8, 6), (250, 120, 10)).save(tmp_path / "0" / f"0.{name}")
    (tmp_path / "labels.csv").write_text(f"file,label\n0/0.{name},1\n")
    inputs, labels = Pool.from_folder(tmp_path, num_classes=2)(np.array([0]), np.array([0]))
    np.testing.assert_allclose(inputs[0], np.tile([250, 120, 10], (6, 8, 1)) / 255, atol=0.03)
    np.testing.assert_array_equal(labels, [[0, 1]])


def test_what_cannot_be_written_changes_nothing(tmp_path):
    path = records(tmp_path / "x.array_record")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="must lie"):
        records(path, source=SOURCE - 1)
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="cannot be written"):
        records(tmp_path / "missing" / "x")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path, monkeypatch):
    path = records(tmp_path / "x")
    before, written, savez = path.read_bytes(), [], np.savez

    def fails(*args, **kwargs):
        written.append(sorted(p.name for p in tmp_path.iterdir()))
        if len(written) == 3:
            raise RuntimeError("disk full")
        savez(*args, **kwargs)

    monkeypatch.setattr("saflex_jax.data.pool.np.savez", fails)
    with pytest.raises(OSError, match="disk full"):
        records(path, inputs=1 - INPUTS)
    assert path.read_bytes() == before
    part, old = written[-1]
    assert old == "x" and part.startswith(".x.")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_of_two_writers_of_a_file_the_last_one_stays(tmp_path, monkeypatch):
    path, savez = tmp_path / "x", np.savez

    def second(*args, **kwargs):  # while the first writes
        monkeypatch.undo()
        records(path, inputs=1 - INPUTS)
        savez(*args, **kwargs)

    monkeypatch.setattr("saflex_jax.data.pool.np.savez", second)
    first = records(path).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert records(tmp_path / "alone").read_bytes() == first


# --- errors


def arrays(inputs=INPUTS, labels=SOFT, source=SOURCE, **kwargs):
    return Pool.from_arrays(inputs, labels, source, **kwargs)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: arrays(np.int32(255 * INPUTS)), "inputs must be floats .* given int32"),
        (lambda: arrays(INPUTS[:5]), r"inputs must be floats with a row for each of 6 sources"),
        (lambda: arrays(np.where(INPUTS > 0.9, np.nan, INPUTS)), "inputs must be finite"),
        (lambda: arrays(labels=SOFT[:5]), r"source must have shape \[5\]; given \(6,\)"),
        (lambda: arrays(labels=2 * SOFT), "labels must have rows >= 0 that sum to one; row 0"),
        (lambda: arrays(labels=CLASSES), "num_classes must be a number .* given None"),
        (lambda: arrays(labels=CLASSES, num_classes=2), r"labels must lie in \[0, 2\); row 2 is 2"),
        (lambda: arrays(num_classes=4), "labels must have 4 columns; given 3"),
        (lambda: arrays(source=SOURCE - 1), r"source must lie in .*; row 1 is -1"),
        (lambda: arrays(source=SOURCE / 1), "source must be integers .* given float64"),
        (lambda: arrays(num_sources=4), r"source must lie in \[0, 4\); row 0 is 4"),
        (lambda: arrays(INPUTS[:0], SOFT[:0], SOURCE[:0]), "pool must hold at least one candidate"),
        (lambda: arrays().draws(np.array([1, 5])), r"index must lie in \[0, 5\); row 1 is 5"),
        (lambda: arrays().draws(np.array([-1])), r"index must lie in \[0, 5\); row 0 is -1"),
        (lambda: arrays().draws(np.array([1.0])), "index must be integers"),
        (
            lambda: arrays()(np.array([0, 2]), np.array([2, 2])),
            r"draw must lie in \[0, 2\); row 1 is 2",
        ),
        (lambda: arrays()(np.array([1]), np.array([0])), r"draw must lie in \[0, 0\); row 0 is 0"),
        (lambda: arrays()(np.array([0, 2]), np.array([0])), r"draw must have shape \[2\]"),
    ],
)
def test_array_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def rewrite(path, old, new):
    file = path / "labels.csv"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: rewrite(p, "2/9.png", "2/8.png"), r"labels.csv must have a row for 2/9.png"),
        (lambda p: rewrite(p, "2/9.png", "4/07.png"), r"must have one row for 4/07.png; given two"),
        (lambda p: rewrite(p, "file,label", "name,label"), "must have the header .*'name'"),
        (lambda p: rewrite(p, "0/3.png,0", "0/3.png,cat"), "numbers for 0/3.png; given .*cat"),
        (lambda p: rewrite(p, "0/3.png,0", "0/3.png,0,1"), "must have 1 numbers for 0/3.png"),
        (lambda p: rewrite(p, "0/3.png,0", "0/3.png,3"), r"labels must lie in \[0, 3\).* is 3"),
        (lambda p: (p / "2").rename(p / "two"), "the source must be a number.* given .*two"),
        (lambda p: (p / "2").rename(p / "2.old"), "the source must be a number.* given .*2.old"),
        (lambda p: (p / "2/9.png").rename(p / "2/a.png"), "the draw must be a number.*a.png"),
        (lambda p: (p / "0/3.png").write_bytes(b"no image"), "0/3.png does not decode"),
        (
            lambda p: Image.new("RGBA", (2, 3)).save(p / "0/3.png"),
            "0/3.png does not decode: its mode must be one of .* given 'RGBA'",
        ),
        (
            lambda p: Image.new("L", (5, 5)).save(p / "0/100.png"),
            r"0/100.png must have shape \(3, 2, 1\), .* given \(5, 5, 1\); `size`",
        ),
        (
            lambda p: (p / "4/07.png").write_bytes((p / "4/07.png").read_bytes()[:50]),
            "4/07.png does not decode",
        ),
    ],
)
def test_folder_errors_name_the_file(spoil, message, tmp_path):
    spoil(folder(tmp_path, "hard"))
    with pytest.raises(ValueError, match=message):
        Pool.from_folder(tmp_path, num_classes=3)(np.array([0, 0, 4]), np.array([0, 2, 0]))


def test_a_deleted_image_is_no_candidate_any_more(tmp_path):
    (folder(tmp_path) / "0" / "20.PNG").unlink()
    pool = Pool.from_folder(tmp_path)
    np.testing.assert_array_equal(pool.draws(np.arange(5)), [2, 0, 2, 0, 1])
    np.testing.assert_allclose(pool(np.array([0]), np.array([1]))[1], SOFT[4:5], atol=1e-7)


def test_folder_and_size_must_be_usable(tmp_path):
    with pytest.raises(ValueError, match="must hold images"):
        Pool.from_folder(tmp_path)
    folder(tmp_path)
    with pytest.raises(ValueError, match=r"size must be \(H, W\)"):
        Pool.from_folder(tmp_path, size=(0, 4))


def raw(path, *contents):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        packed = io.BytesIO()
        np.savez(packed, **content)
        writer.write(packed.getvalue())
    writer.close()


def test_record_errors_name_the_file(tmp_path):
    path = tmp_path / "x"
    first = dict(inputs=INPUTS[0], labels=SOFT[0], source=0)

    def pool():
        return Pool.from_array_record(path)(np.array([0, 0]), np.array([0, 1]))

    with pytest.raises(ValueError, match=r"path must be an ArrayRecord .*x"):
        pool()
    raw(path, first, dict(inputs=INPUTS[0], labels=SOFT[0]))
    with pytest.raises(ValueError, match=r"x does not decode.*source"):
        pool()
    raw(path, first, first | dict(inputs=INPUTS[0, :2]))
    with pytest.raises(ValueError, match=r"record 1 of .*x must have shape \(3, 2, 1\)"):
        pool()
    raw(path, first, first | dict(inputs=np.full(SHAPE, np.nan, np.float32)))
    with pytest.raises(ValueError, match=r"record 1 of .*x must be finite"):
        pool()
    raw(path, first, first)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="x"):
        pool()


# --- in the stream

ROWS = 40


def originals(classes=3):
    labels = np.tile(np.eye(classes, dtype=np.float32)[0], (ROWS, 1))
    index = np.random.default_rng(3).permutation(ROWS).astype(np.int32)
    return Batch(-1 - np.arange(ROWS, dtype=np.float32)[:, None], labels, index >= 0, index)


def generated(**changes):
    """Source i has i % 4 candidates; input 100 i + draw, class 1 or 2 by the draw."""
    source = np.repeat(np.arange(ROWS), np.arange(ROWS) % 4)
    draw = np.concatenate([np.arange(i % 4) for i in range(ROWS)])
    inputs = (100.0 * source + draw)[:, None]
    return Pool.from_arrays(inputs, 1 + draw % 2, source, **({"num_classes": 3} | changes))


def stream(**kwargs):
    kwargs = {"batch_size": 16, "seed": 5, "generated": generated()} | kwargs
    return ArrayStream(Streams(originals(), originals(), originals()), **kwargs)


def test_candidates_and_their_labels_are_the_generators_and_all_else_stays():
    plain, batches = stream(generated=None), stream()
    visits = []
    for _ in range(400):
        without, batch = next(plain), next(batches)
        assert_same_bits((batch.val, batch.clean), (without.val, without.clean))
        found, rows = batch.candidates, without.candidates
        assert_same_bits((found.index, found.mask), (rows.index, rows.mask))
        assert found.inputs.dtype == np.float32
        kept = found.index % 4 == 0
        assert_same_bits(found.inputs[kept], rows.inputs[kept])
        assert_same_bits(found.labels[kept], rows.labels[kept])
        made = found.inputs[~kept, 0]
        draw = np.int64(made % 100)
        np.testing.assert_array_equal(made // 100, found.index[~kept])
        np.testing.assert_array_equal(found.labels[~kept], np.eye(3)[1 + draw % 2])
        visits += zip(found.index[~kept].tolist(), draw.tolist())
    for count in (2, 3):  # uniform, and independent from source to source
        draws = [d for i, d in visits if i % 4 == count]
        assert stats.chisquare(np.bincount(draws, minlength=count)).pvalue > 1e-3
        one = [d for i, d in visits if i == count]
        assert stats.chisquare(np.bincount(one, minlength=count)).pvalue > 1e-3


def test_draws_are_a_function_of_the_position_alone():
    whole, resumed = stream(), stream()
    batches = [next(whole) for _ in range(12)]
    resumed.set_state({"step": 7})
    assert resumed.get_state() == {"step": 7}
    for batch in batches[7:]:
        assert_same_bits(next(resumed), batch)
    other = next(stream(seed=6)), next(stream(seed=5))
    assert_same_bits(other[1], batches[0])

    # In every step and under every seed draws of their own.
    def draws(b):
        return dict(zip(b.candidates.index.tolist(), b.candidates.inputs[:, 0]))

    for a, b in ((batches[0], batches[3]), (batches[0], other[0])):
        a, b = draws(a), draws(b)
        several = [i for i in a if i in b and i % 4 > 1]
        assert len(several) > 2 and any(a[i] != b[i] for i in several)


def test_processes_together_see_the_global_batches():
    whole = stream()
    parts = [stream(process_index=i, process_count=2) for i in range(2)]
    for _ in range(6):
        shares = [next(part) for part in parts]
        assert_same_bits(jax.tree.map(lambda *x: np.concatenate(x), *shares), next(whole))


def test_a_source_without_candidates_everywhere_changes_nothing():
    one = Pool.from_arrays(np.ones((1, 1)), np.array([1]), np.array([0]), num_classes=3)
    batches = Streams(jax.tree.map(lambda x: x[originals().index == 7], originals()))
    none = Pool.from_arrays(np.ones((1, 1)), [1], [0], num_classes=3, num_sources=ROWS)
    found = next(ArrayStream(batches, batch_size=1, seed=0, generated=none))
    assert_same_bits(found, next(ArrayStream(batches, batch_size=1, seed=0)))
    with pytest.raises(ValueError, match=r"candidates.index must lie in \[0, 1\).* given 7 to 7"):
        ArrayStream(batches, batch_size=1, seed=0, generated=one)


@pytest.mark.parametrize(
    "pools, pool, message",
    [
        (originals(4), generated(), "generated.num_classes must be 4; given 3"),
        (
            originals()._replace(inputs=np.zeros((ROWS, 2), np.float32)),
            generated(),
            r"generated.shape must be \(2,\); given \(1,\)",
        ),
        (
            originals()._replace(inputs=np.zeros((ROWS, 1))),
            generated(),
            "candidates.inputs must be float32 or uint8; given float64",
        ),
        (
            originals()._replace(inputs={"table": np.zeros((ROWS, 1), np.float32)}),
            generated(),
            "candidates.inputs must be float32 or uint8; given dict",
        ),
    ],
)
def test_a_pool_that_does_not_fit_is_refused(pools, pool, message):
    with pytest.raises(ValueError, match=message):
        ArrayStream(Streams(pools), batch_size=4, seed=0, generated=pool)
