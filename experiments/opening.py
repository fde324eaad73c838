"""What a run says first: which data, how many samples, and whose labels are wrong or unchecked."""

from __future__ import annotations

import pathlib

import numpy as np
from ml_collections import ConfigDict

from experiments import task


def lines(config: ConfigDict, data: task.Data) -> str:
    """A line on the data and their labels; a second one where nobody checked who is trusted."""
    section, source = config.data, data.source
    shape = "x".join(map(str, source.inputs.shape[1:]))
    what = f"rows of {shape} columns" if source.columns is not None else f"inputs of {shape}"
    counts = f"{len(data.pools.candidates.labels):,} train"
    val, test = len(data.held_out.labels), int(np.sum(data.test.mask))
    drawn = task.is_own(section.name) and section.val > 0
    trains = " (they also train)" if section.train_on_val else ""
    counts += f", {val:,} {'validate' if drawn else 'are trusted'}{trains}, {test:,} test"
    said = [
        f"{pathlib.Path(section.name).stem}: {_labels(section, float(np.mean(data.wrong)))}; "
        f"{source.num_classes} classes, {what}; {counts}"
    ]
    if drawn:
        said.append(
            f"note: nobody named trusted samples. The {val:,} validation samples are drawn from "
            f"the same labels and may be as wrong{_assumed(config)}. Check a few samples of each "
            "class and name them: --trusted=FILE, or a folder val/"
        )
    return "\n".join(said)


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
