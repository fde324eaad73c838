"""Every kind of file behind the one interface, and the messages about bad ones."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from saflex_jax import data
from saflex_jax.data import Rows
from tests.data.files_ import SIZES, Tiny, medmnist, save

RNG = np.random.default_rng(0)


# --- rows that are read when they are asked for ------------------------------------------------


def counted(array):
    """(Rows of the array, the places that were read)."""
    seen = []

    def read(places):
        seen.extend(places.tolist())
        return array[places]

    return Rows(read, len(array), array.shape[1:], array.dtype), seen


@pytest.mark.parametrize(
    "places", [3, -1, slice(2, 5), slice(None, None, -2), [4, 4, 0], np.array([True, False] * 4)]
)
def test_rows_index_as_the_array_and_read_no_more(places):
    array = RNG.integers(0, 256, (8, 2, 3), dtype=np.uint8)
    rows, seen = counted(array)
    assert (rows.shape, rows.dtype, rows.ndim, len(rows)) == (array.shape, array.dtype, 3, 8)
    assert not seen
    np.testing.assert_array_equal(rows[places], array[places])
    np.testing.assert_array_equal(seen, np.arange(8)[places])


def test_rows_out_of_range_and_whole():
    array = RNG.random((5, 2)).astype(np.float32)
    rows, _ = counted(array)
    with pytest.raises(IndexError):
        rows[5]
    np.testing.assert_array_equal(np.asarray(rows), array)
    assert np.asarray(rows, np.float64).dtype == np.float64


@pytest.mark.parametrize("lazy", [False, True])
def test_subset_and_joined(lazy):
    a, b = (RNG.integers(0, 256, (n, 2), dtype=np.uint8) for n in (7, 4))
    (first, seen), (second, _) = counted(a), counted(b)
    if not lazy:
        first, second = a, b
    made = data.joined(data.subset(first, np.array([5, 1, 1])), second)
    assert not seen and len(made) == 7
    places = np.array([6, 0, 3, 2])
    np.testing.assert_array_equal(made[places], np.concatenate([a[[5, 1, 1]], b])[places])
    table = {"numeric": a, "categorical": b[[0, 1, 2, 3, 0, 1, 2]]}
    np.testing.assert_array_equal(data.subset(table, np.array([2]))["categorical"], b[[2]])


@pytest.mark.parametrize("second", [np.zeros((2, 3), np.float32), np.zeros((2, 4), np.uint8)])
def test_what_does_not_join_is_refused(second):
    first = np.zeros((2, 3), np.uint8)
    for one in (first, counted(first)[0]):
        with pytest.raises(ValueError, match=r"rows uint8\[3\], as first; given"):
            data.joined(one, second)


def test_resized_is_pillows():
    pixels = RNG.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    for channels in (1, 3):
        images = pixels[..., :channels]
        made = data.resized(images, (4, 5))
        assert made.shape == (3, 4, 5, channels) and made.dtype == np.uint8
        picture = Image.fromarray(images[1, ..., 0] if channels == 1 else images[1])
        expected = np.asarray(picture.resize((5, 4), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(made[1], expected.reshape(4, 5, channels))
    assert data.resized(pixels, (6, 8)) is pixels
    with pytest.raises(ValueError, match="images must be uint8 to be resized; given float64"):
        data.resized(np.zeros((1, 2, 2, 1)), (3, 3))


# --- labels ------------------------------------------------------------------------------------


def test_priors():
    np.testing.assert_array_equal(data.priors(np.array([2, 0]), 3), np.eye(3)[[2, 0]])
    graded = np.array([[0.25, 0.75], [1, 0]])
    np.testing.assert_array_equal(data.priors(graded, 2), graded)
    several = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    for labels, task in (
        (np.array([1]), "multiclass"),
        (graded, "ordinal"),
        (several, "multilabel"),
    ):
        assert data.priors(labels, 2 + (task == "multilabel") * 2, task).dtype == np.float32
    np.testing.assert_array_equal(
        data.priors(several, 4, "multilabel"), [[0.5, 0, 0.5, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    )
    for labels, task, message in (
        (np.array([0, 3]), "multiclass", r"labels must lie in \[0, 3\); row 1 is 3"),
        (graded * 2, "multiclass", r"labels must have shape \[N\] or \[N, 3\]"),
        (np.eye(3) * 2, "multiclass", "labels must have rows .* sum to one"),
        (several[:, :2] * 2, "multilabel", "multilabel labels must be 0 or 1"),
        (several, "multilabel", r"\[N, 2\] for 3 classes of multilabel; given \[3, 3\]"),
        (several, "several", "task must be one of .*given 'several'"),
    ):
        with pytest.raises(ValueError, match=message):
            data.priors(labels, 3, task)


@pytest.mark.parametrize(
    "name, size, shape, dtype",
    [("digits", 1797, (8, 8, 1), np.float32), ("wdbc", 569, (30,), np.float64)],
)
def test_sources(name, size, shape, dtype):
    source = data.SOURCES[name]()
    assert source.inputs.shape == (size, *shape) and source.inputs.dtype == dtype
    assert source.labels.shape == (size,)
    assert sorted(set(source.labels.tolist())) == list(range(source.num_classes))
    assert np.isfinite(source.inputs).all()
    if len(shape) == 3:
        assert source.inputs.min() == 0 and source.inputs.max() == 1


# --- .npz --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, labels", [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_npz(tmp_path, channels, labels):
    made = medmnist(channels, labels)
    np.savez_compressed(tmp_path / "x.npz", **made)
    source = data.from_npz(tmp_path / "x.npz")
    assert source.task == ("multiclass" if labels == 1 else "multilabel")
    assert source.num_classes == (3 if labels == 1 else 5)
    assert source.inputs.shape == (13, 5, 5, channels) and source.inputs.dtype == np.uint8
    assert {k: len(v) for k, v in source.splits.items()} == SIZES
    for name, rows in source.splits.items():
        images = made[f"{name}_images"].reshape(-1, 5, 5, channels)
        np.testing.assert_array_equal(source.inputs[rows], images)
        expected = made[f"{name}_labels"]
        np.testing.assert_array_equal(
            source.labels[rows], expected[:, 0] if labels == 1 else expected
        )
    if labels == 1:
        assert data.from_npz(tmp_path / "x.npz", task="ordinal").task == "ordinal"


def test_npz_errors(tmp_path):
    path, made = tmp_path / "x.npz", medmnist()
    several, three = medmnist(labels=3), medmnist(channels=3)
    without = {k: v for k, v in made.items() if k != "val_labels"}
    for content, message in (
        (without, "val_labels"),
        (made | {"test_labels": made["test_labels"][:2]}, r"given in test uint8\[4, 5, 5\] and"),
        (made | {"val_images": made["val_images"] / 255}, r"given in val float64\[3, 5, 5\]"),
        (made | {"val_labels": made["val_labels"] + 0.7}, r"uint8\[3, 5, 5\] and float64\[3, 1\]"),
        (made | {"val_images": made["val_images"][..., None]}, r"given in val uint8\[3, 5, 5, 1\]"),
        (made | {"test_images": three["test_images"]}, r"given in test uint8\[4, 5, 5, 3\]"),
        (made | {"test_labels": several["test_labels"]}, r"and uint8\[4, 3\]"),
        ({k: v[:0] for k, v in made.items()}, r"given in train uint8\[0, 5, 5\]"),
        (made | {"val_labels": made["val_labels"].astype(int) - 1}, "labels >= 0 of two or more"),
        (made | {f"{s}_labels": 0 * made[f"{s}_labels"] for s in SIZES}, "given 0 to 0"),
        ({k: 2 * v if "labels" in k else v for k, v in several.items()}, "3 labels at once"),
    ):
        np.savez(path, **content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} .*{message}"):
            data.from_npz(path)
    np.savez(path, **several)
    with pytest.raises(ValueError, match=r"3 labels at once, .* given .* and 'ordinal'"):
        data.from_npz(path, task="ordinal")
    with pytest.raises(ValueError, match=r"task must be one of .*given 'grades'"):
        data.from_npz(path, task="grades")
    np.savez(path, **made)
    whole = path.read_bytes()
    np.save(tmp_path / "y.npy", made["val_images"])
    for content in (whole[:-100], whole[: len(whole) // 2], (tmp_path / "y.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz must be an \.npz file"):
            data.from_npz(path)
    with pytest.raises(FileNotFoundError):
        data.from_npz(tmp_path / "z.npz")


def test_npz_counts_classes_up_to_the_greatest_in_any_split(tmp_path):
    made = medmnist()
    for name in SIZES:
        made[f"{name}_labels"][:] = 0
    made["test_labels"][1] = 4
    np.savez(tmp_path / "x.npz", **made)
    source = data.from_npz(tmp_path / "x.npz")
    assert source.num_classes == 5
    assert (source.labels - 1).min() == -1  # signed, where the file's are not


# --- folders -----------------------------------------------------------------------------------


def test_folder_with_splits(tmp_path):
    names = ["train/cat/1.png", "train/dog/0.png", "train/dog/2.bmp", "test/cat/0.png"]
    pixels = [save(tmp_path / name, seed) for seed, name in enumerate(names)]
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    source = data.from_folder(tmp_path)
    assert source.left_out == ("train/dog/notes.txt",)
    assert source.class_names == ("cat", "dog") and source.num_classes == 2
    np.testing.assert_array_equal(source.labels, [0, 1, 1, 0])
    assert source.splits["train"].tolist() == [0, 1, 2] and source.splits["test"].tolist() == [3]
    np.testing.assert_array_equal(np.asarray(source.inputs)[..., 0], pixels)
    small = data.from_folder(tmp_path, size=(2, 3), channels=3).inputs
    assert small.shape == (4, 2, 3, 3)
    np.testing.assert_array_equal(small[1][..., 0], small[1][..., 2])
    clear = RNG.integers(0, 256, (4, 6, 4), dtype=np.uint8)
    Image.fromarray(clear).save(tmp_path / "train" / "dog" / "0.png")  # with an alpha channel
    with pytest.raises(ValueError, match=r"dog/0\.png does not decode: its mode must be one of"):
        source.inputs[1]
    colours = data.from_folder(tmp_path, channels=3).inputs
    np.testing.assert_array_equal(colours[1], clear[..., :3])


def test_folder_without_splits_is_read_when_asked_for(tmp_path):
    pixels = [save(tmp_path / c / f"{n}.png", n, (3, 3, 3)) for n, c in enumerate("abb")]
    source = data.from_folder(tmp_path)
    assert not source.splits and source.labels.tolist() == [0, 1, 1]
    (tmp_path / "b" / "2.png").write_bytes(b"no image")
    np.testing.assert_array_equal(source.inputs[:2], pixels[:2])
    with pytest.raises(ValueError, match=r"b/2.png does not decode"):
        source.inputs[2]
    save(tmp_path / "b" / "2.png", 0, (4, 3, 3))
    message = (
        r"b/2.png must have shape \(3, 3, 3\), as .*a/0.png has; given \(4, 3, 3\); `size` and"
    )
    with pytest.raises(ValueError, match=message):
        source.inputs[[0, 2]]


@pytest.mark.parametrize("split", ["", "train/"])
def test_hidden_files_and_folders_of_a_folder_are_skipped(tmp_path, split):
    for name in ("a/0.png", "b/0.png", ".ipynb_checkpoints/0.png"):
        save(tmp_path / f"{split}{name}", 0)
    (tmp_path / ".git").mkdir()
    (tmp_path / f"{split}a" / "._0.png").write_bytes(b"no image")
    source = data.from_folder(tmp_path)
    assert source.extra["file"].tolist() == [f"{split}a/0.png", f"{split}b/0.png"]


def test_files_are_decoded_in_the_order_asked_for_whatever_the_case_of_their_suffix(tmp_path):
    pixels = [save(tmp_path / c / f"{n}.{s}", n) for n, (c, s) in enumerate(zip("aabbb", SUFFIXES))]
    places = [2, 4, 0, 3, 1, 0]
    inputs = data.from_folder(tmp_path, channels=1).inputs
    np.testing.assert_array_equal(inputs[places][..., 0], np.array(pixels)[places])


SUFFIXES = ("png", "PNG", "Bmp", "gif", "TIF")


def test_what_is_left_out_of_a_folder_is_named(tmp_path):
    for name in ("a/0.png", "b/0.png", "b/more/1.png"):
        save(tmp_path / name, 0)
    for name in ("notes.txt", "a/0.svg", "a/.DS_Store"):
        (tmp_path / name).write_text("no image")
    source = data.from_folder(tmp_path)
    assert len(source.labels) == 2 and source.left_out == ("a/0.svg", "b/more/1.png")


def test_modes_of_images_become_grey_or_colour(tmp_path):
    def read(image, name="0.png", **options):
        for folder in "ab":
            (tmp_path / folder).mkdir(exist_ok=True)
            image.save(tmp_path / folder / name, quality=100)
        found = data.from_folder(tmp_path, **options).inputs[0]
        for folder in "ab":
            (tmp_path / folder / name).unlink()
        return found

    colours = RNG.integers(0, 256, (5, 3), dtype=np.uint8)
    codes = RNG.integers(0, 5, (4, 6), dtype=np.uint8)
    palette = Image.fromarray(codes)
    palette.putpalette(colours.tobytes())
    np.testing.assert_array_equal(read(palette), colours[codes])
    bits = codes > 2
    np.testing.assert_array_equal(read(Image.fromarray(bits))[..., 0], 255 * bits)
    clear = Image.fromarray(np.stack([codes, 255 - codes], -1), "LA")
    np.testing.assert_array_equal(read(clear, channels=1)[..., 0], codes)
    inks = Image.new("CMYK", (8, 8), (255, 0, 255, 0))  # cyan and yellow: green
    np.testing.assert_allclose(
        read(inks, "0.jpg", channels=3), np.tile([0, 255, 0], (8, 8, 1)), atol=3
    )
    with pytest.raises(ValueError, match="its mode must be one of"):
        read(Image.fromarray(codes.astype(np.uint16)))


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match=r"must hold images \[SPLIT/\]CLASS/FILE; given none"):
        data.from_folder(tmp_path)
    save(tmp_path / "a" / "0.png", 0)
    with pytest.raises(ValueError, match=r"at least two classes; given \['a'\]"):
        data.from_folder(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"b must hold images .*; given none"):
        data.from_folder(tmp_path)
    save(tmp_path / "b" / "0.png", 0)
    frames = [Image.new("L", (6, 4), level) for level in (0, 9)]
    frames[0].save(tmp_path / "b" / "1.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(
        ValueError, match=r"b/1\.webp does not decode: it must be one image; given 2"
    ):
        data.from_folder(tmp_path).inputs[2]
    for options, message in (
        ({"size": (0, 3)}, r"size must be \(H, W\), both >= 1; given \(0, 3\)"),
        ({"channels": 2}, "channels must be 1 or 3; given 2"),
    ):
        with pytest.raises(ValueError, match=message):
            data.from_folder(tmp_path, **options)
    save(tmp_path / "train" / "a" / "0.png", 0)
    with pytest.raises(
        ValueError, match=r"splits .* or classes; given \['train'\] and \['a', 'b'\]"
    ):
        data.from_folder(tmp_path)


# --- TFDS --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_without_tensorflow(tiny):
    source = data.from_tfds("tiny", data_dir=tiny)
    assert source.inputs.shape == (29, 4, 4, 1) and source.inputs.dtype == np.uint8
    assert source.num_classes == 3 and source.class_names == ("a", "b", "c")
    numbers = np.asarray(source.inputs)[:, 0, 0, 0]
    np.testing.assert_array_equal(source.labels, numbers % 3)
    assert sorted(numbers[source.splits["train"]]) == list(range(20))
    assert sorted(numbers[source.splits["test"]]) == list(range(20, 29))
    places = np.array([28, 0, 19, 20, 3])  # of both splits, in any order
    np.testing.assert_array_equal(source.inputs[places][:, 0, 0, 0], numbers[places])
    assert "tensorflow" not in sys.modules


def test_tfds_errors(tiny, tmp_path):
    with pytest.raises(ValueError, match="the features 'picture' and 'label'; given"):
        data.from_tfds("tiny", data_dir=tiny, image="picture")
    for name in ("tiny", "mnist"):
        with pytest.raises(ValueError, match=f"{name} must be prepared as ArrayRecord in"):
            data.from_tfds(name, data_dir=tmp_path)


NO_TENSORFLOW = """
import sys
tried = set()
sys.addaudithook(lambda event, args: tried.add(args[0]) if event == "import" else None)
import numpy as np
from experiments import prepare, task
from saflex_jax import data
tiny, npz, folder, table = sys.argv[1:]
sources = data.from_tfds("tiny", data_dir=tiny), data.from_npz(npz), data.from_folder(folder)
for source in sources:
    pool = data.priors(source.labels, source.num_classes, source.task)
    rows = np.arange(len(pool), dtype=np.int32)
    from saflex_jax import Batch, Streams
    batch = Batch(source.inputs, pool, np.ones(len(pool), bool), rows)
    stream = data.Prefetched(data.ArrayStream(Streams(batch), batch_size=2, seed=0))
    assert next(stream).candidates.inputs.dtype == np.float32
read = data.from_table(table)
data.fit_encoder(read.inputs, read.columns)(read.inputs)
assert not {name for name in tried if name.split(".")[0] == "tensorflow"}
"""


def test_no_path_imports_tensorflow(tiny, tmp_path):
    np.savez(tmp_path / "x.npz", **medmnist())
    for number, name in enumerate(("a", "b", "b")):
        save(tmp_path / "images" / name / f"{number}.png", number)
    (tmp_path / "x.csv").write_text("a,b\n1,x\n2,y\n3,x\n")
    paths = [tiny, tmp_path / "x.npz", tmp_path / "images", tmp_path / "x.csv"]
    done = subprocess.run(
        [sys.executable, "-c", NO_TENSORFLOW, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
