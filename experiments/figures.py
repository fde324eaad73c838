"""Figures of a comparison."""

from __future__ import annotations

import jax
import numpy as np
from matplotlib.figure import Figure

from saflex_jax.types import Targets

COLOURS = {"upstream": "#8a8a8a", "upstream_train_val": "#4d4d4d",
           "saflex": "#1b6ca8", "saflex_train_val": "#0a3d62"}  # fmt: skip
RIGHT, WRONG = "#2a9d5c", "#d1495b"
ROWS, COLUMNS = 2, 8


def pick(data, learned: Targets) -> list[dict]:
    """The first training samples with a right and with a wrong label, as plain lists."""
    given = np.argmax(data.pools.candidates.labels, -1)
    weights, labels = np.asarray(learned.weights), np.asarray(learned.labels)
    wrong = data.wrong[: len(weights)]
    chosen = np.concatenate([np.flatnonzero(~wrong)[:COLUMNS], np.flatnonzero(wrong)[:COLUMNS]])
    return [
        {
            "input": jax.tree.map(lambda x, i=i: x[i].tolist(), data.pools.candidates.inputs),
            "clean": int(data.clean_labels[i]),
            "wrong": bool(wrong[i]),
            "prior": int(given[i]),
            "label": int(labels[i].argmax()),
            "confidence": float(labels[i].max()),
            "weight": float(weights[i]),
        }
        for i in chosen
    ]


def measure(runs: dict[str, list[dict]]) -> str:
    """What the runs are compared by."""
    (first, *_), *_ = runs.values()
    return "test_auc" if "test_auc" in first else "test_accuracy"


def compare(runs: dict[str, list[dict]], *, title: str) -> Figure:
    """Accuracy of every arm; learned weights over time; samples with prior, learned label, weight.

    Args:
      runs: arm -> one record a seed, as `experiments.compare.run` returns them.
      title: of the figure.
    """
    name, samples = measure(runs), runs["saflex"][0]["samples"]
    images = np.ndim(samples[0]["input"]) == 3
    figure = Figure(figsize=(11, 7.2 if images else 4), layout="constrained")
    figure.suptitle(title)
    top, *bottom = figure.subfigures(2, 1, height_ratios=[1, 1.05]) if images else [figure]
    accuracy, weight = top.subplots(1, 2)

    for place, (arm, records) in enumerate(runs.items()):
        values = [r[name] for r in records]
        mean = np.mean(values)
        accuracy.hlines(mean, place - 0.3, place + 0.3, color=COLOURS[arm], lw=3)
        accuracy.plot(np.full(len(values), place), values, "o", color=COLOURS[arm], ms=5, alpha=0.7)
        accuracy.annotate(f"{mean:.3f}", (place, max(values)), xytext=(0, 5),
                          textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
    accuracy.margins(x=0.1, y=0.15)
    accuracy.set_xticks(range(len(runs)), [arm.replace("_", "\n", 1) for arm in runs], fontsize=9)
    accuracy.set_ylabel(f"{name.replace('_', ' ')} (line: mean, dot: seed)")

    for name, colour in (("right", RIGHT), ("wrong", WRONG)):
        key = f"eval/weight_{name}"
        histories = [r["history"] for r in runs["saflex"] if key in r["history"][0]]
        if not histories:
            continue  # no seed has such a label among the samples looked at
        curves = np.array([[h[key] for h in history] for history in histories])
        steps = [h["step"] for h in histories[0]]
        weight.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
        weight.plot(steps, curves.mean(0), color=colour, label=f"{name} prior label")
    weight.set_xlabel("step")
    weight.set_ylabel("mean learned weight (band: seeds)")
    weight.set_ylim(bottom=0)
    weight.legend(title="SAFLEX, training samples with a", fontsize=9)

    if images:
        bottom[0].suptitle(
            "prior label → learned label (its probability), weight; green: learned label right.\n"
            f"Above: right priors, below: wrong priors; seed {runs['saflex'][0]['seed']}.",
            fontsize=10,
        )
        lines = [[s for s in samples if s["wrong"] == wrong] for wrong in (False, True)]
        axes = bottom[0].subplots(ROWS, COLUMNS)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, s in ((axis, s) for row, line in zip(axes, lines) for axis, s in zip(row, line)):
            axis.imshow(np.squeeze(s["input"]), cmap="gray_r")
            axis.set_title(
                f"{s['prior']} → {s['label']} ({s['confidence']:.2f})\nw = {s['weight']:.2f}",
                fontsize=9,
                color=RIGHT if s["label"] == s["clean"] else WRONG,
            )
    return figure
