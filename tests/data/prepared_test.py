"""What is written as a prepared data set is read back, and damage does not go unnoticed."""

import json
import re

import numpy as np
import pytest

from saflex_jax import data
from saflex_jax.data.prepared import digests, read_description
from tests.data.files_ import medmnist, prepared, save

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 2, 2, 1), dtype=np.uint8)
CLASSES = np.array([0, 1, 1, 0, 1])
COLUMNS = (data.Column("age", None), data.Column("job", ("a", "b")))
GRADES = np.float32([0, 0.5, 1, 0.5, 0])
SOURCES = {
    "images": data.Source(
        PIXELS,
        CLASSES,
        2,
        splits={"train": np.arange(3), "test": np.arange(3, 5)},
        extra={"worst": 1 - CLASSES, "cell": np.arange(5)},
        class_names=("no", "yes"),
    ),
    "table": data.Source(
        np.array([[1.5, np.nan], [2, 1], [0, 0], [7, 1], [3, 0]]), CLASSES, 2, columns=COLUMNS
    ),
    "ordinal": data.Source(PIXELS, CLASSES, 4, "ordinal", {"val": np.arange(1, 3)}),
    "graded": data.Source(PIXELS, np.stack([1 - GRADES, GRADES], 1), 2),
    "several": data.Source(
        PIXELS, np.array([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]]), 3, "multilabel"
    ),
}


def write(folder, source):
    folder.mkdir(parents=True, exist_ok=True)
    splits = {name: (int(rows[0]), int(rows[-1]) + 1) for name, rows in source.splits.items()}
    about = data.Description(
        folder.name,
        "arrays",
        source.task,
        source.num_classes,
        source.class_names,
        splits=splits,
        columns=source.columns,
        licence="none",
        origin="here",
    )
    extra = {f"extra_{name}": array for name, array in source.extra.items()}
    return data.write_prepared(
        folder, about, {"inputs": source.inputs, "labels": source.labels} | extra
    )


def assert_same_source(found, expected):
    for name, value in expected._asdict().items():
        other = getattr(found, name)
        if name in ("splits", "extra"):
            assert other.keys() == value.keys()
            for key, array in value.items():
                np.testing.assert_array_equal(other[key], array)
        elif isinstance(value, np.ndarray):
            assert other.dtype == value.dtype
            np.testing.assert_array_equal(other, value)
        else:
            assert other == value


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_written_is_read(kind, tmp_path):
    written = write(tmp_path / kind, SOURCES[kind])
    source = data.from_prepared(tmp_path / kind)
    assert_same_source(source, SOURCES[kind])
    assert isinstance(source.inputs, np.memmap)
    assert read_description(tmp_path / kind) == written
    assert write(tmp_path / "again" / kind, source) == written


def test_counts_are_of_each_class_or_grade_in_each_split(tmp_path):
    counts = {kind: write(tmp_path / kind, SOURCES[kind]).counts for kind in SOURCES}
    assert counts["images"] == {"train": (1, 2), "test": (1, 1)}
    assert counts["table"] == {"all": (2, 3)}
    assert counts["ordinal"] == {"val": (0, 2, 0, 0)}
    assert counts["graded"] == {"all": (2, 2, 1)}  # 0, .5 and 1


def test_folders_and_npz_files_are_described_where_they_are(tmp_path):
    pixels = [save(tmp_path / "train" / name, n) for n, name in enumerate(["a/0.png", "b/1.png"])]
    save(tmp_path / "test/b/0.png", 2)
    about = data.Description("x", "folder", "multiclass", 2, ("a", "b"))
    written = data.write_prepared(tmp_path, about)
    assert written.counts == {"train/a": 1, "train/b": 1, "test/b": 1}
    assert list(written.sha256) == ["."] and read_description(tmp_path) == written
    source = data.from_prepared(tmp_path)
    np.testing.assert_array_equal(source.inputs[:2][..., 0], pixels)
    assert data.from_prepared(tmp_path, size=(2, 2)).inputs.shape == (3, 2, 2, 1)
    data.write_prepared(tmp_path, about._replace(channels=3))
    assert data.from_prepared(tmp_path).inputs.shape == (3, 4, 6, 3)

    folder, names = tmp_path / "npz", ("mild", "bad", "worse")
    folder.mkdir()
    np.savez(folder / "retina.npz", **medmnist(3))
    written = data.write_prepared(folder, data.Description("retina", "npz", "ordinal", 3, names))
    assert written.counts == {"train": 6, "val": 3, "test": 4}
    source = data.from_prepared(folder)
    assert source.task == "ordinal" and source.class_names == names
    assert source.inputs.shape == (13, 5, 5, 3)


@pytest.mark.parametrize("kind", ["arrays", "folder"])
def test_a_changed_lost_or_further_file_changes_the_digests(kind, tmp_path):
    if kind == "arrays":
        write(tmp_path, SOURCES["images"])
        file, other = tmp_path / "extra_cell.npy", tmp_path / "extra_x.npy"
    else:
        file, other = (tmp_path / "b" / name for name in ("0.png", "1.png"))
        save(file, 0)
        data.write_prepared(tmp_path, data.Description("x", "folder", "multiclass", 2))
    before, content = read_description(tmp_path).sha256, file.read_bytes()
    assert digests(tmp_path, kind) == before
    for change in (
        lambda: file.write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
        lambda: file.unlink(),
        lambda: file.rename(other),
        lambda: other.write_bytes(content),
    ):
        change()
        assert digests(tmp_path, kind) != before
        other.unlink(missing_ok=True)
        file.write_bytes(content)
        assert digests(tmp_path, kind) == before


def test_a_file_of_an_older_version_is_read(tmp_path):
    # Without counts, licence, checksums and origin.
    columns = [{"name": "age", "categories": None}, {"name": "job", "categories": ["a", "b"]}]
    folder = prepared(tmp_path / "x", columns=columns, splits={"val": [1, 3]}, num_classes=4)
    np.save(folder / "inputs.npy", SOURCES["table"].inputs)
    np.save(folder / "labels.npy", CLASSES)
    source = data.from_prepared(folder)
    assert source.columns == COLUMNS and source.num_classes == 4
    assert source.class_names == ("no", "yes") and source.splits["val"].tolist() == [1, 2]


def test_what_is_not_prepared_says_how(tmp_path):
    command = f"python -m experiments.prepare x --out {tmp_path}"
    for spoil in (
        lambda: None,
        lambda: (tmp_path / "x").mkdir(),
        lambda: (tmp_path / "x" / "dataset.json").write_text('{"format"'),
        lambda: (tmp_path / "x" / "dataset.json").write_text("{}"),
        lambda: (tmp_path / "x" / "dataset.json").write_text('{"format": 1}'),
        lambda: (tmp_path / "x" / "dataset.json").write_text("[]"),
    ):
        spoil()
        with pytest.raises(ValueError, match=re.escape(command)):
            data.from_prepared(tmp_path / "x")
    with pytest.raises(ValueError, match="its format must be 1; given 2"):
        data.from_prepared(prepared(tmp_path / "x", format=2))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "array"}, r"description\.kind must be one of .*did you mean 'arrays'"),
        ({"splits": {"test": (3, 6)}}, r"splits\['test'\] must be .* <= 5; given \(3, 6\)"),
        ({"splits": {"test": (3, 3)}}, r"given \(3, 3\)"),
    ],
)
def test_bad_descriptions(changes, message, tmp_path):
    about = data.Description("x", "arrays", "multiclass", 2)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        data.write_prepared(tmp_path, about, {"inputs": PIXELS, "labels": CLASSES})
    assert not (tmp_path / "dataset.json").exists()


def test_the_description_is_plain_json(tmp_path):
    write(tmp_path / "x", SOURCES["table"])
    about = json.loads((tmp_path / "x" / "dataset.json").read_text())
    assert about["format"] == 1 and list(about)[1:] == list(data.Description._fields)
    assert about["columns"][1] == {"name": "job", "categories": ["a", "b"]}
    assert about["splits"] == {} and about["counts"] == {"all": [2, 3]}
