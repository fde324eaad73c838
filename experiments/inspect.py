"""Describes a data set before training: counts, ranges, copies, a contact sheet.

    saflex inspect NAME... [--data_dir=data] [--size=0] [--sheets=runs/inspect]

NAME as in `config.data.name`. The splits are those of a run: the official ones; a missing one is
held out of training, a fifth by class, seed 0. Images of an own folder have the size and the
channels that `saflex train --data` gives them. A copy is an input that equals another one, bit for
bit; a run removes copies of val and test samples from training. Exits with 1 if any is left.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import command_line, opening, style, task
from experiments.configs import own, sources
from saflex_jax import data
from saflex_jax.data.splits import chunks

_DIR = flags.DEFINE_string("data_dir", "data", "Where prepared data sets are.")
_SIZE = flags.DEFINE_integer("size", 0, "Pixels that images are resized to; 0 = not resized.")
_SHEETS = flags.DEFINE_string("sheets", "runs/inspect", "Contact sheets go here.")
ROWS, COLUMNS = 12, 8  # of a contact sheet: classes (or columns of a table), samples of each
MOST = 20  # values that are listed of a column or a further label set
PARTS = 5  # without an official split 1 / PARTS of the training samples is held out


def default_split(source: data.Source, name: str) -> data.Split:
    """The official split; a missing part is held out of training by class, seed 0."""
    size = len(source.splits.get("train", source.labels)) // PARTS
    held = {part: 0 if part in source.splits else size for part in ("val", "test")}
    return task.make_split(ConfigDict(sources.section(name, **held)), source, seed=0)


def copies(split: data.Split, prints: np.ndarray) -> dict[str, int]:
    """How many rows of each split equal another row of it, or one of another split."""
    parts = {name: prints[rows] for name, rows in split._asdict().items()}
    counts = {f"within {name}": len(p) - len(np.unique(p)) for name, p in parts.items()}
    for first, second in itertools.combinations(parts, 2):
        counts[f"{first} in {second}"] = int(np.isin(parts[first], parts[second]).sum())
    return counts


def by_class(source: data.Source) -> np.ndarray:
    """bool[N, K]: the classes with a positive prior."""
    return data.priors(source.labels, source.num_classes, source.task) > 0


def class_names(source: data.Source) -> tuple[str, ...]:
    """K names."""
    multilabel = source.task == "multilabel"
    names = source.class_names or tuple(map(str, range(source.num_classes - multilabel)))
    return (*names, "none") if multilabel else names


def value_range(inputs: Any) -> str:
    """Least, greatest and mean value, read in chunks."""
    low, high, total, count = np.inf, -np.inf, 0.0, 0
    for part in chunks(inputs, task.CHUNK):
        low, high = min(low, part.min()), max(high, part.max())
        total, count = total + part.sum(dtype=np.float64), count + part.size
    return f"{low:g} to {high:g}, mean {total / count:.5g}"


def describe_columns(source: data.Source) -> list[str]:
    """One line a column: its range or categories, and the share that is missing."""
    lines = []
    for column, values in zip(source.columns, np.asarray(source.inputs).T):
        known = values[~np.isnan(values)]
        text = f"{known.min():g} to {known.max():g}, mean {known.mean():.5g}"
        if column.categories is not None:
            counts = np.bincount(known.astype(int), minlength=len(column.categories))
            text = _counted(column.categories, counts)
        missing = 1 - len(known) / len(values)
        lines.append(f"  {column.name:24} {text}" + (f"; {missing:.1%} missing" if missing else ""))
    return lines


def _counted(values: Sequence, counts: np.ndarray) -> str:
    text = ", ".join(f"{value} {number}" for value, number in zip(values[:MOST], counts))
    return text + (f" and {len(values) - MOST} more" if len(values) > MOST else "")


def report(name: str, source: data.Source, prints: np.ndarray) -> tuple[list[str], int]:
    """(lines to print, number of copies that stay between splits)."""
    split = default_split(source, name)
    cleaned, removed = data.without_copies(split, prints)
    before, after = copies(split, prints), copies(cleaned, prints)
    shape = "x".join(map(str, source.inputs.shape[1:]))
    has_class = by_class(source)
    lines = [
        f"{name}: {len(source.labels)} samples {source.inputs.dtype}[{shape}], "
        f"{source.num_classes} classes, {source.task}",
        *opening.notes(source),
    ]
    for part, rows in cleaned._asdict().items():
        counts = ", ".join(f"{c} {n}" for c, n in zip(class_names(source), has_class[rows].sum(0)))
        origin = "official" if part in source.splits else "held out here"
        if part == "train" and "train" not in source.splits:
            origin = "the rest"
        lines.append(f"{part} ({origin}): {len(rows)} samples; {counts}")
    if source.columns is None:
        lines.append(f"values: {value_range(source.inputs)}")
    else:
        lines += ["columns:", *describe_columns(source)]
    for extra, values in source.extra.items():
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) == len(values):  # names of files
            continue
        lines.append(f"{extra}: {_counted(distinct, counts)}")
    lines.append("copies: " + ", ".join(f"{n} {place}" for place, n in before.items()))
    lines.append(f"removed: {removed['train']} of train, {removed['val']} of val")
    leak = sum(n for place, n in after.items() if not place.startswith("within"))
    lines.append(f"left between splits: {leak}" + ("" if leak else ", no leak"))
    return lines, leak


@style.look()
def sheet(name: str, source: data.Source, rows: np.ndarray) -> Figure:
    """Of training rows: samples of each class, or a histogram of each column by class."""
    has_class = by_class(source)[rows]
    names = tuple(name.replace("$", r"\$") for name in class_names(source))  # not mathematics
    title = f"{name}: training samples by class"
    if source.columns is None:
        figure = _samples(title, source.inputs, [rows[mask] for mask in has_class.T[:ROWS]], names)
    else:
        values = np.asarray(source.inputs)[rows].T
        figure = _histograms(title, source.columns[:ROWS], values, has_class, names)
    return figure


def _samples(title: str, inputs: Any, places: list[np.ndarray], names) -> Figure:
    rng = np.random.default_rng(0)
    figure = style.figure(0.5 + 1.2 * len(places), title)
    lines = figure.subplots(len(places), COLUMNS, squeeze=False)
    for name, rows, axes in zip(names, places, lines):
        for axis in axes:
            axis.set_axis_off()
        for axis, place in zip(axes, rng.permutation(rows)):
            axis.imshow(np.squeeze(inputs[place]), cmap="gray")
        axes[0].set_title(name, fontsize=style.SMALL)
    return figure


def _histograms(title: str, columns, values: np.ndarray, has_class: np.ndarray, names) -> Figure:
    lines = -(-len(columns) // 4)
    figure = style.figure(0.5 + 1.6 * lines, title)
    axes = figure.subplots(lines, 4, squeeze=False).flatten()
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    for axis, column, x in zip(axes, columns, values):
        groups = [x[mask & ~np.isnan(x)] for mask in has_class.T]
        codes = None if column.categories is None else np.arange(len(column.categories))
        bins = 20 if codes is None else np.append(codes, len(codes)) - 0.5
        axis.hist(groups, bins=bins, stacked=True, label=names)
        axis.set_title(column.name, fontsize=style.SMALL, parse_math=False)
        if codes is not None and len(codes) <= 8:
            axis.set_xticks(codes, [c[:10] for c in column.categories])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=6)
    return figure


def main(argv: list[str]) -> None:
    """Prints a report of each data set and draws its contact sheet."""
    if len(argv) < 2:
        raise app.UsageError("name at least one data set")
    out = pathlib.Path(_SHEETS.value)
    out.mkdir(parents=True, exist_ok=True)
    leaks = 0
    for name in argv[1:]:
        task.check(ConfigDict(sources.section(name)))
        read = own.as_read(pathlib.Path(name)) if task.is_own(name) and os.path.isdir(name) else {}
        size, channels = _SIZE.value or read.get("size", 0), read.get("channels", 0)
        source, prints = task.task_source("", name, _DIR.value, size, "", False, channels)
        lines, leak = report(name, source, prints)
        leaks += leak
        print("\n".join(lines))
        path = out / f"{pathlib.Path(name).stem}.png"
        style.save(sheet(name, source, default_split(source, name).train), path)
        print(f"contact sheet: {path}\n", file=sys.stderr)
    sys.exit(1 if leaks else 0)


def command() -> None:
    """The program, with the arguments of the process."""
    logging.set_verbosity(logging.WARNING)
    command_line.run_absl(main)


if __name__ == "__main__":
    command()
