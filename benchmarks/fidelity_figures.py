"""Figures of the fidelity benchmark, drawn from its JSON alone."""

from __future__ import annotations

import pathlib

import numpy as np
from matplotlib.figure import Figure

COURSE = {
    "identity": "#8a8a8a",
    "adam": "#e9c46a",
    "neumann 8": "#9b5de5",
    "cg .01": "#d1495b",
    "cg .1": "#f4a261",
    "head": "#2a9d5c",
    "head cg .01": "#1b6ca8",
    "head cg .1": "#56b4e9",
    "implicit": "#000000",  # a truth, beside the others
}
COURSE_TRUTHS = ("exact adam", "unrolled", "implicit .1", "leave one out")
KIND_COLOURS = {"none": "#8a8a8a", ".5": "#e9c46a", ".9": "#1b6ca8", ".99": "#d1495b"}


def rank(found: dict) -> float | None:
    """The mean rank correlation: of all labels, or of prior labels where a truth has no other."""
    measure = found.get("rank", found.get("utility_rank"))
    return None if measure is None else measure["mean"]


def agreement(made: dict) -> Figure:
    """Rank correlation of every direction with every truth, one panel a problem."""
    problems = made["over_all"]
    figure = Figure(figsize=(4.6 * len(problems) + 1.6, 9), layout="constrained")
    axes = figure.subplots(1, len(problems), squeeze=False)[0]
    rows = list(dict.fromkeys(d for t in problems.values() for found in t.values() for d in found))
    for axis, (name, by_truth) in zip(axes, problems.items()):
        columns = list(made["settings"]["truths"])
        columns = [truth for truth in columns if truth in by_truth]
        cells = [[rank(by_truth[t].get(row, {})) for t in columns] for row in rows]
        values = np.array(cells, dtype=float)
        image = axis.imshow(values, cmap="RdYlBu", vmin=-1, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.75 else "black"
                text = f"{value:.2f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
        axis.set_title(name)
        axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=9)
        axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [], fontsize=9)
    figure.colorbar(
        image,
        ax=axes,
        shrink=0.5,
        label="Spearman's correlation, mean over moments that all rows have",
    )
    figure.suptitle("Scores (rows) beside truths (columns); leave one out: prior labels only")
    return figure


def course(made: dict) -> Figure:
    """Rank correlation over the course of training."""
    problems = made["by_moment"]
    size = (3.2 * len(COURSE_TRUTHS), 2.7 * len(problems) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(problems), len(COURSE_TRUTHS), squeeze=False, sharey=True)
    for line, (name, by_truth) in zip(axes, problems.items()):
        for axis, truth in zip(line, COURSE_TRUTHS):
            for direction, colour in COURSE.items():
                found = by_truth.get(truth, {}).get(direction, {})
                at = found.get("rank", found.get("utility_rank", {}))
                places = [str(m) for m in (*made["settings"]["moments"], "optimum")]
                there = [p for p in places if at.get(p) is not None]
                values = [at[p] for p in there]
                axis.plot([places.index(p) for p in there], values, "o-", ms=4, color=colour,
                          label=direction)  # fmt: skip
            axis.axhline(0, color="k", lw=0.5)
            last = any("optimum" in d.get("rank", {}) for d in by_truth.get(truth, {}).values())
            ticks = places if last or name == "logistic" else places[:-1]
            axis.set_xticks(range(len(ticks)), ticks, fontsize=8)
            axis.set_title(f"{name}: {truth}", fontsize=9)
        line[0].set_ylabel("rank correlation")
    for axis in axes[-1]:
        axis.set_xlabel("step of training")
    axes[0][0].set_ylim(-0.6, 1.05)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(COURSE), fontsize=8)
    return figure


def memory(made: dict) -> Figure:
    """Above, what memories tell as visits add up; below, test accuracy with and without."""
    settings = list(next(iter(made["fidelity"].values())))
    rows = [(p, d) for p, found in made["fidelity"].items() for d in found[settings[0]]]
    figure = Figure(figsize=(11, 2.2 * len(rows) + 3.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.2 * len(rows), 3.2])
    axes = (
        above.subplots(len(rows), max(len(settings), 1), squeeze=False, sharex=True, sharey=True)
        if rows
        else []
    )
    for line, (problem, direction) in zip(axes, rows):
        for axis, setting in zip(line, settings):
            by_kind = made["fidelity"][problem][setting][direction]
            for kind, colour in KIND_COLOURS.items():
                for measure, style in {"auc": "-", "exact": ":"}.items():
                    found = by_kind.get(kind, {}).get(measure, {})
                    visits = [int(v) for v in found]
                    values = [v["mean"] for v in found.values()]
                    axis.plot(visits, values, style, color=colour, marker="o", ms=3,
                              label=f"{kind}: {measure}")  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_title(f"{problem}, {direction}: {setting}", fontsize=8)
            axis.set_xticks(visits, visits, fontsize=8)
            axis.axhline(0.5, color="k", lw=0.5)
    for axis in axes[-1]:
        axis.set_xlabel("visits", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    title = "decay of the memory: AUC of wrong labels (solid), rank with an exact step (dotted)"
    above.legend(handles, labels, loc="outside upper center", ncol=8, fontsize=7, title=title)
    panels = below.subplots(1, max(len(made["accuracy"]), 1), squeeze=False, sharey=True)[0]
    for axis, (setting, arms) in zip(panels, made["accuracy"].items()):
        dots(axis, {arm: found["seeds"] for arm, found in arms.items()})
        axis.set_title(f"{made['settings']['accuracy_on']}: {setting}", fontsize=9)
    panels[0].set_xlabel("test accuracy (dot: seed, line: mean)", fontsize=8)
    return figure


def end_to_end(made: dict) -> Figure:
    """Accuracies at equal wall time."""
    problems = made["accuracy"]
    figure = Figure(figsize=(5.6 * max(len(problems), 1), 3.6), layout="constrained")
    axes = figure.subplots(1, max(len(problems), 1), squeeze=False)[0]
    for axis, (name, arms) in zip(axes, problems.items()):
        steps = lambda found: np.mean(found["by_seed"]["steps"])
        labels = {arm: f"{arm}\n{steps(found):,.0f} steps" for arm, found in arms.items()}
        dots(axis, {labels[arm]: found["by_seed"]["last"] for arm, found in arms.items()})
        for place, found in enumerate(arms.values()):
            best = found["by_seed"]["best"]
            axis.plot(best, np.full(len(best), place + 0.22), "x", color="#d1495b", ms=4)
        seconds = made["settings"]["seconds"][name]
        axis.set_title(f"{name}, {seconds:g} s a run", fontsize=10)
        axis.set_xlabel("test accuracy (dot: seed, last; cross: least validation loss)", fontsize=8)
    return figure


def dots(axis, values: dict[str, list[float]]) -> None:
    """One line a name: its values and their mean."""
    for place, numbers in enumerate(values.values()):
        axis.plot(numbers, np.full(len(numbers), place), "o", color="#1b6ca8", ms=5, alpha=0.6)
        axis.vlines(np.mean(numbers), place - 0.3, place + 0.3, color="#0a3d62", lw=2)
    axis.set_yticks(range(len(values)), list(values), fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", lw=0.4)


def draw(made: dict, file: pathlib.Path) -> None:
    """Writes FILE.png of the agreement and FILE_course, _memory and _end_to_end.png beside it."""
    wanted = {
        "": (agreement, "agreement", "over_all"),
        "_course": (course, "agreement", "by_moment"),
        "_memory": (memory, "memory", "fidelity"),
        "_end_to_end": (end_to_end, "end_to_end", "accuracy"),
    }
    for suffix, (maker, part, needed) in wanted.items():
        if made.get(part, {}).get(needed):
            maker(made[part]).savefig(file.with_stem(file.stem + suffix), dpi=110)
