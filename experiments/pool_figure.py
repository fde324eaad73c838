"""A few sources of a pool, and what each prompt made of them: one picture to look at.

python -m experiments.pool_figure --out=runs/pool --figure=docs/generation_pool.png
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import sys
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import generating, pool_files, style
from saflex_jax.data.images import image_rows
from saflex_jax.data.provenance import METADATA, read_lines

ROWS, COLUMNS = 6, 7


@style.look()
def draw(folder: pathlib.Path) -> Figure:
    """The first sources of different classes, a column for each prompt; flagged ones are framed.

    Args:
      folder: of a pool that was run.
    """
    about, rows = pool_files.read_plan(folder)
    records = read_lines(folder / METADATA)
    prompts = sorted({r["prompt"] for r in records})[:COLUMNS]
    by_source = collections.defaultdict(dict)
    for record in records:
        by_source[record["source"]].setdefault(record["prompt"], record)
    # One of each class, those first that have most prompts.
    order = sorted(by_source, key=lambda s: -len(by_source[s]))
    classes = {next(iter(by_source[s].values()))["label"]: s for s in reversed(order)}
    sources = [classes[label] for label in sorted(classes)][:ROWS]
    originals = generating.originals(about, rows)
    cell = style.WIDTH / (1.5 + len(prompts))
    figure = style.figure(
        0.6 + (cell + 0.2) * len(sources),
        "What does each prompt make of a source? Framed: flagged by a filter",
    )
    axes = figure.subplots(len(sources), 1 + len(prompts), squeeze=False)
    for line, source in zip(axes, sources):
        _show(line[0], originals.read(source))
        label = next(iter(by_source[source].values()))["label"]
        line[0].set_ylabel(about["class_names"][label])
        for axis, prompt in zip(line[1:], prompts):
            record = by_source[source].get(prompt)
            if record is None:
                axis.set_axis_off()
                continue
            channels = about["shape"][-1]
            _show(axis, image_rows([folder / record["file_name"]], channels=channels)[0])
            axis.set_xlabel(f"strength {record['strength']:g}")
            if record["flags"]:
                axis.spines[:].set(visible=True, color=style.WRONG, linewidth=3)
    for axis, title in zip(axes[0], ["source", *prompts]):
        text = "\n".join(textwrap.wrap(title, 16)[:3]).replace("$", r"\$")
        axis.set_title(text, fontsize=style.SMALL, weight="normal", loc="center")
    return figure


def _show(axis, image: np.ndarray) -> None:
    axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/pool"))
    parser.add_argument("--figure", type=pathlib.Path, default=pathlib.Path("runs/pool.png"))
    given = parser.parse_args(arguments)
    try:
        style.save(draw(given.out), given.figure)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(given.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
