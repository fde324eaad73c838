"""What the benchmarks' commands share: options, JSON in and out, tables, figures."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import tqdm

from benchmarks import timing
from saflex_jax import checks
from saflex_jax.files import write_whole


class Benchmark:
    """A benchmark as a command; `__init__(options)` refuses bad options before anything runs.

    One with a figure also has the static method `draw(report, file)`, and the option --figure.

    Attributes:
      packages: whose versions belong to the numbers.
      series: what is timed.
      rounds: default of --rounds, how often; None where nothing is timed.
    """

    packages: Sequence[str]
    series: Sequence[timing.Series]
    rounds: int | None = 5

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Those beside the options of `command`."""

    @property
    def length(self) -> int:
        """Of the progress bar."""
        return sum(series.length for series in self.series)

    def measure(self, bar: tqdm.tqdm) -> None:
        """What the object keeps is reported, also after an interruption."""
        for series in self.series:
            series.measure(bar)

    def report(self) -> dict:
        """The JSON; what it has of "machine" is added to."""
        raise NotImplementedError

    def prepare(self, out: pathlib.Path) -> None:
        """Makes --out possible, before anything is measured; ValueError or OSError if it is not."""
        prepare_file("--out", out)

    def write(self, report: dict, out: pathlib.Path) -> None:
        """What --out says, at the end; at no moment half of it."""
        write_whole(out, json.dumps(report, indent=1) + "\n")

    @staticmethod
    def table(report: dict) -> Iterator[str]:
        """The JSON for people."""
        return tables({key: value for key, value in report.items() if key != "machine"})


def command(benchmark: type[Benchmark], argv: list[str] | None = None) -> int:
    """Measures, prints a table or JSON, and gives the exit status: 0, or 130 after Ctrl-C.

    Options that cannot be end the process with status 2 and a line, before anything is measured.
    """
    about = sys.modules[benchmark.__module__].__doc__
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--out", type=pathlib.Path, help="write the JSON there as well")
    if benchmark.rounds:
        parser.add_argument("--rounds", type=int, default=benchmark.rounds, help="of timing")
    if hasattr(benchmark, "draw"):
        parser.add_argument("--figure", type=pathlib.Path, help="draw the report to this PNG file")
    benchmark.add_options(parser)
    options = parser.parse_args(argv)
    rounds = {"rounds": options.rounds} if benchmark.rounds else {}
    figure, status = getattr(options, "figure", None), 0
    try:
        checks.whole(1, **rounds)
        bench = benchmark(options)
        if options.out is not None:
            bench.prepare(options.out)
        if figure is not None:
            prepare_file("--figure", figure)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # Whatever a library prints goes to stderr, beside the progress bar.
    with contextlib.redirect_stdout(sys.stderr), tqdm.tqdm(total=bench.length, leave=False) as bar:
        try:
            bench.measure(bar)
        except KeyboardInterrupt:
            status = 130
            print("interrupted; what was measured:", file=sys.stderr)
    report = bench.report()
    machine = timing.machine(benchmark.packages) | rounds
    report["machine"] = machine | report.get("machine", {})
    if options.out is not None:
        bench.write(report, options.out)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join([header(report), *benchmark.table(report)]))
    if figure is not None:  # last: what was measured is written by now
        benchmark.draw(report, figure)
    return status


def prepare_file(option: str, file: pathlib.Path) -> None:
    """Creates the folder of a file that is written at the end.

    Raises:
      ValueError: something else is there, or nobody may write there.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"{option} must be a file; given {file}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} must be a file in a folder; given {file}: {error}") from error
    if not os.access(file.parent, os.W_OK):
        raise ValueError(f"{option} must be in a folder to write to; given {file}")


def whole(found: dict | Exception | None) -> dict:
    """The records of a finished run of `arms`; one that failed or was cut counts for nothing.

    Raises:
      KeyboardInterrupt: after Ctrl-C.
      Exception: the run's own.
    """
    if found is None:
        raise KeyboardInterrupt
    if isinstance(found, Exception):
        raise found
    return found


def header(report: dict) -> str:
    """Machine and versions."""
    machine = report["machine"]
    versions = ", ".join(f"{p} {v}" for p, v in machine["versions"].items() if v is not None)
    return (
        f"{machine['cpu']}, {machine['cores']} cores; device {machine['device']}; "
        f"{machine['date']}\n{versions}"
    )


# --- tables


def tables(tree: Mapping, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Lines of nested dicts: a table for each dict of dicts of numbers, else a line a leaf.

    Texts beside numbers are left to the JSON.
    """
    rows = [value for value in tree.values() if isinstance(value, Mapping)]
    cells = [cell for row in rows for cell in row.values()]
    flat = len(rows) == len(tree) and not any(isinstance(cell, Mapping) for cell in cells)
    if flat and any(isinstance(cell, int | float) for cell in cells):
        yield f"\n{': '.join(path)}"
        yield from columns(tree)
        return
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from tables(value, (*path, key))
        else:
            yield f"{': '.join((*path, key))}: {show(value)}"


def columns(rows: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """Lines of a table, row -> head -> cell: names to the left, numbers to the right."""
    numbers = (h for cells in rows.values() for h, x in cells.items() if not isinstance(x, str))
    heads = list(dict.fromkeys(numbers))
    body = [(name, *(show(cells.get(h)) for h in heads)) for name, cells in rows.items()]
    lines = [("", *heads), *body]
    first, *widths = (max(map(len, column)) for column in zip(*lines))
    for name, *cells in lines:
        right = "".join(f"{cell:>{width + 3}}" for cell, width in zip(cells, widths))
        yield f"  {name:{first}}{right}"


def show(value: object) -> str:
    """A number to four digits; null for None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "null" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def nested(flat: Mapping[tuple[str, ...], object]) -> dict:
    """Nested dicts of {keys: leaf}."""
    tree = {}
    for (*path, last), value in flat.items():
        at = tree
        for key in path:
            at = at.setdefault(key, {})
        at[last] = value
    return tree


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below; None unless both were measured."""
    return None if above is None or below is None else above / below
