"""Tables of candidates as files: CSV or Parquet, each written by one rename."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Mapping

import numpy as np

from saflex_jax import checks
from saflex_jax._compat import optional
from saflex_jax.files import renamed

FORMULA = ("=", "+", "-", "@", "\t", "\r")
# name -> values [N], numbers, truth values or texts
Table = Mapping[str, np.ndarray]


def check_name(path: pathlib.Path) -> None:
    """Raises ValueError unless a file's name says a form that `write` knows."""
    checks.choice((".csv", ".parquet"), **{"the suffix of a table": path.suffix})


def write(table: Table, path: pathlib.Path) -> None:
    """Writes a table as its file's name says, .csv or .parquet.

    Raises:
      ValueError: another suffix, or columns of several lengths.
      ImportError: Parquet without pyarrow.
    """
    check_name(path)
    sizes = {name: len(values) for name, values in table.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"columns must be of one length; given {sizes}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed(path) as part:
        if path.suffix == ".csv":
            with open(part, "w", newline="", encoding="utf-8") as file:
                lines = csv.writer(file)
                lines.writerow(table)
                lines.writerows(zip(*map(_texts, table.values())))
        else:
            with optional("pyarrow", extra="experiments"):
                import pyarrow
                from pyarrow import parquet
            columns = {name: pyarrow.array(values.tolist()) for name, values in table.items()}
            parquet.write_table(pyarrow.table(columns), part)


def _texts(values: np.ndarray) -> list[str]:
    if np.issubdtype(values.dtype, np.floating):
        return [f"{x:.6g}" for x in values.tolist()]
    if values.dtype == bool:
        return [str(int(x)) for x in values]
    # A spreadsheet takes a text that starts so for a formula.
    return [f"'{x}" if x.startswith(FORMULA) and not x.lstrip("-").isdigit() else x
            for x in map(str, values.tolist())]  # fmt: skip
