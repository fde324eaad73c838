"""One look for every figure: the sizes, the colours and what they mean, the card they lie on.

A figure is one opaque card the colour of paper: one file that a light page, a dark page, a viewer
and a printer show alike, and photographs and digits lie on paper anyway.

    @style.look()
    def draw(...):
        figure = style.figure(3.0, "What the reader should ask or know")
        ...
    style.save(draw(...), path)
"""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import optimize

WIDTH, DPI = 8.6, 160  # inches: 830 pixels of a page, where a point of text is a point
SMALL, TEXT, TITLE = 8, 9, 11  # points; nothing is smaller
LETTERS = 90  # of a title on one line

PAPER, INK, MUTED, LINE = "#F8F6F1", "#222222", "#6B6B6B", "#D9D5CB"
OURS, HELD_OUT, TRUSTED, ALL, OTHER = "#0063A0", "#3F97D6", "#A83279", "#3A3A3A", "#8A8A8A"
WRITTEN = {HELD_OUT: "#2577B4", OTHER: MUTED}  # darker where it is the colour of text
RIGHT, WRONG = "#007F5C", "#C24E00"  # of a label
PRINTED = LinearSegmentedColormap.from_list("printed", [PAPER, "#000000"])  # grey images, inked
COLOURS = {"upstream": OTHER, "upstream_train_val": ALL, "trusted_only": TRUSTED,
           "saflex": HELD_OUT, "saflex_train_val": OURS}  # fmt: skip
NAMES = {
    "upstream": "augmentation alone",
    "upstream_train_val": "trusted samples\nalso train",
    "trusted_only": "trusted samples\nalone",
    "saflex": "SAFLEX, trusted\nheld out",
    "saflex_train_val": "SAFLEX, trusted\nalso train",
}

LOOK = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.prop_cycle": cycler(color=[OURS, OTHER, TRUSTED, HELD_OUT, ALL]),
    "axes.edgecolor": OTHER, "grid.color": LINE, "axes.axisbelow": True,
    "font.size": TEXT, "axes.labelsize": SMALL, "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "legend.frameon": False,
    "axes.titlesize": TEXT, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "figure.titlesize": TITLE, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def look():
    """A context, or a decorator, within which everything is drawn in this look."""
    return matplotlib.rc_context(LOOK)


def figure(height: float, title: str) -> Figure:
    """An empty card of the common width, with its title at the left.

    Args:
      height: in inches; each line of the title after the first adds to it.
      title: a question or a finding; wrapped where it is too long.
    """
    lines = textwrap.wrap(title, LETTERS)
    size = WIDTH, height + (len(lines) - 1) * 1.2 * TITLE / 72
    made = Figure(figsize=size, layout="constrained")
    made.suptitle("\n".join(lines), x=0.012, ha="left", parse_math=False)
    return made


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes the card, with its margin."""
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.savefig(path, dpi=DPI)


def colour(arm: str) -> str:
    """The arm's colour; an arm without one of its own is one of the others."""
    return COLOURS.get(arm, OTHER)


def name(arm: str) -> str:
    """The arm in words, on one line or two."""
    return NAMES.get(arm, arm.replace("_", " "))


def ends(
    axis, labels: Sequence[tuple[float, str, str]], *, points=None, least: float = 0.08
) -> None:
    """Names lines, or dots, at the right end of the axis: (height, text, colour) of each.

    Labels are moved as little as they need to be `least` apart, a share of the axis's height: the
    nearest heights h with h[i + 1] >= h[i] + least are the isotonic fit of h[i] - i * least, cut at
    the axis's ends.

    Args:
      axis: with its final limits.
      labels: of what is named.
      points: where the dots are, from left to right; a thin line joins each with its name.
      least: share of the height.
    """
    order = sorted(range(len(labels)), key=lambda n: labels[n][0])
    labels = [labels[n] for n in order]
    low, high = axis.get_ylim()
    steps = least * np.arange(len(labels))
    heights = (np.array([label[0] for label in labels]) - low) / (high - low)
    if labels:
        fit = optimize.isotonic_regression(heights - steps).x
        heights = np.clip(fit, 0, max(0, 1 - steps[-1])) + steps
    right = axis.get_xlim()[1]
    for n, height, (place, text, shade) in zip(order, heights, labels):
        if points is not None:
            axis.plot([points[n], right], [place, low + height * (high - low)], color=shade,
                      lw=0.5, alpha=0.6, scalex=False, scaley=False)  # fmt: skip
        axis.text(1.015, height, text, color=WRITTEN.get(shade, shade), va="center",
                  fontsize=SMALL, weight="bold", transform=axis.transAxes)  # fmt: skip


def key(figure: Figure, marks: Mapping[str, dict]) -> None:
    """What marks mean, below the figure, where lines cannot be named: text -> options of `plot`."""
    handles = [Line2D([], [], **options) for options in marks.values()]
    figure.legend(handles, list(marks), loc="outside lower left", ncols=len(marks),
                  handlelength=1.6, columnspacing=2.0, handletextpad=0.5)  # fmt: skip
