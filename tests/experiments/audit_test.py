"""Audits as tables and as a page: what is written, what is escaped, what a browser does with it."""

import csv
import json

import numpy as np
import pytest

from experiments import audit, audit_page, tables
from saflex_jax.audit import Head
from tests.experiments import browser_

SIZE, CLASSES = 120, 3
EVIL = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
_rng = np.random.default_rng(0)


def candidates():
    """A table whose second prompt, and large rotations, harm."""
    harmful = np.arange(SIZE) % 4 == 0
    degrees = np.where(np.arange(SIZE) % 3 == 0, 180.0, 5.0)
    utility = np.where(harmful, -0.5, 0.4) - 0.3 * (degrees > 90) + 0.05 * _rng.normal(size=SIZE)
    given = np.arange(SIZE) % CLASSES
    return {
        "row": np.arange(SIZE),
        "given": given,
        "learned": np.where(harmful, (given + 1) % CLASSES, given),
        "probability": _rng.uniform(0.5, 1, SIZE),
        "weight": np.where(harmful, 0.1, 1.3),
        "utility": utility,
        "bad": harmful,
        "operations": np.array([f"rotate {d:g} | flip 1" for d in degrees]),
        "prompt": np.where(harmful, EVIL, 'a "good" one\nin two lines'),
        "strength": np.full(SIZE, 0.5),
        "generator": np.where(harmful, "worse-1", "better-2"),
    }


def made(table=None):
    pytest.importorskip("jinja2")
    table = candidates() if table is None else table
    places = [place for place, _ in audit_page.gallery(table)]
    images = {place: _rng.random((8, 8, 3)) for place in places}
    options = {"title": f"Audit {EVIL}", "class_names": ("a", "b", EVIL), "images": images,
               "transition": np.full((CLASSES, CLASSES), 1 / CLASSES), "notes": [EVIL]}  # fmt: skip
    return audit_page.page(table, **options)


def test_no_text_of_the_data_is_markup_and_nothing_is_loaded():
    page = made()
    assert EVIL not in page and page.count("<script>") == 1 and 'onerror="' not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page and "&lt;script&gt;" in page


def test_groups_are_ordered_by_what_they_are_worth():
    table = candidates()
    charts = {title: audit_page._chart(table, title, *rest)
              for title, *rest in audit_page.groups(table, "abc")}  # fmt: skip
    by_prompt = charts["By prompt and strength"]["rows"]
    assert EVIL in by_prompt[0]["name"] and by_prompt[0]["sign"] == "low"
    assert by_prompt[1]["sign"] == "high" and by_prompt[0]["count"] == SIZE / 4
    operations = [row["name"] for row in charts["By operation and magnitude"]["rows"]]
    assert operations[0] == "rotate 180" and "rotate 5" in operations
    assert [row["name"] for row in charts["By generator"]["rows"]] == ["worse-1", "better-2"]
    for chart in charts.values():
        assert all(0 <= row[end] <= 100 for row in chart["rows"] for end in ("from", "at", "to"))


def test_draws_of_one_sample_are_no_samples_of_their_own():
    """A table of one look and one of the same look four times say the same."""
    one = candidates()
    four = {name: np.concatenate([values] * 4) for name, values in one.items()}

    def charts(table):
        return [audit_page._chart(table, *found) for found in audit_page.groups(table, "abc")]

    def rounded(chart):
        return [{k: v if isinstance(v, str) else round(v, 6) for k, v in row.items()}
                for row in chart["rows"]]  # fmt: skip

    assert list(map(rounded, charts(four))) == list(map(rounded, charts(one)))
    assert audit_page._thresholds(four) == audit_page._thresholds(one)
    assert audit_page.gallery(four) == audit_page.gallery(one)
    assert f"<b>{SIZE}</b>rows" in made(four)
    # Of draws in one group the mean counts.
    group = {"utility": np.array([1.0, 3.0, 6.0]), "row": np.array([4, 4, 5])}
    (row,) = audit_page._chart(group, "", ["a"], [np.ones(3, bool)])["rows"]
    assert row["mean"] == 4.0 and row["count"] == 2


def test_a_run_without_operations_has_no_chart_of_them():
    table = {"given": np.arange(SIZE) % CLASSES, "operations": np.full(SIZE, "")}
    titles = [title for title, *_ in audit_page.groups(table, "abc")]
    assert titles == ["By class, as given"]


def test_a_threshold_says_what_it_drops_and_finds():
    table = candidates()
    at_zero = next(row for row in audit_page._thresholds(table) if row["at"] == 0.0)
    dropped = table["utility"] < 0
    assert at_zero["dropped"] == dropped.sum() and at_zero["recall"] == 1.0
    assert at_zero["precision"] == pytest.approx(table["bad"][dropped].mean())
    trusted = {**table, "trusted": np.ones(SIZE, bool)}
    assert {row["dropped"] for row in audit_page._thresholds(trusted)} == {0}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not browser_.PRESENT:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    with browser_.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_a_browser_sorts_filters_and_runs_nothing_of_the_data(chromium, tmp_path):
    file = tmp_path / "audit.html"
    file.write_text(made())
    chromium.open(file, width=1200)
    assert chromium.run("return document.title").startswith("Audit </script>")
    pictures = "return [...document.images].every((i) => i.complete && i.naturalWidth > 0)"
    chromium.run("for (const i of document.images) i.loading = 'eager'")
    assert chromium.run(pictures) and chromium.run("return document.images.length") == SIZE

    column = "return [...document.querySelectorAll('.card')].filter((c) => !c.hidden).map((c) => "
    utility = chromium.run(column + "Number(c.dataset.utility))")
    assert utility == sorted(utility) and len(utility) == SIZE
    change = "const e = document.getElementById('%s'); e.value = '%s'; " \
             "e.dispatchEvent(new Event('%s'))"  # fmt: skip
    chromium.run(change % ("sort", "probability", "change"))
    shown = chromium.run(column + "Number(c.dataset.probability))")
    assert shown == sorted(shown, reverse=True)
    chromium.run(change % ("given", "b", "change"))
    assert set(chromium.run(column + "c.dataset.given)")) == {"b"}
    chromium.run(change % ("text", "worse-1", "input"))
    assert len(chromium.run(column + "c.dataset.row)")) == SIZE // 4 // CLASSES
    text = "return document.getElementById('%s').textContent"
    assert chromium.run(text % "recall") == "100.0 %"
    chromium.run(change % ("threshold", "0", "input"))
    assert chromium.run(text % "dropped") == "0"
    assert chromium.screenshot().startswith(b"\x89PNG")


def test_on_a_phone_nothing_is_wider_than_the_page(chromium, tmp_path):
    file = tmp_path / "audit.html"
    file.write_text(made())
    chromium.open(file, width=360)
    assert chromium.run("return document.documentElement.scrollWidth") <= 360


# --- files ---------------------------------------------------------------------------------------


def test_tables_are_whole_and_no_formula_reaches_a_spreadsheet(tmp_path):
    table = {
        "row": np.arange(2),
        "text": np.array(["=1+1", 'a,"b"\nc']),
        "none": np.array(["", "-2"]),
        "x": np.array([0.5, np.nan]),
    }
    tables.write(table, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["row", "text", "none", "x"], ["0", "'=1+1", "", "0.5"], ["1", 'a,"b"\nc', "-2", "nan"]
        ]  # fmt: skip
    with pytest.raises(ValueError, match="one length"):
        tables.write({**table, "row": np.arange(3)}, tmp_path / "t.csv")
    with pytest.raises(ValueError, match="suffix"):
        tables.write(table, tmp_path / "t.txt")
    parquet = pytest.importorskip("pyarrow.parquet")
    tables.write(table, tmp_path / "t.parquet")
    assert parquet.read_table(tmp_path / "t.parquet").column("text").to_pylist() == [
        "=1+1",
        'a,"b"\nc',
    ]


def test_a_failure_leaves_what_was_there(tmp_path):
    file = tmp_path / "audit.html"
    file.write_text("before")
    with pytest.raises(OSError), tables.renamed(file) as part:
        part.write_text("half")
        raise OSError("no space left")
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    """A small file of features, and the folder of a pool."""
    quick = Head(widths=(), steps=40, batch_size=32, folds=2, learning_rate=0.1, weight_decay=0.1)
    real = audit.audit
    monkeypatch.setattr(audit, "audit", lambda *a, **options: real(*a, **options, head=quick))
    labels = np.arange(SIZE) % 2
    x = (4 * labels[:, None] + _rng.normal(size=(SIZE, 4))).astype("f4")
    given = labels.copy()
    given[:6] = 1 - given[:6]
    names = np.array([f"{i}/0.png" for i in range(SIZE)])
    np.savez(tmp_path / "mine.npz", features=x, labels=given, clean=labels, file_name=names,
             images=_rng.random((SIZE, 4, 4, 1)))  # fmt: skip
    lines = [json.dumps({"file_name": n, "prompt": EVIL, "strength": 0.3, "flags": ["clip"]})
             for n in names]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_an_audit_of_arrays_and_a_pool(arrays):
    pytest.importorskip("jinja2")
    options = [f"--features={arrays / 'mine.npz'}", f"--pool={arrays}", f"--out={arrays / 'out'}"]
    audit.main(options)
    with open(arrays / "out" / "audit.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows if row["wrong"] == "1"] == list("012345")
    assert rows[3]["file"] == "3/0.png" and rows[3]["prompt"] == EVIL
    assert {row["flags"] for row in rows} == {"clip"} and rows[3]["judged"] == "wrong"
    assert (arrays / "out" / "audit.html").read_text().count("data:image/png") >= SIZE // 2


def test_it_is_said_if_no_label_is_surely_wrong(arrays, capsys):
    pytest.importorskip("jinja2")
    with np.load(arrays / "mine.npz") as file:
        given = dict(file)
    for number in (0, SIZE // 4):
        rows = np.arange(SIZE)
        labels = np.where(rows < number, 1 - given["clean"], given["clean"])
        changes = {"labels": labels, "trusted": rows >= SIZE // 2}
        np.savez(arrays / "other.npz", **{**given, **changes})
        audit.main([f"--features={arrays / 'other.npz'}", f"--out={arrays / 'out'}"])
        said, page = capsys.readouterr().err, (arrays / "out" / "audit.html").read_text()
        assert ("no sure evidence that labels are wrong" in said) == (number == 0)
        assert ("no sure evidence" in page) == (number == 0) and "standard errors" in page


def test_labels_may_be_texts_as_in_what_trains(arrays):
    with np.load(arrays / "mine.npz") as file:
        given = dict(file)
    names = np.array(["dog", "cat"])
    texts = {key: names[given[key]] for key in ("labels", "clean")}

    def read(**changes):
        np.savez(arrays / "texts.npz", **{**given, **texts, **changes})
        return audit._of_file(str(arrays / "texts.npz"), "", 0, "", 0)

    found = read()
    assert found["class_names"].tolist() == ["cat", "dog"]
    for key in texts:
        np.testing.assert_array_equal(found[key], 1 - given[key])
        np.testing.assert_array_equal(read(class_names=names)[key], given[key])
    with pytest.raises(ValueError, match=r"texts.npz: labels must be one of .*given 'cat'"):
        read(class_names=np.array(["cats", "dog"]))


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 must be JSON"), ('["x"]', "line 2 must be a JSON object"),
     ('{"file_name": "elsewhere"}', "must have a line for 1/0.png")],
)  # fmt: skip
def test_a_damaged_line_of_metadata_is_named_and_nothing_is_written(arrays, line, message):
    lines = (arrays / "metadata.jsonl").read_text().split("\n")
    (arrays / "metadata.jsonl").write_text("\n".join([lines[0], line, *lines[2:]]))
    out = arrays / "out"
    with pytest.raises(ValueError, match=message):
        audit.main([f"--features={arrays / 'mine.npz'}", f"--pool={arrays}", f"--out={out}"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--workdir=nowhere"], "finished run"), (["--features=no.npz"], "npz file of arrays"),
     (["--features=cifar10n"], "must be named NAME@TAG; given 'cifar10n'"),
     (["--features=nothing@crop", "--data_dir=no"], "no/features/nothing/crop must be a feature"),
     (["--workdir=nowhere", "--data_dir=no"], "--data_dir does not go with --workdir; given no"),
     (["--workdir=nowhere", "--trusted=5"], "--trusted does not go with --workdir"),
     (["--features=x@y", "--trusted=-1"], "--trusted must be a whole number >= 0; given -1"),
     (["--features=no.npz", "--draws=3"], "--draws does not go with --features"),
     (["--features=no.npz", "--config=x.py"], "--config does not go with --features"),
     (["--out=my.csv", "--workdir=nowhere"], "--out must be a folder, .*; given my.csv")],
)  # fmt: skip
def test_bad_input_is_said_and_nothing_is_written(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        audit.main([f"--out={tmp_path / 'out'}", *options])
    assert not (tmp_path / "out").exists()
