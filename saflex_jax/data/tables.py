"""Tables from CSV, ARFF and KEEL files, and their encoding for a network."""

from __future__ import annotations

import csv
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from saflex_jax import checks

# Not "None": it may be a category, as in "how many of them: none".
MISSING = ("?", "", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "<null>")
DIRECTIVES = ("@relation", "@attribute", "@input", "@inputs", "@output", "@outputs", "@data")
ATTRIBUTE = re.compile(r"""@attribute\s+('[^']*'|"[^"]*"|[^\s{]+)\s*(.*)""", re.I)
NUMERIC = re.compile(r"(real|integer|numeric)\s*(\[.*\])?", re.I)  # KEEL adds the range
QUOTED = re.compile(r"""b?(['"])(.*)\1""", re.S)  # 'x', "x", and the literal b'x'
CSV: dict[str, Any] = {"skipinitialspace": True}
ARFF: dict[str, Any] = {"skipinitialspace": True, "quotechar": "'", "escapechar": "\\"}


LEFT_OUT = "remove it from the file, or name it in read_table(drop=...)"


class Column(NamedTuple):
    """One feature of a table.

    >>> Column("job", ("clerk", "nurse")).categories[1]
    'nurse'

    Attributes:
      name: as in the file, or column<number> if it has none.
      categories: names of the categories, in the order of the codes; None = a numeric column.
    """

    name: str
    categories: tuple[str, ...] | None


class Table(NamedTuple):
    """A labelled table in memory.

    An example is at `read_table`.

    Attributes:
      values: f64[N, D], numbers as measured and codes of categories; NaN = missing.
      labels: int64[N] in [0, len(class_names)).
      columns: the D features, without the label and dropped columns.
      class_names: K names, in the order of the labels.
    """

    values: np.ndarray
    labels: np.ndarray
    columns: tuple[Column, ...]
    class_names: tuple[str, ...]


def read_table(
    path: str | os.PathLike,
    *,
    label: str | int | None = -1,
    header: bool | None = None,
    categorical: Sequence[str | int] = (),
    drop: Sequence[str | int] = (),
    missing: Sequence[str] = MISSING,
) -> Table:
    """Reads a comma-separated table in UTF-8: CSV, ARFF, or KEEL's .dat with or without its header.

    Surrounding spaces and quotes are removed (b'2' reads as 2), and so is a comma at the end of
    every line. A column is categorical if the file's @attribute or `categorical` says so, or if a
    value is neither a number nor missing. Categories and classes are in the order of the
    @attribute. Without one, numbers come first, in numeric order, then texts in alphabetic order;
    equal numbers, 1 and 1.0, are one category.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     _ = file.write("age,job,class\\n31,clerk,no\\n45,?,yes\\n28,nurse,no\\n")
    ...     file.flush()
    ...     table = read_table(file.name)
    >>> table.columns[1], table.class_names
    (Column(name='job', categories=('clerk', 'nurse')), ('no', 'yes'))
    >>> table.values.tolist()
    [[31.0, 0.0], [45.0, nan], [28.0, 1.0]]

    Args:
      path: the file.
      label: name or number of the label's column; -1 = KEEL's @output or else the last column;
        None = there is none, as in a table to predict: all labels are -1, there is no class, and
        a column may be constant.
      header: whether the first line of a CSV names the columns. None = it does if it has a text in
        some column whose other lines are all numbers or missing; so a table without numeric columns
        needs True.
      categorical: names or numbers of columns whose numbers are categories.
      drop: names or numbers of columns to leave out; they are not checked.
      missing: texts that stand for a missing value, in every column; NaN always does.

    Raises:
      ValueError: not a text table, no rows, rows of unequal length, two columns of one name;
        unknown names in the arguments; attributes that are neither numeric nor categorical, sparse
        rows, values that an @attribute does not allow; infinite numbers; a constant column; a
        missing label, fewer than two classes. Names the file, and its line or column.

    Source: ARFF as Weka defines it; Alcala-Fdez et al. 2011, KEEL data-mining software tool.
    """
    declared, outputs, lines = _split(path, _lines(path))
    names, cells, at = _body(path, lines, [c.name for c in declared], header, missing)
    for name in {n for n in names if names.count(n) > 1}:
        raise ValueError(f"{path} must have columns of different names; two are called {name!r}")

    if label == -1 and len(outputs) > 1:
        raise ValueError(f"label must be one of the outputs {outputs} of {path}; given none")
    label = outputs[0] if label == -1 and outputs else label
    target = None if label is None else _place(path, "label", label, names)
    dropped = {_place(path, "drop", c, names) for c in drop}
    nominal = {_place(path, "categorical", c, names) for c in categorical}
    features = [i for i in range(len(names)) if i != target and i not in dropped]
    if target in dropped or not features:
        named = "no label" if target is None else f"label {names[target]!r}"
        raise ValueError(
            f"{path} must have the label and one more column; given {_counted(names)}, {named}"
            + f" and drop {drop}" * bool(drop)
        )

    kinds = declared or [None] * len(names)
    where = [_Where(path, name, at) for name in names]
    class_names: tuple[str, ...] = ()
    labels = np.full(len(at), -1)
    if target is not None:
        class_names, labels = _classes(where[target], cells[target], kinds[target])
    columns, values = [], np.empty((len(labels), len(features)))
    for j, i in enumerate(features):
        categories, values[:, j] = _feature(where[i], cells[i], kinds[i], i in nominal)
        if target is not None:
            _check_varies(where[i], values[:, j])
        columns.append(Column(names[i], categories))
    return Table(values, labels, tuple(columns), class_names)


def category_sizes(columns: Sequence[Column]) -> tuple[int, ...]:
    """The number of categories of each categorical column, in order.

    >>> category_sizes([Column("age", None), Column("job", ("clerk", "nurse"))])
    (2,)

    Args:
      columns: of a table.
    """
    return tuple(len(c.categories) for c in columns if c.categories is not None)


def fit_encoder(
    values: np.ndarray, columns: Sequence[Column]
) -> Callable[[np.ndarray], np.ndarray | dict[str, np.ndarray]]:
    """Fits an encoder on the training rows; it turns rows of the table into a network's inputs.

    Numbers x become (x - mean) / sd, with mean and sd of the training values (population sd; 1 for
    a constant column); missing numbers become 0. Each numeric column with a missing training value
    gets an indicator, 1 = missing, after all numbers. Categories stay codes; missing and unseen
    ones become -1, which `jax.nn.one_hot` turns into zeros.

    >>> encode = fit_encoder(np.array([[1.0], [3.0], [np.nan]]), [Column("age", None)])
    >>> encode(np.array([[5.0], [np.nan]])).tolist()
    [[3.0, 0.0], [0.0, 1.0]]

    Args:
      values: f64[n, D], the training rows of a `Table`.
      columns: its D columns.

    Returns:
      f64[N, D] -> f32[N, D1] if all columns are numeric (D1 with indicators), else
      {"numeric": f32[N, D1], "categorical": i32[N, D2]}, D2 as in `category_sizes`.

    Raises:
      ValueError: not D columns, here or in the encoder; no rows; a numeric column without values,
        or with a number so large that most others become one.
    """
    _check_width(values, columns)
    if not len(values):
        raise ValueError("values must have at least one row to fit an encoder; given 0")
    is_numeric = np.array([c.categories is None for c in columns], bool)
    numbers, is_missing = values[:, is_numeric], np.isnan(values[:, is_numeric])
    if is_missing.all(0).any():
        name = [c.name for c in columns if c.categories is None][is_missing.all(0).argmax()]
        raise ValueError(f"values must have a number in column {name!r}; all rows lack one")
    constant = np.nanmax(numbers, 0) == np.nanmin(numbers, 0)  # the sd may round to above zero
    with np.errstate(over="ignore", invalid="ignore"):  # is looked at below
        mean, scale = np.nanmean(numbers, 0), np.where(constant, 1, np.nanstd(numbers, 0))
    for place in np.flatnonzero(_too_far_apart(numbers, mean, scale)):
        name = [c.name for c in columns if c.categories is None][place]
        raise ValueError(
            f"values must have numbers near enough to one another for float32 in column {name!r}; "
            f"given up to {np.nanmax(np.abs(numbers[:, place])):.6g}: remove or clip them"
        )
    has_indicator = is_missing.any(0)
    fitted_codes = [np.unique(codes) for codes in values[:, ~is_numeric].T]

    def encode(values):
        _check_width(values, columns)
        numbers, codes = values[:, is_numeric], values[:, ~is_numeric]
        is_missing = np.isnan(numbers)
        numeric = np.where(is_missing, 0, (numbers - mean) / scale)
        numeric = np.hstack([numeric, is_missing[:, has_indicator]]).astype(np.float32)
        if is_numeric.all():
            return numeric
        # NaN is never among the fitted codes: np.isin compares by ==.
        categorical = [
            np.where(np.isin(column, fitted), column, -1)
            for column, fitted in zip(codes.T, fitted_codes)
        ]
        return {"numeric": numeric, "categorical": np.stack(categorical, 1).astype(np.int32)}

    return encode


def _too_far_apart(numbers: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """bool[D]: whether encoding makes one of most of a column's different numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        encoded = ((numbers - mean) / scale).astype(np.float32)
    far = ~np.isfinite(scale) | ~np.isfinite(mean)
    for place, (before, after) in enumerate(zip(numbers.T, encoded.T)):
        seen = ~np.isnan(before)
        different = len(np.unique(before[seen]))
        far[place] |= different > 2 and 2 * len(np.unique(after[seen])) < different + 1
    return far


def _check_width(values: np.ndarray, columns: Sequence[Column]) -> None:
    if np.ndim(values) != 2 or values.shape[1] != len(columns):
        raise ValueError(f"values must have shape [N, {len(columns)}]; given {np.shape(values)}")


class _Cells(NamedTuple):
    """One column as read: row i holds values[rows[i]], a number, a text, or None (missing).

    Without texts `values` is f64[...], NaN = missing. Values may repeat.
    """

    values: np.ndarray | list[float | str | None]
    rows: np.ndarray | slice

    @property
    def numeric(self) -> bool:
        return isinstance(self.values, np.ndarray)


class _Where(NamedTuple):
    """A column of a file, for messages; `lines` are the line numbers of its rows."""

    path: str | os.PathLike
    name: str
    lines: Sequence[int]

    def __str__(self) -> str:
        return f"{self.path}, column {self.name!r}"

    def check(self, holds: np.ndarray, message: str) -> None:
        """Raises unless bool[N] holds for all rows; names the line of the first that fails."""
        if not holds.all():
            raise ValueError(f"{self}, line {self.lines[int(holds.argmin())]}: {message}")


def _lines(path: str | os.PathLike) -> dict[int, str]:
    """Number in the file -> line, stripped; without blank lines."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text table in UTF-8: {error}") from error
    if "\0" in text:
        raise ValueError(f"{path} must be a text table; it holds zero bytes")
    return {n: s for n, line in enumerate(text.split("\n"), 1) if (s := line.strip())}


def _split(
    path: str | os.PathLike, lines: dict[int, str]
) -> tuple[list[Column], list[str], dict[int, str]]:
    """Columns and outputs that the header of ARFF or KEEL declares (CSV has none), and the rows."""
    rows = {n: line for n, line in lines.items() if not line.startswith("%")}
    if not next(iter(rows.values()), "").startswith("@"):
        return [], [], lines
    declared, outputs = [], []
    for n, line in takewhile(lambda item: item[1].startswith("@"), list(rows.items())):
        del rows[n]
        directive, *rest = line.split(maxsplit=1)
        checks.choice(DIRECTIVES, **{f"{path}, line {n}: the directive": directive.lower()})
        if directive.lower() == "@attribute":
            declared.append(_attribute(path, n, line))
        if directive.lower() in ("@output", "@outputs"):
            outputs = _texts("".join(rest))
    if not declared:
        raise ValueError(f"{path} must have an @attribute for each column; given none")
    for n, row in rows.items():
        if row.startswith("{"):
            raise ValueError(f"{path}, line {n}: rows must be dense; given a sparse one, {row!r}")
    return declared, outputs, rows


def _attribute(path: str | os.PathLike, number: int, line: str) -> Column:
    match = ATTRIBUTE.fullmatch(line)
    name, kind = match.groups() if match else ("", "")
    if kind.startswith("{") and kind.endswith("}"):
        return Column(_strip(name), tuple(_texts(kind[1:-1])))
    if not NUMERIC.fullmatch(kind):
        raise ValueError(
            f"{path}, line {number}: an attribute must be real, integer, numeric or {{a,b,...}}; "
            f"given {line!r}"
        )
    return Column(_strip(name), None)


def _texts(line: str) -> list[str]:
    return [_strip(cell) for cell in next(csv.reader([line], **ARFF), [])]


def _strip(cell: str) -> str:
    text = cell.strip()
    quoted = QUOTED.fullmatch(text)
    return quoted[2].strip() if quoted else text


def _value(cell: str, missing: Sequence[str]) -> float | str | None:
    text = _strip(cell)
    if text in missing:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    if "_" in text:  # Python's literal for a number, but a name in a table
        return text
    return None if np.isnan(number) else number


def _body(
    path: str | os.PathLike,
    lines: dict[int, str],
    names: list[str],
    header: bool | None,
    missing: Sequence[str],
) -> tuple[list[str], list[_Cells], list[int]]:
    """The names of the columns, their cells, and the numbers of the rows' lines."""
    dialect = ARFF if names else CSV
    at, lines = list(lines), list(lines.values())
    if all(line.endswith(",") for line in lines):
        lines = [line[:-1] for line in lines]
    end, first = next(_rows(path, lines, at, dialect), (0, []))
    width = len(names or first)

    def read(skip):
        return _cells(path, lines[skip:], at[skip:], width, missing, dialect)

    if names:
        return names, *read(0)
    is_text = [isinstance(_value(cell, missing), str) for cell in first]
    if header or (header is None and any(is_text)):
        cells, below = read(end)
        has_numbers = [c.numeric and not np.isnan(c.values).all() for c in cells]
        if header or any(np.logical_and(is_text, has_numbers)):
            return [_strip(cell) or f"column{i}" for i, cell in enumerate(first)], cells, below
    return [f"column{i}" for i in range(width)], *read(0)


def _rows(
    path: str | os.PathLike, lines: list[str], at: list[int], dialect: dict[str, Any]
) -> Iterator[tuple[int, list[str]]]:
    """(number of lines up to its end, cells) of each row."""
    reader = csv.reader((f"{line}\n" for line in lines), **dialect)  # a quoted cell may go on
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {at[reader.line_num - 1]}: {error}") from error


def _cells(
    path: str | os.PathLike,
    lines: list[str],
    at: list[int],
    width: int,
    missing: Sequence[str],
    dialect: dict[str, Any],
) -> tuple[list[_Cells], list[int]]:
    """The columns, and the numbers of the rows' lines."""
    if not lines:
        raise ValueError(f"{path} must be a table with rows; given none")
    if not any(isinstance(_value(text, ()), float) for text in missing):
        try:  # NumPy's reader in C, for a table that is nothing but numbers
            table = np.loadtxt(lines, delimiter=",", comments=None, quotechar='"', ndmin=2)
            if table.shape[1] == width:
                return [_Cells(column, slice(None)) for column in table.T], at
        except ValueError:
            pass
    same, rows, ends = {}, [], []  # `same` holds equal texts once
    for end, row in _rows(path, lines, at, dialect):
        if len(row) != width:
            raise ValueError(
                f"{path}, line {at[end - 1]}: a row must have {width} values; given {len(row)}"
                + "; the first line has no comma: do ';' or tabs part its values?" * (width == 1)
            )
        rows.append([same.setdefault(cell, cell) for cell in row])
        ends.append(at[end - 1])
    return [_factored(column, missing) for column in zip(*rows)], ends


def _factored(cells: Sequence[str], missing: Sequence[str]) -> _Cells:
    places = {cell: i for i, cell in enumerate(dict.fromkeys(cells))}
    values = [_value(cell, missing) for cell in places]
    if not any(isinstance(v, str) for v in values):
        values = np.array(values, np.float64)  # None becomes NaN
    return _Cells(values, np.array([places[cell] for cell in cells]))


def _place(path: str | os.PathLike, argument: str, given: str | int, names: list[str]) -> int:
    """The place of the column that an argument names."""
    if given in names:
        return names.index(given)
    if isinstance(given, int) and -len(names) <= given < len(names):
        return given % len(names)
    raise ValueError(
        f"{argument} must name columns of {path}, or be their places in {len(names)}; "
        f"given {given!r}{checks.nearest(given, names)}"
    )


def _counted(names: Sequence[str]) -> str:
    """How many columns there are, and why there may be but one."""
    one = "one column (commas part values: if ';' or tabs do in this file, save it with commas)"
    return one if len(names) == 1 else f"{len(names)} columns"


def _classes(
    where: _Where, cells: _Cells, declared: Column | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes, and the labels int64[N]."""
    names, labels = _codes(where, cells, declared and declared.categories)
    where.check(~np.isnan(labels), "the label must not be missing")
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"{where} must have two or more classes; given {names[int(labels[0])]!r} alone"
        )
    return names, labels.astype(np.int64)


def _feature(
    where: _Where, cells: _Cells, declared: Column | None, nominal: bool
) -> tuple[tuple[str, ...] | None, np.ndarray]:
    """The categories (None = numeric) and the values f64[N] of a column."""
    categories = declared and declared.categories
    if categories or nominal or (declared is None and not cells.numeric):
        categories, values = _codes(where, cells, categories)
    else:
        values = _numbers(where, cells)
    return categories, values


def _check_varies(where: _Where, values: np.ndarray) -> None:
    if np.isnan(values).all():
        raise ValueError(f"{where} must have values, all are missing; {LEFT_OUT}")
    if (values == values[0]).all():
        raise ValueError(f"{where} must not be constant; {LEFT_OUT}")


def _numbers(where: _Where, cells: _Cells) -> np.ndarray:
    if not cells.numeric:
        texts = np.array([isinstance(v, str) for v in cells.values])
        value = next(v for v in cells.values if isinstance(v, str))
        where.check(~texts[cells.rows], f"a value must be a number, as declared; given {value!r}")
    numbers = cells.values[cells.rows]
    where.check(~np.isinf(numbers), "a number must be finite; leave it empty if it is missing")
    return numbers


def _codes(
    where: _Where, cells: _Cells, categories: tuple[str, ...] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """The categories (those that occur if None are given) and the code f64 of each row."""
    values = [None if v != v else v for v in cells.values]  # NaN is missing
    if categories is None:
        keys = sorted(set(values) - {None}, key=lambda v: (isinstance(v, str), v))
        categories = tuple(
            v if isinstance(v, str) else np.format_float_positional(v, trim="-") for v in keys
        )
    else:
        keys = [_value(name, ()) for name in categories]
    known = {key: code for code, key in enumerate(keys)}
    if len(known) < len(keys):
        raise ValueError(f"{where} must have different categories; given {categories}")
    unknown = np.array([v is not None and v not in known for v in values])
    if unknown.any():
        value = values[int(unknown.argmax())]
        where.check(
            ~unknown[cells.rows],
            f"a value must be one of {categories}, as declared; given {value!r}"
            f"{checks.nearest(value, categories)}",
        )
    codes = np.array([np.nan if v is None else known[v] for v in values], np.float64)
    return categories, codes[cells.rows]
