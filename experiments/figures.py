"""Figures of a comparison."""

from __future__ import annotations

import jax
import numpy as np
from matplotlib.figure import Figure

from saflex_jax.types import Targets

COLOURS = {"upstream": "#8a8a8a", "upstream_train_val": "#4d4d4d", "trusted_only": "#c17c1a",
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
    """The score that runs are compared by."""
    (first, *_), *_ = runs.values()
    return "test_auc" if "test_auc" in first else "test_accuracy"


def compare(
    runs: dict[str, list[dict]], *, title: str, differences: dict[str, dict] | None = None
) -> Figure:
    """The score of every arm; of the arm "saflex" also learned weights over time, and samples.

    Args:
      runs: arm -> one record a seed, as `experiments.arms.run` returns them.
      title: of the figure.
      differences: arm -> `experiments.arms.paired_difference` to the first arm; None leaves their
        panel out.
    """
    saflex = runs.get("saflex", [{}])
    samples = saflex[0].get("samples", [])
    images = bool(samples) and np.ndim(samples[0]["input"]) == 3
    panels = 1 + (differences is not None) + bool(samples)
    width = max(5.5, 0.9 * len(runs))  # room for the arms' names
    size = max(width * panels, 8), 7.2 if images else 4
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    top, *bottom = figure.subfigures(2, 1, height_ratios=[1, 1.05]) if images else [figure]
    accuracy, *others = top.subplots(1, panels, squeeze=False)[0]
    _draw_accuracy(accuracy, runs)
    if differences is not None:
        _draw_differences(others.pop(0), differences, measure(runs))
    if samples:
        _draw_weights(others.pop(), saflex)
    if images:
        _draw_samples(bottom[0], samples, saflex[0]["seed"])
    return figure


def colour(arm: str, place: int) -> str:
    """The arm's colour; by its place if it has none of its own."""
    return COLOURS.get(arm, f"C{place}")


def _name_arms(axis, arms) -> None:
    lines = [arm.replace("_", "\n", 1) for arm in arms]
    axis.set_xticks(range(len(lines)), lines, fontsize=9)


def _draw_accuracy(axis, runs: dict[str, list[dict]]) -> None:
    name = measure(runs)
    for place, (arm, records) in enumerate(runs.items()):
        values, shade = [r[name] for r in records], colour(arm, place)
        mean = np.mean(values)
        axis.hlines(mean, place - 0.3, place + 0.3, color=shade, lw=3)
        axis.plot(np.full(len(values), place), values, "o", color=shade, ms=5, alpha=0.7)
        axis.annotate(f"{mean:.3f}", (place, max(values)), xytext=(0, 5),
                      textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
    axis.margins(x=0.1, y=0.15)
    _name_arms(axis, runs)
    axis.set_ylabel(f"{name.replace('_', ' ')} (line: mean, dot: seed)")


def _draw_differences(axis, differences: dict[str, dict], name: str) -> None:
    base, *_ = differences
    axis.axhline(0, color=COLOURS["upstream"], lw=1)
    for place, (arm, difference) in enumerate(differences.items()):
        if difference is None:
            continue
        shade = colour(arm, place)
        axis.plot(place, difference["mean"], "o", color=shade)
        if difference["low"] is not None:
            axis.vlines(place, difference["low"], difference["high"], color=shade, lw=2)
    _name_arms(axis, differences)
    axis.set_xlim(-0.5, len(differences) - 0.5)
    axis.set_ylabel(f"{name.replace('_', ' ')} minus that of {base},\nseed by seed (95 % interval)")


def _draw_weights(axis, records: list[dict]) -> None:
    for name, colour in (("right", RIGHT), ("wrong", WRONG)):
        key = f"eval/weight_{name}"
        histories = [r["history"] for r in records if key in r["history"][0]]
        if not histories:
            continue  # no seed has such a label among the probed samples
        curves = np.array([[h[key] for h in history] for history in histories])
        steps = [h["step"] for h in histories[0]]
        axis.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
        axis.plot(steps, curves.mean(0), color=colour, label=f"{name} prior label")
    axis.set_xlabel("step")
    axis.set_ylabel("mean learned weight (band: seeds)")
    axis.set_ylim(bottom=0)
    axis.legend(title="SAFLEX, training samples with a", fontsize=9)


def _draw_samples(figure, samples: list[dict], seed: int) -> None:
    figure.suptitle(
        "prior label → learned label (its probability), weight; green: learned label right.\n"
        f"Above: right priors, below: wrong priors; seed {seed}.",
        fontsize=10,
    )
    lines = [[s for s in samples if s["wrong"] == wrong] for wrong in (False, True)]
    axes = figure.subplots(ROWS, COLUMNS)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, s in ((axis, s) for row, line in zip(axes, lines) for axis, s in zip(row, line)):
        axis.imshow(np.squeeze(s["input"]), cmap="gray_r")
        axis.set_title(
            f"{s['prior']} → {s['label']} ({s['confidence']:.2f})\nw = {s['weight']:.2f}",
            fontsize=9,
            color=RIGHT if s["label"] == s["clean"] else WRONG,
        )
