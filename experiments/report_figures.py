"""Figures of a report."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.figures import colour

TICKS = (10, 20, 50, 100, 200, 500, 1000)  # of trusted samples
# regime -> arm -> one dict a task, of `experiments.report.points`
Panels = dict[str, dict[str, list[dict]]]
GAIN = "points of test accuracy over the best fair partner"


def gain_by_task(regimes: dict[str, list[dict]]) -> Figure:
    """One row per task, in order of the gain: its mean and interval; one panel per regime.

    Filled dots are tasks of the half "report"; the colour is the share of wrong labels.
    """
    longest = max(map(len, regimes.values()))
    figure = Figure(figsize=(6.8 * len(regimes), 1.4 + 0.21 * longest), layout="constrained")
    shades = matplotlib.colormaps["viridis"]
    most = max(t["noise"] for tasks in regimes.values() for t in tasks) or 1.0
    axes = figure.subplots(1, len(regimes), squeeze=False)[0]
    for axis, (regime, tasks) in zip(axes, regimes.items()):
        ordered = sorted(tasks, key=lambda t: t["mean"])
        axis.axvline(0, color=colour("upstream", 0), lw=1)
        for row, t in enumerate(ordered):
            shade = shades(0.9 * t["noise"] / most)
            if t["low"] is not None:
                axis.hlines(row, t["low"], t["high"], color=shade, lw=1.5)
            axis.plot(t["mean"], row, "o", color=shade, ms=5,
                      mfc=shade if t["half"] == "report" else "white")  # fmt: skip
        names = [f"{t['task']} - {t['partner']}" for t in ordered]
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_ylim(-0.7, longest - 0.3)
        axis.set_xlabel(GAIN)
        axis.set_title(regime, fontsize=10)
        axis.grid(axis="x", alpha=0.2)
    for level in sorted({round(t["noise"], 1) for tasks in regimes.values() for t in tasks}):
        axes[0].plot([], [], "o", color=shades(0.9 * level / most), label=f"{level:.0%} are wrong")
    axes[0].plot([], [], "ko", mfc="white", label='half "development"')
    figure.legend(fontsize=8, loc="outside lower center", ncols=8)
    return figure


def gain_against_noise(panels: Panels) -> Figure:
    """One dot per task; the line is the mean of the tasks of one tenth of wrong labels."""

    def draw(axis, tasks, place, number, shade):
        shares = np.round([t["noise"] for t in tasks], 2)
        # Side by side, since many tasks have the same share.
        shifted = shares + 0.012 * (place - (number - 1) / 2)
        tenths = np.round(shares, 1)
        levels = sorted(set(tenths))
        gains = np.array([t["mean"] for t in tasks])
        means = [gains[tenths == level].mean() for level in levels]
        axis.plot(shifted, gains, "o", color=shade, ms=4, alpha=0.5, mew=0)
        axis.plot(levels, means, color=shade, lw=2)

    figure = _panels(panels, draw)
    for axis in figure.axes:
        axis.set_xlabel("share of wrong labels (dot: a task, line: mean of the tasks)")
    return figure


def gain_against_validation(panels: Panels) -> Figure:
    """One dot per task; a line with intervals joins tasks that differ in nothing else."""

    def draw(axis, tasks, place, number, shade):
        families = {}
        for task in sorted(tasks, key=lambda t: t["val"]):
            families.setdefault(task["family"], []).append(task)
        for members in families.values():
            x, y = ([m[name] for m in members] for name in ("val", "mean"))
            joined = len(members) > 1
            axis.plot(x, y, "o-" if joined else "o", color=shade, ms=5 if joined else 4, mew=0,
                      alpha=1 if joined else 0.4, lw=2)  # fmt: skip
            for m in members if joined else []:
                if m["low"] is not None:
                    axis.vlines(m["val"], m["low"], m["high"], color=shade, lw=1)

    figure = _panels(panels, draw)
    for axis in figure.axes:
        axis.set_xscale("log")
        axis.set_xticks(TICKS, map(str, TICKS))
        axis.minorticks_off()
        axis.set_xlabel("trusted samples (dot: a task, line: tasks that differ in this alone)")
    return figure


def course(tasks: dict[str, dict]) -> Figure:
    """The estimated share of wrong labels, and the share of changed labels, through a run.

    One line per task, the mean over its seeds; its colour is the true share of wrong labels.
    """
    figure = Figure(figsize=(12.4, 4.2), layout="constrained")
    shades = matplotlib.colormaps["viridis"]
    most = max(task["noise"] for task in tasks.values()) or 1.0
    titles = {"noise_rate": "share of wrong labels, as estimated",
              "relabelled": "share of samples whose most probable label changed"}  # fmt: skip
    for axis, (name, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        for task in tasks.values():
            shade = shades(0.9 * task["noise"] / most)
            steps = np.array(task["steps"])
            axis.plot(steps / steps[-1], task[name].mean(0), color=shade, lw=1.5)
        axis.set_xlabel("share of the run")
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelleft=True)
        axis.grid(alpha=0.2)
    for level in sorted({round(task["noise"], 1) for task in tasks.values()}):
        axis.plot([], [], color=shades(0.9 * level / most), label=f"{level:.0%} are wrong")
    figure.legend(fontsize=9, loc="outside lower center", ncols=8)
    return figure


def _panels(panels: Panels, draw: Callable) -> Figure:
    """One panel per regime, with all arms."""
    figure = Figure(figsize=(6.2 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (regime, by_arm) in zip(axes, panels.items()):
        axis.axhline(0, color=colour("upstream", 0), lw=1)
        for place, (arm, tasks) in enumerate(by_arm.items()):
            shade = colour(arm, place)
            draw(axis, tasks, place, len(by_arm), shade)
            axis.plot([], [], "o-", color=shade, label=arm, ms=4)
        axis.set_title(regime, fontsize=10)
        axis.set_ylabel(GAIN)
        axis.tick_params(labelleft=True)
        if by_arm:
            axis.legend(fontsize=9)
    return figure


# Field of a point for the horizontal axis -> figure.
DRAWN = {"noise": gain_against_noise, "val": gain_against_validation}
