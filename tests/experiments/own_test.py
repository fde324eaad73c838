"""Own data: a folder, an .npz file, a table; what a run says first, and what it leaves."""

import pathlib
import types

import numpy as np
import pytest
from PIL import Image

from experiments import (
    audit,
    build,
    export,
    finished,
    main,
    named_rows,
    opening,
    predict,
    same_data,
    task,
)
from experiments.command_line import arguments
from experiments.configs import digits, own, wdbc
from saflex_jax import data, train
from tests.experiments.runs_ import finish, read

RNG = np.random.default_rng(0)
SIZE = 60


def picture(row, mode="L", size=(8, 8)):
    """Dark for class a, light for class b."""
    pixels = RNG.integers(0, 100, size[::-1]) + 150 * (row % 2)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def folder(path, rows=SIZE, **options):
    for row in range(rows):
        file = path / "ab"[row % 2] / f"{row:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(row, **options).save(file)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of two classes; of every tenth image the label is wrong."""
    path = folder(tmp_path_factory.mktemp("own") / "mine")
    for row in range(0, SIZE, 10):
        file = path / "ab"[row % 2] / f"{row:03}.png"
        file.rename(path / "ba"[row % 2] / file.name)
    return path


def named(path, *lines):
    path.write_text("\n".join(lines))
    return str(path)


# --- what a config is made of -----------------------------------------------------------------


def test_a_folder(images):
    config = own.get_config(str(images))
    build.check(config)
    section = config.data
    assert (section.val, section.test, section.size, section.channels) == (6, 12, 0, 0)
    assert section.noise == 0 and not section.labels and not section.train_on_val
    assert config.model.name == "small_cnn" and config.model.widths == (16, 32)
    assert "flip" not in config.augment
    made = task.make_data(config)
    assert made.pools.candidates.inputs.shape == (42, 8, 8, 1) and not made.wrong.any()
    np.testing.assert_array_equal(made.source.labels[made.rows], made.clean_labels)
    with pytest.raises(ValueError, match=r"2 classes in each split; .* Try --config.data.val=6 "):
        task.make_data(changed(config, **{"data.test": 59}))


def changed(config, **fields):
    config.update_from_flattened_dict(fields)
    return config


def test_images_of_several_sizes_and_kinds_are_made_alike(tmp_path):
    folder(tmp_path, size=(80, 100))
    picture(0, "RGBA", (90, 200)).save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "._x.png").write_text("no image, but hidden")
    config = own.get_config(str(tmp_path))
    assert (config.data.size, config.data.channels) == (64, 3)
    assert task.make_data(config).pools.candidates.inputs.shape[1:] == (64, 64, 3)
    assert len(config.model.widths) == 5
    (tmp_path / "b" / "y.png").write_text("no image")
    with pytest.raises(ValueError, match=r"b/y.png is no image"):
        own.get_config(str(tmp_path))


def test_a_folder_of_trusted_images_is_the_validation_split(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "val", rows=8)
    config = own.get_config(str(tmp_path))
    assert (config.data.val, config.data.test, config.data.train_on_val) == (0, 12, True)
    assert len(task.make_data(config).held_out.labels) == 8


def test_a_folder_with_the_name_of_a_data_set_is_the_folder(images, tmp_path, monkeypatch):
    (tmp_path / "digits").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    assert own.get_config("digits").data.name == "./digits"
    monkeypatch.chdir("/")
    assert own.get_config("digits").data.name == "digits"


def test_a_table_with_categories(tmp_path):
    rows = [f"{RNG.normal():.3f},{'rw'[RNG.integers(2)]},{'xyz'[i % 3]}" for i in range(30)]
    file = named(tmp_path / "wine.csv", "alcohol,colour,kind", *rows)
    config = own.get_config(file)
    assert (config.data.val, config.data.test) == (3, 6) and config.model.name == "mlp"
    made = task.make_data(config)
    assert made.source.class_names == ("x", "y", "z") and set(made.pools.candidates.inputs) > {
        "numeric"
    }
    method = build.make_method(config, made.pools, made.source.columns)
    state = build.init_state(config, method, made.pools)
    table = finished.columns(finished.Run(config, made, method, state))  # categories and all
    assert len(table["row"]) == 21 and "file" not in table
    in_file = np.array(["xyz".index(line[-1]) for line in rows])[table["data_row"]]
    np.testing.assert_array_equal(in_file, table["given"])

    run, few = finished.Run(config, made, method, state), tmp_path / "few.csv"  # no "r" among them
    predicted = predict.predictions(run, file, "")
    white = [row for row, line in enumerate(rows) if ",w," in line]
    lines = [rows[row] for row in white] + ["0.1,?,x"]
    named(few, "alcohol,colour,kind", *lines, "0.2,b,y")
    again = predict.predictions(run, str(few), "")
    np.testing.assert_allclose(again["p0"][:-2], predicted["p0"][white], rtol=1e-5)
    scores = train.make_evaluator(method, made.test.inputs, made.test.labels)(state)
    tested = task.make_split_source(config)[2].test
    right = predicted["predicted"][tested] == predicted["label"][tested]
    assert right.mean() == pytest.approx(scores["accuracy"])
    bare = named(tmp_path / "bare.csv", *(line[: line.rindex(",")] for line in open(few)))
    found = predict.predictions(run, bare, "")
    np.testing.assert_array_equal(found["p0"], again["p0"])
    assert "label" in again and "label" not in found
    other = named(tmp_path / "other.csv", "alcohol,smell,kind", *lines)
    with pytest.raises(ValueError, match=r"--source must have the run's columns .*'smell'"):
        predict.predictions(run, other, "")


@pytest.mark.parametrize("kind", ["images", "features"])
def test_an_npz_file(tmp_path, kind):
    inputs = {"images": RNG.integers(0, 256, (30, 6, 5), dtype=np.uint8),
              "features": RNG.normal(size=(30, 7))}[kind]  # fmt: skip
    trusted, labels = np.arange(30) < 4, np.array(["no", "yes"])[np.arange(30) % 2]
    arrays = {kind: inputs, "labels": labels, "trusted": trusted}
    np.savez(tmp_path / "x.npz", **arrays)
    config = own.get_config(str(tmp_path / "x.npz"))
    assert (config.data.val, config.data.test, config.data.train_on_val) == (0, 5, True)
    made = task.make_data(config)
    assert made.source.class_names == ("no", "yes") and len(made.held_out.labels) == 4
    assert set(made.rows[-4:]) == set(range(4))
    for bad, message in (
        ({"labels": labels[:9]}, r"labels of integers or texts \[30\]"),
        ({"labels": np.ones(30, int)}, "two or more classes"),
        ({kind: inputs[..., 0]}, "must hold images of 8 bits"),
        ({"trusted": trusted.astype(int)}, "trusted bool"),
        ({"x": labels}, "no field 'x'"),
        ({"features": inputs, "images": inputs}, "images or features beside labels"),
    ):
        np.savez(tmp_path / "y.npz", **{**arrays, **bad})
        with pytest.raises(ValueError, match=message):
            data.from_npz(tmp_path / "y.npz")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "nowhere/wine.csv",
            "--data must be the path of a folder .* there is no 'nowhere/wine.csv'$",
        ),
        ("digit", "there is no 'digit'; did you mean 'digits'"),
        ("", "there is no ''"),
    ],
)
def test_what_is_not_there_is_said_and_nothing_is_listed(path, message):
    with pytest.raises(ValueError, match=message) as error:
        own.get_config(path)
    assert len(str(error.value)) < 250


def test_a_class_that_cannot_be_split_is_named(tmp_path):
    folder(tmp_path)
    (tmp_path / "rare").mkdir()
    for row in range(2):
        picture(row).save(tmp_path / "rare" / f"{row}.png")
    with pytest.raises(
        ValueError, match=r"each class of .* 5 samples or more.*'rare' has 2. Leave"
    ):
        own.get_config(str(tmp_path))


# --- trusted samples ---------------------------------------------------------------------------


def test_named_samples_are_trusted_with_the_labels_that_are_given(images, tmp_path):
    file = named(tmp_path / "trusted.csv", "file,class", "a/002.png,a", "b/003.png", "b/000.png,a")
    config = own.get_config(f"{images}{own.TRUSTED}{file}")
    assert config.method.saflex.rule.noise_rate is None and config.data.train_on_val
    assert own.get_config(str(images)).method.saflex.rule.noise_rate == own.UNKNOWN
    made = task.make_data(config)
    files = made.source.extra["file"][made.rows]
    assert len(files) == 49 and files[-3:].tolist() == ["a/002.png", "b/000.png", "b/003.png"]
    assert made.held_out.labels.argmax(1).tolist() == [0, 0, 1]
    assert build.run_info(config, made.pools).num_trusted == 3
    with pytest.raises(ValueError, match=r"config.data.val must be 0 with trusted="):
        build.check(changed(config, **{"data.val": 5}))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a/002.pngg"], "line 1 must name a sample, as 'a/002.png'; .*did you mean 'a/002.png'"),
        (["a/002.png", "a/002.png"], "line 2 names 'a/002.png', which was named before"),
        (["a/002.png,c"], "line 1 must give one of the classes .'a', 'b'.; given 'c'"),
        (["file"], "must name at least one sample"),
    ],
)
def test_a_bad_list_is_refused_by_its_line(images, tmp_path, lines, message):
    file = named(tmp_path / "trusted.csv", *lines)
    with pytest.raises(ValueError, match=message):
        named_rows.read(task.opened(str(images), "data", 0, "", False), file, "--trusted")


def test_tested_samples_are_not_trusted(images, tmp_path):
    source = task.opened(str(images), "data", 0, "", False)
    tested = source._replace(splits={"train": np.arange(2, 60), "test": np.arange(2)})
    file = named(tmp_path / "t", *source.extra["file"][[5, 0]])
    with pytest.raises(ValueError, match=r"line 2 must name no sample of the test split; given"):
        named_rows.trusted(tested, file)
    assert named_rows.read(tested, file, "--truth")[0].tolist() == [5, 0]
    group = source._replace(extra={**source.extra, "cell": np.arange(60) % 2})
    section = own.get_config(f"{images}{own.TRUSTED}{file}").data
    section.update({"test_on": "cell=1", "test": 0})
    with pytest.raises(ValueError, match=r"trusted must name no tested sample; .* cell=1"):
        task.make_split(section, named_rows.trusted(group, file), 0)


def test_rows_of_a_table_are_named_by_their_number(tmp_path):
    source = data.wdbc()
    rows, labels = named_rows.read(source, named(tmp_path / "t", "7", "0,benign"), "--trusted")
    assert rows.tolist() == [7, 0] and labels.tolist() == [-1, 1]
    with pytest.raises(ValueError, match=r"--trusted must be a text file; .*nowhere"):
        named_rows.read(source, "nowhere", "--trusted")


# --- what a run says first ---------------------------------------------------------------------


def test_wrong_and_unchecked_labels_are_said_first(images, tmp_path):
    def said(config):
        return opening.lines(config, task.make_data(config)).split("\n")

    (first, note), config = said(own.get_config(str(images))), own.get_config(str(images))
    assert first == (
        "mine: labels as given; 2 classes, inputs of 8x8x1; 42 train, 6 validate, 12 test"
    )
    assert "may be as wrong" in note and "--trusted=FILE" in note
    first, _ = said(changed(config, **{"data.noise": 0.25}))
    assert "25% OF THE TRAINING LABELS MADE WRONG, symmetric (config.data.noise=0.25)" in first
    assert len(said(digits.get_config())) == 1 and "40%" in said(digits.get_config())[0]
    assert "30 columns; 309 train, 60 are trusted, 200 test" in said(wdbc.get_config())[0]


def test_what_is_probably_not_meant_is_said(tmp_path):
    rows = [f"{n}.5,p{n},{'uv'[n % 2]},{n % 7},{'yz'[n % 2]}" for n in range(40)]
    rows[3] = "unknown,p3,u,1,z"
    file = named(tmp_path / "t.csv", "size,id,kind,count,label", *rows)
    config = own.get_config(file)
    first, size, names, _ = opening.lines(config, task.make_data(config)).split("\n")
    assert "rows of 4 columns (1 number, 3 categories)" in first
    assert "'size' is read as 40 categories, all numbers but 1: 'unknown'. If" in size
    assert "'id' has 40 categories in 40 rows" in names
    source = data.Source(None, np.zeros(2), 2, left_out=("a/0.svg", "a/b/1.png"))
    assert "2 files left out" in opening.notes(source)[0] and not opening.notes(data.wdbc())
    assert opening.notes(source)[0].endswith("folder of a class: a/0.svg, a/b/1.png")


def test_data_and_trusted_stand_for_fields():
    command = arguments(["x", "--data=a/wine.csv", "--trusted", "t", "--config.seed=1"])
    program, config, *rest = command
    assert program == "x" and config.endswith("configs/own.py:a/wine.csv?trusted=t")
    assert rest == ["--config.seed=1", "--workdir=runs/wine"]
    for given in (["--config=own:odd"], ["--config", "own:odd"]):
        assert arguments(["x", "--trusted=t", *given])[1].endswith("own.py:odd?trusted=t")
    config, *fields = arguments(["x", "--trusted=t", "--config=wdbc"])[1:]
    assert config.endswith("wdbc.py")  # before its fields
    assert fields == ["--config.data.trusted=t", "--config.data.val=0",
                      "--config.data.train_on_val=True"]  # fmt: skip
    said = ["--config.data.val=9", "--config.data.train_on_val=False"]  # these count, being later
    assert arguments(["x", *said, "--trusted=t", "--config=wdbc"])[2:] == [*fields, *said]
    assert "--workdir=runs/wine" not in arguments(["x", "--data=wine.csv", "--workdir=w"])
    with pytest.raises(ValueError, match="goes with no other --config"):
        arguments(["x", "--data=a", "--config=wdbc"])


# --- after the run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(images, tmp_path_factory):
    """A short run on the folder with six trusted images, as `saflex train` leaves it."""
    path = tmp_path_factory.mktemp("run")
    trusted = named(path / "t", *(f"{'ab'[row % 2]}/{row:03}.png" for row in range(1, 7)))
    fields = {"train.steps": 60, "augment": "shift(1)", "model.widths": (4, 8)}
    config = changed(own.get_config(f"{images}{own.TRUSTED}{trusted}"), **fields)
    return finish(config, path, every=60)


@pytest.fixture
def moved(images):
    """The folder after a file was put into its right class; undone behind the test."""

    def forget():
        task.opened.cache_clear(), task.task_source.cache_clear()

    file, right = images / "b" / "010.png", images / "a" / "010.png"
    file.rename(right), forget()
    yield images
    right.rename(file), forget()


def test_other_data_than_a_run_trained_on_are_refused(workdir, moved, monkeypatch):
    said = "mine or .*/t has changed since the run: inputs, labels or splits differ"
    for command in (export.main, audit.main):
        with pytest.raises(ValueError, match=said):
            command([f"--workdir={workdir}"])
    monkeypatch.setattr(main, "_SKIP_DAMAGED", types.SimpleNamespace(value=False))
    config = finished.read_config(workdir)
    with pytest.raises(ValueError, match=said):
        main.run(config, workdir, None)
    config.data.val_from = "train"  # checkpoints refuse another config, and say what differs
    same_data.check(workdir, config)
    config.data.val_from = ""
    kept = workdir / same_data.FILE
    kept.rename(workdir / "kept")  # as of a run from before
    try:
        assert len(finished.opened(workdir).data.rows) == 50
    finally:
        (workdir / "kept").rename(kept)


def test_audit_and_export_name_files_and_know_no_truth_that_was_not_told(workdir, images, capsys):
    export.main([f"--workdir={workdir}"])
    rows = read(workdir / "candidates.csv")
    assert len({row["file"] for row in rows}) == len(rows) == 50
    assert all((images / row["file"]).exists() for row in rows) and "bad" not in rows[0]
    assert all(row["given_class"] == row["file"][0] for row in rows)
    assert {row["learned_class"] for row in rows} <= {"a", "b"}
    assert sum(row["trusted"] == "1" for row in rows) == 6
    audit.main([f"--workdir={workdir}", "--draws=1"])
    assert "of 44 labels are" in capsys.readouterr().out
    right = [f"{f.relative_to(images)},{'ab'[int(f.stem) % 2]}" for f in images.glob("*/*.png")]
    audit.main([f"--workdir={workdir}", "--draws=1", f"--truth={named(workdir / 'r', *right)}"])
    assert "recall" in capsys.readouterr().out
    bad = {row["file"] for row in read(workdir / "audit.csv") if row["bad"] == "1"}
    assert bad and all(int(pathlib.Path(file).stem) % 10 == 0 for file in bad)


def test_predict_takes_a_folder_of_nothing_but_images(workdir, tmp_path):
    for row in range(3):
        picture(row).save(tmp_path / f"{row}.png")
    predict.main([f"--workdir={workdir}", f"--source={tmp_path}", f"--out={tmp_path / 'p.csv'}"])
    rows = read(tmp_path / "p.csv")
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert {row["class"] for row in rows} <= {"a", "b"} and "label" not in rows[0]
