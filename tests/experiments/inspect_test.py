"""How a data set is described before training."""

import numpy as np
import pytest
from absl import flags
from PIL import Image

from experiments import inspect, task
from saflex_jax import data
from tests.experiments.task_test import images


def test_inspection_counts_and_finds_copies(tmp_path):
    pixels, labels = images(tmp_path / "mnist")
    pixels[[3, 4]] = pixels[50]
    pixels[10] = pixels[11]
    np.save(tmp_path / "mnist" / "inputs.npy", pixels)
    source, prints = task.task_source("", "mnist", str(tmp_path), 0, "", False)
    lines, leak = inspect.report("mnist", source, prints)
    text = "\n".join(lines)
    assert leak == 0 and "left between splits: 0, no leak" in text
    split = inspect.default_split(source, "mnist")
    found = inspect.copies(split, prints)
    assert found["train in test"] + found["val in test"] == 2
    assert f"test (official): 15 samples; 0 {(labels[45:] == 0).sum()}, " in text
    assert f"values: {pixels.min()} to {pixels.max()}, mean {pixels.mean():.5g}" in text
    # What is left is counted from the split that a run would get.
    assert inspect.copies(data.without_copies(split, prints)[0], prints)["train in test"] == 0


def test_inspection_command(tmp_path, capsys):
    images(tmp_path / "mnist")
    (tmp_path / "x.csv").write_text(
        "a,b,y\n" + "\n".join(f"{n},{'uv'[n % 2]},{n % 3}" for n in range(60))
    )
    for name in ("mnist", str(tmp_path / "x.csv")):
        source, prints = task.task_source("", name, str(tmp_path), 0, "", False)
        lines, _ = inspect.report(name, source, prints)
        figure = inspect.sheet(name, source, inspect.default_split(source, name).train)
        figure.savefig(tmp_path / "sheet.png")
        assert (tmp_path / "sheet.png").stat().st_size > 5000
    assert any("b" in line and "u 30, v 30" in line for line in lines)


def test_copies_are_counted_in_each_direction():
    split = data.Split(np.array([0, 1, 2]), np.array([3]), np.array([4, 5]))
    prints = np.array(list("aabcac"))
    assert inspect.copies(split, prints) == {
        "within train": 1,
        "within val": 0,
        "within test": 0,
        "train in val": 0,
        "train in test": 2,
        "val in test": 1,
    }


def test_ranges_are_those_of_all_chunks(monkeypatch):
    monkeypatch.setattr(task, "CHUNK", 3)
    assert inspect.value_range(np.arange(8.0)[:, None]) == "0 to 7, mean 3.5"


def test_missing_values_are_reported():
    columns = data.Column("a", None), data.Column("b", ("u", "v"))
    table = np.array([[1, 0], [np.nan, 1], [3, 1], [2, 0], [4, 1]])
    source = data.Source(table, np.zeros(5, int), 2, columns=columns)
    first, second = map(str.split, inspect.describe_columns(source))
    assert first == "a 1 to 4, mean 2.5; 20.0% missing".split()
    assert second == "b u 2, v 3".split()


def test_names_of_several_labels_end_with_none():
    source = data.Source(None, np.array([[0, 0], [1, 1]]), 3, "multilabel")
    assert inspect.class_names(source) == ("0", "1", "none")
    np.testing.assert_array_equal(inspect.by_class(source), [[0, 0, 1], [1, 1, 0]])


def test_what_is_left_between_splits_is_a_leak_and_counts_are_of_what_trains(tmp_path, monkeypatch):
    pixels, _ = images(tmp_path / "mnist")
    pixels[[3, 4]] = pixels[50]
    np.save(tmp_path / "mnist" / "inputs.npy", pixels)
    source, prints = task.task_source("", "mnist", str(tmp_path), 0, "", False)
    split = inspect.default_split(source, "mnist")
    lines, _ = inspect.report("mnist", source, prints)
    kept = sum(row not in (3, 4) for row in split.train)
    assert any(line.startswith(f"train (official): {kept} samples") for line in lines)
    monkeypatch.setattr(data, "without_copies", lambda split, _: (split, {"train": 0, "val": 0}))
    lines, leak = inspect.report("mnist", source, prints)
    assert leak >= 2 and lines[-1] == f"left between splits: {leak}"


def test_a_folder_is_read_as_train_reads_it(tmp_path, capsys):
    for row in range(20):
        file = tmp_path / "odd" / "ab"[row % 2] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        levels = np.random.default_rng(row).integers(0, 256, (4 + row % 3, 5), dtype=np.uint8)
        Image.fromarray(levels).convert("L" if row == 3 else "RGB").save(file)
    (tmp_path / "odd" / "a" / "notes.txt").write_text("no image")
    flags.FLAGS.unparse_flags()
    # Another command's --size has another default, which a process that imported both may have.
    flags.FLAGS(["inspect", f"--sheets={tmp_path}", "--size=0"])
    with pytest.raises(SystemExit) as stopped:
        inspect.main(["inspect", str(tmp_path / "odd")])
    first, note, *_ = capsys.readouterr().out.split("\n")
    assert not stopped.value.code and "20 samples uint8[5x5x3]" in first
    assert "1 file left out" in note and note.endswith(": a/notes.txt")


@pytest.mark.parametrize("leak", [0, 3])
def test_the_exit_status_says_whether_copies_are_left(tmp_path, monkeypatch, capsys, leak):
    monkeypatch.setattr(inspect, "report", lambda *a: (["lines"], leak))
    flags.FLAGS.unparse_flags()
    images(tmp_path / "mnist")
    flags.FLAGS(["inspect", f"--sheets={tmp_path}", f"--data_dir={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        inspect.main(["inspect", "mnist"])
    assert stopped.value.code == bool(leak) and (tmp_path / "mnist.png").exists()
    assert capsys.readouterr().out.startswith("lines")
