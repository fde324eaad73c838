"""What a run says first: which data, how many samples, and whose labels are wrong or unchecked."""

from __future__ import annotations

import math
import pathlib

import numpy as np
from ml_collections import ConfigDict

from experiments import task
from saflex_jax.data import Source
from saflex_jax.data.images import SUFFIXES

NAMED = 3  # files, or categories, of those that a note is about


def lines(config: ConfigDict, data: task.Data) -> str:
    """A line on the data and their labels; a second one where nobody checked who is trusted."""
    section, source = config.data, data.source
    shape = "x".join(map(str, source.inputs.shape[1:]))
    what = f"inputs of {shape}"
    if source.columns is not None:
        categories = sum(column.categories is not None for column in source.columns)
        numbers = _counted(len(source.columns) - categories, "number", "numbers")
        kinds = f" ({numbers}, {_counted(categories, 'category', 'categories')})"
        what = f"rows of {shape} columns" + kinds * (categories > 0)
    counts = f"{len(data.pools.candidates.labels):,} train"
    val, test = len(data.held_out.labels), int(np.sum(data.test.mask))
    drawn = task.is_own(section.name) and section.val > 0
    trains = " (they also train)" if section.train_on_val else ""
    counts += f", {val:,} {'validate' if drawn else 'are trusted'}{trains}, {test:,} test"
    said = [
        f"{pathlib.Path(section.name).stem}: {_labels(section, float(np.mean(data.wrong)))}; "
        f"{source.num_classes} classes, {what}; {counts}"
    ]
    said += notes(source)
    if drawn:
        said.append(
            f"note: nobody named trusted samples. The {val:,} validation samples are drawn from "
            f"the same labels and may be as wrong{_assumed(config)}. Check a few samples of each "
            "class and name them: --trusted=FILE, or a folder val/"
        )
    return "\n".join(said)


def notes(source: Source) -> list[str]:
    """What of a data set may not be meant: files that are left out, categories like numbers."""
    said, number = [], len(source.left_out)
    if number:
        named = ", ".join(source.left_out[:NAMED]) + ", ..." * (number > NAMED)
        said.append(
            f"note: {_counted(number, 'file', 'files')} left out, no image ({', '.join(SUFFIXES)}) "
            f"directly in the folder of a class: {named}"
        )
    for column in source.columns or ():
        names = column.categories or ()
        texts = [name for name in names if not _is_number(name)]
        if 0 < 2 * len(texts) < len(names):
            said.append(
                f"note: column {column.name!r} is read as {len(names):,} categories, all numbers "
                f"but {len(texts):,}: {', '.join(map(repr, texts[:NAMED]))}. If it is meant as "
                "numbers, leave these empty"
            )
        elif 2 * len(names) > len(source.labels):
            said.append(
                f"note: column {column.name!r} has {len(names):,} categories in "
                f"{len(source.labels):,} rows. If it names the rows, remove it"
            )
    return said


def _counted(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _assumed(config: ConfigDict) -> str:
    """The share of wrong labels that the rule is told, since it cannot learn it."""
    if config.method.rule != "saflex":
        return ""
    share = config.method.saflex.rule.noise_rate
    if share is None:
        return ", so the share of wrong labels cannot be learned"
    return f", so {share:.0%} wrong labels are assumed (config.method.saflex.rule.noise_rate)"


def _labels(section: ConfigDict, wrong: float) -> str:
    """What was done to the training labels."""
    changed = []
    if section.noise:
        changed.append(
            f"{section.noise:.0%} OF THE TRAINING LABELS MADE WRONG, {section.noise_kind} "
            f"(config.data.noise={section.noise:g})"
        )
    if section.outside:
        changed.append(
            f"{section.outside:.0%} OF THE TRAINING INPUTS FROM {section.outside_from} "
            f"(config.data.outside={section.outside:g})"
        )
    if section.labels:
        changed.append(
            f"label set {section.labels!r}, {wrong:.0%} of it wrong (config.data.labels)"
        )
    return ", ".join(changed) or "labels as given"
