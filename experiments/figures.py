"""Figures of a comparison."""

from __future__ import annotations

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import style
from saflex_jax.types import Targets

ROWS, COLUMNS = 2, 6


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


@style.look()
def compare(
    runs: dict[str, list[dict]], *, title: str, differences: dict[str, dict] | None = None
) -> Figure:
    """The score of every arm; of the arm "saflex" also learned weights over time, and samples.

    Args:
      runs: arm -> one record a seed, as `experiments.arms.run` returns them.
      title: the task, in a few words.
      differences: arm -> `experiments.arms.paired_difference` to the first arm; None leaves their
        panel out.
    """
    saflex = runs.get("saflex", [{}])
    samples = saflex[0].get("samples", [])
    images = bool(samples) and np.ndim(samples[0]["input"]) == 3
    panels = 1 + (differences is not None) + bool(samples)
    heights = [1.0 + 0.36 * len(runs), 3.3 if images else 0.0]
    figure = style.figure(sum(heights), f"Which way of training does best? {title}")
    top, *bottom = figure.subfigures(2, 1, height_ratios=heights) if images else [figure]
    scores, *others = top.subplots(1, panels, squeeze=False)[0]
    _draw_scores(scores, runs)
    if differences is not None:
        _draw_differences(others.pop(0), differences)
    if samples:
        _draw_weights(others.pop(), saflex)
    if images:
        _draw_samples(bottom[0], samples, saflex[0]["seed"])
    return figure


def _draw_scores(axis, runs: dict[str, list[dict]]) -> None:
    """A row for each arm: a dot for each seed, a bar at their mean, which is written at the end."""
    measured = measure(runs)
    for row, (arm, records) in enumerate(runs.items()):
        values, shade = [100 * r[measured] for r in records], style.colour(arm)
        mean = np.mean(values)
        axis.plot(values, np.full(len(values), row), "o", color=shade, ms=5, alpha=0.55, mew=0)
        axis.vlines(mean, row - 0.3, row + 0.3, color=shade, lw=3)
        axis.text(1.02, row, f"{mean:.1f}", color=_written(arm), weight="bold", va="center",
                  transform=axis.get_yaxis_transform())  # fmt: skip
    _name_rows(axis, runs)
    axis.set_title("dot: a seed, bar: mean", weight="normal")
    axis.set_xlabel(f"{measured.replace('_', ' ')}, %")


def _name_rows(axis, arms) -> None:
    """The first arm on top."""
    axis.set_yticks(range(len(arms)), map(style.name, arms))
    for label, arm in zip(axis.get_yticklabels(), arms):
        label.set_color(_written(arm))
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")


def _written(arm: str) -> str:
    """The colour of what is written of an arm, dark enough to read: SAFLEX stands out."""
    return style.OURS if arm.startswith("saflex") else style.INK


def _draw_differences(axis, differences: dict[str, dict]) -> None:
    base, *_ = differences
    axis.axvline(0, color=style.INK, lw=1)
    for row, (arm, difference) in enumerate(differences.items()):
        if difference is None:
            continue
        shade = style.colour(arm)
        axis.plot(100 * difference["mean"], row, "o", color=shade)
        if difference["low"] is not None:
            axis.hlines(row, 100 * difference["low"], 100 * difference["high"], color=shade, lw=2)
    _name_rows(axis, differences)
    axis.set_yticks([])
    axis.set_title(f"minus {style.name(base)}".replace("\n", " "), weight="normal")
    axis.set_xlabel("points, seed by seed (95 % interval)")


def _draw_weights(axis, records: list[dict]) -> None:
    ends = []
    for name, shade in (("right", style.RIGHT), ("wrong", style.WRONG)):
        key = f"eval/weight_{name}"
        histories = [r["history"] for r in records if key in r["history"][0]]
        if not histories:
            continue  # no seed has such a label among the probed samples
        curves = np.array([[h[key] for h in history] for history in histories])
        steps = [h["step"] for h in histories[0]]
        axis.fill_between(steps, curves.min(0), curves.max(0), color=shade, alpha=0.15, lw=0)
        axis.plot(steps, curves.mean(0), color=shade, lw=2)
        ends.append((curves.mean(0)[-1], f"{name}\nlabels", shade))
    axis.axhline(1, color=style.MUTED, lw=1, ls=":", zorder=0)
    axis.set_ylim(bottom=0)
    style.ends(axis, ends, least=0.2)
    axis.set_title("The weights SAFLEX learns", weight="normal")
    axis.set_xlabel("training step (band: seeds)")
    axis.set_ylabel("mean weight in the loss")


def _draw_samples(figure, samples: list[dict], seed: int) -> None:
    """Of each kind of given label the first samples, with what SAFLEX made of them."""
    figure.suptitle(
        "What SAFLEX makes of single samples: the label, and the weight "
        f"(bar; mark: 1, as without SAFLEX). Seed {seed}, the first of each kind",
        x=0.012, ha="left", fontsize=style.TEXT, weight="normal",
    )  # fmt: skip
    kinds = [("right", False, style.RIGHT), ("wrong", True, style.WRONG)]
    most = max(1.0, *(s["weight"] for s in samples))
    for line, (kind, wrong, shade) in zip(figure.subplots(ROWS, COLUMNS), kinds):
        for axis in line:
            axis.set_axis_off()
        line[0].text(-0.25, 0.5, f"given label\nis {kind}", color=shade, weight="bold",
                     ha="right", va="center", transform=line[0].transAxes)  # fmt: skip
        for axis, sample in zip(line, (s for s in samples if s["wrong"] == wrong)):
            _draw_sample(axis, sample, most)


def _draw_sample(axis, sample: dict, most: float) -> None:
    """The image; below it the given label, the learned one, and a bar as long as its weight."""

    def said(height, text, right):
        axis.text(0.5, height, f"{text} {'✓' if right else '✗'}", ha="center", va="top",
                  fontsize=style.SMALL, color=style.RIGHT if right else style.WRONG,
                  transform=axis.transAxes)  # fmt: skip

    def bar(start, end, **options):
        axis.plot([start / most, end / most], [-0.52, -0.52], transform=axis.transAxes,
                  clip_on=False, solid_capstyle="butt", **options)  # fmt: skip

    # No label is right of a sample that is of no class; its given label is its clean one.
    outside = sample["wrong"] and sample["prior"] == sample["clean"]
    axis.imshow(np.squeeze(sample["input"]), cmap=style.PRINTED)
    said(-0.04, f"given {sample['prior']}", not sample["wrong"])
    learned = f"learned {sample['label']} ({sample['confidence']:.0%})"
    said(-0.22, learned, sample["label"] == sample["clean"] and not outside)
    bar(0, most, color=style.LINE, lw=6)
    bar(0, sample["weight"], color=style.OURS, lw=6)
    bar(0.985, 1.015, color=style.INK, lw=10)
    axis.text(1.05, -0.52, f"{sample['weight']:.2f}", va="center", fontsize=style.SMALL,
              transform=axis.transAxes)  # fmt: skip
