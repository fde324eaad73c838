import csv
import io

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from saflex_jax.data.tables import Column, category_sizes, fit_encoder, read_table
from tests.problems import PROPERTY

NAN = np.nan
COLUMNS = (Column("age", None), Column("a colour", ("blue", "red, dark")), Column("x", None))
VALUES = np.array(
    [[1, 1, -0.5], [2.5, 0, 1e-3], [NAN, 1, 7], [-1e4, NAN, NAN], [2, 0, 7]], np.float64
)
LABELS = np.array([1, 0, 1, 0, 0])
NAMES = "age,a colour,x,class\n"
ROWS = """1,"red, dark",-0.5,yes
2.5,blue,1e-3,no
?,"red, dark",7,yes
-1e4,?,?,no
2,blue,7,no
"""
ARFF = """% a comment
@RELATION 'one of several'

@attribute age numeric
@attribute 'a colour' {blue, 'red, dark'}
@ATTRIBUTE "x" REAL
@attribute class {no,yes}
% @attribute none string
@DATA
"""
KEEL = """@relation several
@attribute class{no,yes}
@attribute age real[-10000.0, 2.5]
@attribute 'a colour' { blue,'red, dark' }
@attribute x real [-0.5,7.0]
@inputs age, a colour, x
@outputs class
@data
"""


def keel_rows():
    """The label in the first column, as the header's @outputs says."""
    rows = [line.rpartition(",") for line in ROWS.replace('"', "'").splitlines()]
    return "".join(f"{label}, {values}\n" for values, _, label in rows)


FILES = {
    "csv": NAMES + ROWS,
    "csv_quoted": '"age" , "a colour", "x","class"\n'
    + ROWS.replace("yes", '"yes"').replace(",", " , ").replace("red ,  dark", "red, dark"),
    "csv_windows": "\ufeff" + (NAMES + ROWS).replace("\n", "\r\n") + "\r\n\r\n",
    "csv_commas_at_ends": (NAMES + ROWS).replace("\n", ",\n"),
    "csv_bytes": NAMES + ROWS.replace("yes", "b'yes'").replace("2.5", "b'2.5'"),
    "csv_missing": NAMES + ROWS.replace("?,?", "NA,<null>").replace("?", ""),
    "csv_no_newline": NAMES + ROWS.rstrip("\n"),
    "csv_nan": NAMES + ROWS.replace("?,?", "NaN,null").replace("?", "nan"),
    "arff": ARFF + ROWS.replace('"', "'").replace("\n", "\n%no row\n\n"),
    "keel": KEEL + keel_rows(),
}


def write(path, text):
    path.write_bytes(text.encode())
    return path


def assert_same(found, columns=COLUMNS, values=VALUES, labels=LABELS, names=("no", "yes")):
    assert found.columns == columns and found.class_names == names
    assert found.values.dtype == np.float64 and found.labels.dtype == np.int64
    np.testing.assert_array_equal(found.values, values)  # NaN equals NaN
    np.testing.assert_array_equal(found.labels, labels)


@pytest.mark.parametrize("kind", FILES)
def test_all_formats_give_the_same_table(kind, tmp_path):
    assert_same(read_table(write(tmp_path / "t", FILES[kind])))


def test_without_any_header_columns_are_numbered(tmp_path):
    columns = tuple(Column(f"column{i}", c.categories) for i, c in enumerate(COLUMNS))
    assert_same(read_table(write(tmp_path / "t.dat", ROWS)), columns)
    assert_same(read_table(write(tmp_path / "t.dat", ROWS), header=False), columns)
    # A text in the first line is then a value, and its column categorical.
    table = read_table(write(tmp_path / "t.dat", "n,k\n" + "1,a\n2,b\n"), header=False)
    assert table.columns == (Column("column0", ("1", "2", "n")),)


@pytest.mark.parametrize(
    "text, header, names",
    [
        ("u,v,w\n1,a,b\n2,b,a\n", None, ["u", "v"]),  # numbers below one text are enough
        ("u,,w\n1,a,b\n2,b,a\n", None, ["u", "column1"]),
        ("u,v,w\n?,a,b\n2,b,a\n3,b,a\n", None, ["u", "v"]),  # missing values are no texts
        ('"u\nu",v,w\n1,a,b\n2,b,a\n', None, ["u\nu", "v"]),
        ("u,v,w\n1,2,0\n2,3,1\n", None, ["u", "v"]),
        ("%u,v,w\n1,a,b\n2,b,a\n", None, ["%u", "v"]),  # no comment in a CSV
        ("u,a,b\n?,b,a\n?,a,b\n", None, None),  # missing values are no numbers
        ("1,2,w\n3,4,0\n5,6,1\n", None, ["1", "2"]),
        ("1,a,b\n2,b,a\n", None, None),
        ("?,a,b\n2,b,a\n3,b,b\n", None, None),  # nor is a missing value a name
        ("u,v,w\nx,a,b\ny,b,a\n", None, None),  # nothing tells a table of texts from its header
        ("u,v,w\nx,a,b\ny,b,a\n", True, ["u", "v"]),
        ("u,v,w\n1,a,b\n2,b,a\n", False, None),
        ("u,a,b\n1,b,a\n2,b,c\nz,c,c\n", None, None),
        ("1,2,0\n3,4,1\n5,6,1\n", None, None),
        ("1,2,0\n3,4,1\n5,6,0\n", True, ["1", "2"]),
    ],
)
def test_a_header_is_a_text_above_numbers(text, header, names, tmp_path):
    table = read_table(write(tmp_path / "t", text), header=header)
    assert [c.name for c in table.columns] == (names or ["column0", "column1"])
    rows = len(list(csv.reader(io.StringIO(text))))
    assert len(table.values) == len(table.labels) == rows - bool(names)


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text("ab,;\"'% é\\@{_", min_size=1, max_size=5).map(lambda s: f"w{s}w")


@st.composite
def tables(draw):
    """(columns as Python values, labels): numbers, words, or None; the first column has a number"""
    rows = draw(st.integers(3, 8))
    kinds = [NUMBERS, *draw(st.lists(st.sampled_from([NUMBERS, WORDS]), max_size=3))]
    size = {"min_size": rows, "max_size": rows}

    def varied(column):
        return len({v for v in column if v is not None}) > 1

    columns = [draw(st.lists(st.none() | k, **size).filter(varied)) for k in kinds]
    return columns, draw(st.lists(st.sampled_from([10, 9, -1]), **size).filter(varied))


def write_csv(columns, labels, *, named):
    text = io.StringIO()
    if named:
        csv.writer(text).writerow([f"name {i}" for i in range(len(columns))] + ["label"])
    csv.writer(text).writerows(zip(*columns, labels))  # None is written as nothing, floats by repr
    return text.getvalue()


def write_arff(columns, labels):
    def cell(value):
        if not isinstance(value, str):
            return "?" if value is None else str(value)
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"

    def kind(column):
        words = sorted({v for v in column if isinstance(v, str)}, reverse=True)
        return "{" + ",".join(map(cell, words)) + "}" if words else "real"

    lines = [f"@attribute 'name {i}' {kind(c)}" for i, c in enumerate(columns)]
    lines += ["@attribute label numeric", "@data"]
    return "\n".join(lines + [",".join(map(cell, row)) for row in zip(*columns, labels)])


@settings(PROPERTY, max_examples=200)
@given(tables(), st.sampled_from(["csv", "csv_named", "arff"]))
def test_what_is_written_is_read(tmp_path_factory, data, kind):
    columns, labels = data
    arff = kind == "arff"
    text = write_arff(*data) if arff else write_csv(*data, named=kind == "csv_named")
    table = read_table(write(tmp_path_factory.mktemp("t") / "t", text))
    for i, column in enumerate(columns):
        name, categories = table.columns[i]
        assert name == (f"column{i}" if kind == "csv" else f"name {i}")
        if categories is None:
            found = [None if np.isnan(v) else v for v in table.values[:, i]]
        else:
            distinct = {v for v in column if v is not None}
            assert list(categories) == sorted(distinct, reverse=arff)
            found = [None if np.isnan(v) else categories[int(v)] for v in table.values[:, i]]
        assert found == column
    assert table.class_names == tuple(str(v) for v in sorted(set(labels)))
    assert [int(table.class_names[k]) for k in table.labels] == labels


@settings(PROPERTY, max_examples=100)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=20, unique_by=(lambda p: p[0],)))
def test_numbers_are_the_same_with_and_without_a_text_in_the_table(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("t")
    numbers = [f"{a!r},{b:.25e},{i % 2}" for i, (a, b) in enumerate(pairs)]
    fast = read_table(write(folder / "fast", "\n".join(numbers)), drop=[1])
    texts = [f"{line},{'yn'[i % 2]}" for i, line in enumerate(numbers)]
    slow = read_table(write(folder / "slow", "\n".join(texts)), drop=[1, -1], label=2)
    assert_same(slow, fast.columns, fast.values, fast.labels, fast.class_names)
    np.testing.assert_array_equal(fast.values[:, 0], [a for a, _ in pairs])


@pytest.mark.parametrize("text", ["", ",t"])  # with a column of texts, and without
def test_categories_are_in_numeric_order_and_equal_numbers_one(text, tmp_path):
    rows = ["10,1,2", "9,2,10.0", "10.0,3,-1", "-0.5,4,2.0", "?,5,10", "0,6,2"]
    lines = "\n".join(row + text + "ab"[i % 2] * bool(text) for i, row in enumerate(rows))
    path = write(tmp_path / "t", lines)
    table = read_table(path, categorical=["column0"], label=2)
    assert table.columns[0].categories == ("-0.5", "0", "9", "10")
    np.testing.assert_array_equal(table.values[:, 0], [3, 2, 3, 0, NAN, 1])
    assert table.class_names == ("-1", "2", "10")
    np.testing.assert_array_equal(table.labels, [1, 2, 0, 1, 2, 1])
    assert category_sizes(table.columns) == (4, 2)[: 1 + bool(text)]


def test_numbers_come_before_texts_and_names_are_no_numbers(tmp_path):
    table = read_table(write(tmp_path / "t", "10,1_0,a\n9,1_1,b\nx,1_0,a\n_,1_1,b\n9,1_1,b\n"))
    assert [c.categories for c in table.columns] == [("9", "10", "_", "x"), ("1_0", "1_1")]


def test_the_headers_order_and_kinds_hold(tmp_path):
    header = "@attribute k {z, 1.0, unused, a}\n@attribute n integer[1,2]\n@attribute c {1, 0, 7}\n"
    path = write(tmp_path / "t", header + "@data\na,1,0\nz,2,1\n1,1,0.0\n")
    table = read_table(path)
    columns = (Column("k", ("z", "1.0", "unused", "a")), Column("n", None))
    assert_same(table, columns, [[3, 1], [0, 2], [1, 1]], [1, 0, 1], ("1", "0", "7"))
    assert category_sizes(table.columns) == (4,)
    assert read_table(path, categorical=["n"]).columns[1] == Column("n", ("1", "2"))


@pytest.mark.parametrize(
    "label, classes", [(-1, "no yes"), ("class", "no yes"), (0, "no yes"), (1, "-10000 1 2 2.5")]
)
def test_the_output_is_the_label_unless_another_is_named(label, classes, tmp_path):
    rows = keel_rows().replace("?,'red", "2.5,'red")
    table = read_table(write(tmp_path / "t", KEEL + rows), label=label)
    assert table.class_names == tuple(classes.split())
    assert len(table.columns) == 3


def test_columns_are_left_out_unread(tmp_path):
    rows = ["3,7,inf,a,?,0,z", "4,7,1,b,?,1,?", "5,7,2,c,?,1,z"]
    path = write(tmp_path / "t", "n,constant,infinite,k,missing,class,other\n" + "\n".join(rows))
    drop = ["constant", 2, -3, "other"]
    table = read_table(path, label="class", drop=drop)
    columns = (Column("n", None), Column("k", ("a", "b", "c")))
    assert_same(table, columns, [[3, 0], [4, 1], [5, 2]], [0, 1, 1], ("0", "1"))
    assert read_table(path, label=-2, drop=[*drop, "k"]).columns == (Column("n", None),)
    path = write(tmp_path / "t", "1,2,c\n3,4,0\n5,6,1\n")
    assert read_table(path, drop=[1]).columns == (Column("1", None),)  # a place, "1" a name
    assert read_table(path, drop=["1"]).columns == (Column("2", None),)


def test_a_table_may_have_no_label(tmp_path):
    table = read_table(write(tmp_path / "t", "n,k,m\n3,a,?\n4,a,?\n"), label=None)
    columns = (Column("n", None), Column("k", ("a",)), Column("m", None))
    assert_same(table, columns, [[3, 0, NAN], [4, 0, NAN]], [-1, -1], ())


def test_missing_values_are_what_the_caller_says(tmp_path):
    path = write(tmp_path / "t", "1,-9,a\n-9,2,b\n3,5,a\nnan,?,b\n")
    table = read_table(path, missing=["-9"])
    assert table.columns == (Column("column0", None), Column("column1", ("2", "5", "?")))
    np.testing.assert_array_equal(table.values, [[1, NAN], [NAN, 0], [3, 1], [NAN, 2]])
    # Also where all is numbers, which NumPy would read by itself.
    path = write(tmp_path / "t", "1,-9,0\n-9,2,1\n3,5,1\n")
    values = read_table(path, missing=["-9"]).values
    np.testing.assert_array_equal(values, [[1, NAN], [NAN, 2], [3, 5]])
    np.testing.assert_array_equal(read_table(path).values, [[1, -9], [-9, 2], [3, 5]])


def test_what_says_that_a_number_is_missing_makes_no_category(tmp_path):
    texts = ["N/A", "n/a", "#N/A", "<NA>", "NULL", "null", "NA", "?", "", "nan"]
    rows = [f"{text},u,{'ab'[i % 2]}\n" for i, text in enumerate(texts)]
    table = read_table(write(tmp_path / "t", "1,None,a\n2,u,b\n" + "".join(rows)))
    assert table.columns == (Column("column0", None), Column("column1", ("None", "u")))
    np.testing.assert_array_equal(table.values[:, 0], [1, 2, *[NAN] * len(texts)])


def test_one_value_and_missing_ones_are_two_values(tmp_path):
    table = read_table(write(tmp_path / "t", "5,u,a\n?,u,b\n5,?,b\n"))
    np.testing.assert_array_equal(table.values, [[5, 0], [NAN, 0], [5, NAN]])


ATTRIBUTES = "@relation r\n@attribute n real\n@attribute k {red,blue}\n@attribute c {0,1}\n@data\n"


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("", {}, "t.csv must be a table with rows; given none"),
        ("\n \n", {}, "t.csv must be a table with rows; given none"),
        ("a,b,c\n", {"header": True}, "must be a table with rows; given none"),
        ("a,b,c\n", {}, "must be a table with rows; given none"),
        (ATTRIBUTES, {}, "must be a table with rows; given none"),
        ("1,2\0,3\n4,5,6\n", {}, "t.csv must be a text table; it holds zero bytes"),
        ("1 2 3\n4 5 6\n", {}, r"must have the label and one more column; given one column .*';'"),
        ("x;y\n0,9;1\n", {}, "line 2: a row must have 1 values; given 2; .* do ';' or tabs part"),
        ("1,2,3\n\n4,5\n", {}, "t.csv, line 3: a row must have 3 values; given 2"),
        ("1,2,3\n4,5,6,\n", {}, "line 2: a row must have 3 values; given 4"),
        ("a,b,c\n1,2\n3,4\n", {}, "line 2: a row must have 3 values; given 2"),
        ("a,b,c\n1,2,0,1\n3,4,1,0\n", {}, "line 2: a row must have 3 values; given 4"),
        (f'1,2,3\n4,"{"x" * 200_000}",6\n', {}, "t.csv, line 2: field larger"),
        (ATTRIBUTES + "1,red,0\n%\n2,1\n", {}, "line 8: a row must have 3 values; given 2"),
        (ATTRIBUTES + "1,red\n2,blue\n", {}, "line 6: a row must have 3 values; given 2"),
        ("a,a,c\n1,2,0\n3,4,1\n", {}, "columns of different names; two are called 'a'"),
        ("a,b,c\n1,5,0\n3,5,1\n", {}, "t.csv, column 'b' must not be constant; remove .*drop="),
        ("a,b,c\n1,u,0\n3,u,1\n", {}, "column 'b' must not be constant; remove it"),
        (ATTRIBUTES + "1,red,0\n2,red,1\n", {}, "column 'k' must not be constant"),
        ("a,b,c\n1,?,0\n3,NA,1\n", {}, "column 'b' must have values, all are missing; remove it"),
        ("a,b,c\n1,2,0\n\n3,4,?\n", {}, "column 'c', line 4: the label must not be missing"),
        ("a,b,c\n1,2,0\n3,4,0.0\n", {}, "column 'c' must have two or more classes; given '0'"),
        (ATTRIBUTES + "1,red,1\n2,blue,1\n", {}, "two or more classes; given '1' alone"),
        ("a,b,c\n1,2,0\n3,-inf,1\n", {}, "column 'b', line 3: a number must be finite; leave"),
        (ATTRIBUTES + "1,red,0\n?,blue,1\nx,red,1\n", {}, "'n', line 8: .* declared; given 'x'"),
        (
            ATTRIBUTES + "1,red,0\n2,bleu,1\n",
            {},
            r"'k', line 7: a value must be one of \('red', 'blue'\).*'bleu'; did you mean 'blue'",
        ),
        (ATTRIBUTES + "1,red,0\n2,red,2\n", {}, "column 'c', line 7: a value must be one of"),
        (ATTRIBUTES.replace("red,", "1,1.0,") + "1,1,0\n2,1,1\n", {}, "different categories"),
        (
            "@attribute d date 'yyyy'\n@data\n1,2\n",
            {},
            "line 1: an attribute .* given .*date",
        ),
        ("@relation r\n@attribute s string\n@data\n", {}, "line 2: an attribute must be real"),
        ("@relation r\n@data\n1,2\n", {}, "must have an @attribute for each column; given none"),
        ("@atribute a real\n1,2\n", {}, "line 1: the directive must be .*did you mean '@attrib"),
        (ATTRIBUTES + "{0 1, 2 1}\n", {}, "t.csv, line 6: rows must be dense; given a sparse"),
        ("@outputs a, b\n" + ATTRIBUTES + "1,red,0\n", {}, r"one of the outputs \['a', 'b'\]"),
        ("@outputs d\n" + ATTRIBUTES + "1,red,0\n", {}, "label must name columns .* given 'd'"),
        (NAMES + ROWS, {"label": "clas"}, "label must name columns.*'clas'; did you mean 'class'"),
        (NAMES + ROWS, {"label": 4}, "label must name columns .* places in 4; given 4"),
        (NAMES + ROWS, {"drop": ["agee"]}, "drop must name .* given 'agee'; did you mean 'age'"),
        (NAMES + ROWS, {"drop": [-5]}, "drop must name .* given -5"),
        (NAMES + ROWS, {"categorical": ["xx"]}, "categorical must name .*did you mean 'x'"),
        (NAMES + ROWS, {"drop": ["class"]}, r"label 'class' and drop \['class'\]"),
        (NAMES + ROWS, {"drop": [0, 1, 2]}, r"must have the label and one more column"),
    ],
)
def test_errors_name_the_file_and_the_place(text, options, message, tmp_path):
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(ValueError, match=message) as error:
        read_table(path, **options)
    assert str(path) in str(error.value)


def test_a_picture_is_no_table(tmp_path):
    (tmp_path / "t.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"t.png must be a text table in UTF-8"):
        read_table(tmp_path / "t.png")


# --- encoder


def numeric(size):
    return tuple(Column(f"n{i}", None) for i in range(size))


def measured(rows=200, seed=0):
    """Four columns of different location and scale; the last two have missing values."""
    rng = np.random.default_rng(seed)
    values = 10.0 ** np.arange(-2, 2) * rng.standard_normal((rows, 4)) + [0, 5, -3, 1e3]
    values[:, 2:][rng.random((rows, 2)) < 0.2] = NAN
    return values


def test_numbers_are_standardised_as_by_scikit_learn():
    fitted, rest = np.split(measured(), [120])
    encode, scaler = fit_encoder(fitted, numeric(4)), StandardScaler().fit(fitted)
    for values in (fitted, rest):
        found = encode(values)
        assert found.dtype == np.float32 and found.shape == (len(values), 4 + 2)
        expected = np.nan_to_num(scaler.transform(values))
        np.testing.assert_allclose(found[:, :4], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found[:, 4:], np.isnan(values[:, 2:]))
    for column, missing in zip(encode(fitted).T[:4], np.isnan(fitted).T):
        present = column[~missing].astype(np.float64)
        assert abs(present.mean()) < 1e-5 and abs(present.std() - 1) < 1e-5
        assert (column[missing] == 0).all()


def test_only_the_fitted_rows_and_only_their_missing_values_count():
    values = measured()
    columns = (*numeric(4), Column("k", ("a", "b", "c", "d")))
    codes = np.random.default_rng(1).integers(2, size=(len(values), 1))
    fitted, rest = np.split(np.hstack([values, codes]), [100])
    encode = fit_encoder(fitted, columns)
    before = jax.tree.map(np.copy, encode(fitted[:7]))
    fitted[7:] = 1e9  # what was fitted is not looked at again
    jax.tree.map(np.testing.assert_array_equal, encode(fitted[:7]), before)
    rest[:, 0] = NAN  # a column without missing values among the fitted rows has no indicator
    rest[:, 4] = np.arange(len(rest)) % 4
    found = encode(rest)
    assert found["numeric"].shape == (len(rest), 4 + 2) and (found["numeric"][:, 0] == 0).all()
    np.testing.assert_array_equal(found["categorical"][:8, 0], [0, 1, -1, -1] * 2)
    jax.tree.map(
        np.testing.assert_array_equal, encode(rest[5:6]), jax.tree.map(lambda x: x[5:6], found)
    )


def test_a_constant_column_is_only_centred():
    fitted = np.array([[0.1, 3], [0.1, 4], [0.1, 5], [NAN, 6]])
    found = fit_encoder(fitted, numeric(2))(np.array([[0.1, 3], [2.6, 4], [NAN, 5]]))
    np.testing.assert_allclose(found[:, 0], [0, 2.5, 0], atol=1e-7)
    np.testing.assert_array_equal(found[:, 2], [0, 0, 1])


def test_categories_stay_codes_and_missing_ones_vanish_in_one_hot():
    columns = (Column("k", ("a", "b", "c")), Column("n", None), Column("l", ("u", "v")))
    fitted = np.array([[0, 1.0, 1], [2, 3.0, NAN], [NAN, 5.0, 0]])
    assert category_sizes(columns) == (3, 2)
    found = fit_encoder(fitted, columns)(np.vstack([fitted, [[1, 3.0, 1]]]))
    assert set(found) == {"numeric", "categorical"}
    assert found["numeric"].shape == (4, 1) and found["categorical"].dtype == np.int32
    codes = [[0, 1], [2, -1], [-1, 0], [-1, 1]]
    np.testing.assert_array_equal(found["categorical"], codes)
    np.testing.assert_array_equal(
        jax.nn.one_hot(found["categorical"][:, 0], 3), [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    )
    alone = fit_encoder(fitted[:, [0, 2]], columns[::2])(fitted[:, [0, 2]])
    assert alone["numeric"].shape == (3, 0)
    np.testing.assert_array_equal(alone["categorical"], codes[:3])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: fit_encoder(VALUES[:0], COLUMNS), "at least one row .* given 0"),
        (lambda: fit_encoder(VALUES[:, :2], COLUMNS), r"shape \[N, 3\]; given \(5, 2\)"),
        (lambda: fit_encoder(VALUES, COLUMNS)(VALUES[0]), r"shape \[N, 3\]; given \(3,\)"),
        (lambda: fit_encoder(VALUES[3:4], COLUMNS), "number in column 'x'"),
    ],
)
def test_encoder_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
