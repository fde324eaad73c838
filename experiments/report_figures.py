"""Figures of a report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from experiments import style

TICKS = (10, 20, 50, 100, 200, 500, 1000)  # of trusted samples
ROW = 0.165  # inches
# regime -> arm -> one dict a task, of `experiments.report.points`
Panels = dict[str, dict[str, list[dict]]]
GAIN = "points of test accuracy over the best fair partner"
DASHES = ("-", "--", ":", "-.")  # of arms that share a colour


def level(task: dict) -> float:
    """The share of wrong labels, in tenths."""
    return round(task["noise"], 1)


@style.look()
def gain_by_task(regimes: dict[str, list[dict]]) -> Figure:
    """One row per task: its mean gain and interval, and the partner; one panel per regime.

    Tasks with one share of wrong labels are together, in order of the gain.
    """
    lines = {regime: _rows(tasks) for regime, tasks in regimes.items()}
    heights = [len(rows) + 4 for rows in lines.values()]
    figure = style.figure(
        0.7 + ROW * sum(heights), "On which tasks is SAFLEX better than the best fair partner?"
    )
    axes = figure.subplots(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (regime, rows) in zip(axes, lines.items()):
        axis.axvline(0, color=style.INK, lw=1)
        for row, task in enumerate(rows):
            if isinstance(task, dict):
                _draw_gain(axis, row, task)
        names = [task["task"] if isinstance(task, dict) else task for task in rows]
        axis.set_yticks(range(len(rows)), names)
        for label, task in zip(axis.get_yticklabels(), rows):
            label.set_weight("normal" if isinstance(task, dict) else "bold")
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlabel(GAIN)
        axis.set_title(regime)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x")
    style.key(figure, {
        "better": {"color": style.OURS, "marker": "o"},
        "worse": {"color": style.ALL, "marker": "o"},
        "the 95 % interval has zero": {"color": style.OTHER, "marker": "o"},
        'hollow: of the half "development"':
            {"color": style.ALL, "marker": "o", "mfc": style.PAPER, "ls": ""},
    })  # fmt: skip
    return figure


def _rows(tasks: list[dict]) -> list[dict | str]:
    """The tasks with a heading before those of each share of wrong labels, most first."""
    rows: list[dict | str] = []
    for share in sorted(set(map(level, tasks)), reverse=True):
        own = [task for task in tasks if level(task) == share]
        rows += [f"{share:.0%} are wrong", *sorted(own, key=lambda task: -task["mean"])]
    return rows


def _draw_gain(axis, row: int, task: dict) -> None:
    low, high = task["low"], task["high"]
    shade = style.OTHER
    if low is not None:
        shade = style.OURS if low > 0 else style.ALL if high < 0 else style.OTHER
        axis.hlines(row, low, high, color=shade, lw=1.5)
    filled = task["half"] == "report"
    axis.plot(task["mean"], row, "o", color=shade, ms=5, mfc=shade if filled else style.PAPER)
    axis.text(1.01, row, f"- {task['partner']}", va="center", fontsize=style.SMALL,
              color=style.MUTED, transform=axis.get_yaxis_transform())  # fmt: skip


@style.look()
def gain_against_noise(panels: Panels) -> Figure:
    """One dot per task; the line is the mean of the tasks of one tenth of wrong labels."""

    def draw(axis, tasks, place, number, look):
        shares = np.round([t["noise"] for t in tasks], 2)
        # Side by side, since many tasks have the same share.
        shifted = shares + 0.012 * (place - (number - 1) / 2)
        tenths = np.array([level(t) for t in tasks])
        levels = sorted(set(tenths))
        gains = np.array([t["mean"] for t in tasks])
        means = [gains[tenths == level].mean() for level in levels]
        axis.plot(100 * shifted, gains, "o", color=look["color"], ms=4, alpha=0.45, mew=0)
        axis.plot(100 * np.array(levels), means, lw=2, **look)
        return means[-1]

    title = "Does SAFLEX gain more where more labels are wrong?"
    figure = _panels(panels, draw, title)
    for axis in figure.axes:
        axis.set_xlabel("wrong labels, % (dot: a task, line: their mean)")
    return figure


@style.look()
def gain_against_validation(panels: Panels) -> Figure:
    """One dot per task; a line with intervals joins tasks that differ in nothing else."""

    def draw(axis, tasks, place, number, look):
        families = {}
        for task in sorted(tasks, key=lambda t: t["val"]):
            families.setdefault(task["family"], []).append(task)
        for members in families.values():
            x, y = ([m[name] for m in members] for name in ("val", "mean"))
            joined = len(members) > 1
            axis.plot(x, y, marker="o", ms=5 if joined else 4, mew=0, lw=2,
                      alpha=1 if joined else 0.4, **look)  # fmt: skip
            for m in members if joined else []:
                if m["low"] is not None:
                    axis.vlines(m["val"], m["low"], m["high"], color=look["color"], lw=1)
            if joined and place == number - 1:  # the same families for all arms
                axis.annotate(members[0]["family"], (x[-1], y[-1]), xytext=(6, 0), va="center",
                              textcoords="offset points", fontsize=style.SMALL)  # fmt: skip

    figure = _panels(panels, draw, "How many trusted samples does SAFLEX need?")
    shades = {arm: style.colour(arm) for by_arm in panels.values() for arm in by_arm}
    named = {arm: shade for arm, shade in shades.items() if shade != style.OTHER}
    named |= {"other rules": style.OTHER} if len(named) < len(shades) else {}
    style.key(figure, {arm: {"color": shade, "marker": "o"} for arm, shade in named.items()})
    for axis in figure.axes:
        axis.set_xscale("log")
        axis.margins(x=0.12)
        low, high = axis.get_xlim()
        ticks = [number for number in TICKS if low <= number <= high]
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.set_xlabel("trusted samples (dot: a task,\nline: tasks that differ in this alone)")
    return figure


@style.look()
def course(tasks: dict[str, dict]) -> Figure:
    """The estimated share of wrong labels, and the share of changed labels, through a run.

    One line per task, the mean over its seeds; a column for each true share of wrong labels.
    """
    levels = sorted(set(map(level, tasks.values())))
    figure = style.figure(4.2, "Does SAFLEX find out how many labels are wrong?")
    titles = {"noise_rate": "estimated share\nof wrong labels, %",
              "relabelled": "samples whose likeliest\nlabel changed, %"}  # fmt: skip
    grid = figure.subplots(2, len(levels), squeeze=False, sharex=True, sharey=True)
    for line, (name, title) in zip(grid, titles.items()):
        line[0].set_ylabel(title)
        for axis, share in zip(line, levels):
            axis.axhline(100 * share, color=style.WRONG, ls="--", lw=1.5, zorder=3)
            for task in (t for t in tasks.values() if level(t) == share):
                steps = np.array(task["steps"])
                axis.plot(100 * steps / steps[-1], 100 * task[name].mean(0), color=style.OURS,
                          lw=1.2, alpha=0.7)  # fmt: skip
    for axis, share in zip(grid[0], levels):
        axis.set_title(f"{share:.0%} are wrong", color=style.WRONG)
    for axis in grid[1]:
        axis.set_xlabel("of the run, %")
    style.key(figure, {"the truth": {"color": style.WRONG, "ls": "--"},
                       "one task, mean of its seeds": {"color": style.OURS}})  # fmt: skip
    return figure


def _panels(panels: Panels, draw: Callable, title: str) -> Figure:
    """One panel per regime, with all arms; an arm is named at the height that `draw` returns."""
    figure = style.figure(3.4, title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (regime, by_arm) in zip(axes, panels.items()):
        axis.axhline(0, color=style.INK, lw=1)
        labels, used = [], {}
        for place, (arm, tasks) in enumerate(by_arm.items()):
            shade = style.colour(arm)
            number = used[shade] = used.get(shade, -1) + 1
            look = {"color": shade, "ls": DASHES[number % len(DASHES)]}
            height = draw(axis, tasks, place, len(by_arm), look) if tasks else None
            if height is not None:
                labels.append((height, arm, shade))
        style.ends(axis, labels)
        axis.set_title(regime)
        axis.grid(axis="y")
    axes[0].set_ylabel("points of test accuracy\nover the best fair partner")
    return figure


# Field of a point for the horizontal axis -> figure.
DRAWN = {"noise": gain_against_noise, "val": gain_against_validation}
