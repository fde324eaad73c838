"""Laws of the figures: colours are told apart, names stand apart, text is large enough."""

import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from benchmarks import fidelity, peers, step_cost
from experiments import figures, report_figures, style

ROOT = pathlib.Path(__file__).parents[2]
SEEN = {  # linear RGB, as it is and as the colour-blind see it: Machado et al. 2009, severity 1
    "all": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
}  # fmt: skip
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
MEANINGS = (*style.COLOURS.values(), style.RIGHT, style.WRONG)


def linear(colour):
    """Linear RGB of "#rrggbb"."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB, white D65."""
    x = XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(1)
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
    """As the web's accessibility guidelines define it."""
    light = sorted(XYZ[1] @ linear(c) + 0.05 for c in (one, other))
    return light[1] / light[0]


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_with_a_meaning_are_told_apart(eyes):
    seen = [lab(SEEN[eyes] @ linear(c)) for c in MEANINGS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 14
    right, wrong = seen[-2:]
    assert np.linalg.norm(right - wrong) > 30


def test_colours_stand_out_from_the_card_and_text_can_be_read():
    assert min(contrast(c, style.PAPER) for c in MEANINGS) > 2.9
    written = [style.WRITTEN.get(c, c) for c in (*MEANINGS, style.INK, style.MUTED)]
    assert min(contrast(c, style.PAPER) for c in written) > 4.3


def test_names_at_the_ends_of_lines_stand_apart():
    axis = Figure().subplots()
    axis.set_ylim(0, 10)
    values = {"c": 5.1, "a": 5.0, "low": 1.0, "b": 5.05, "top": 11.0}
    style.ends(axis, [(y, name, "black") for name, y in values.items()], least=0.1)
    places = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert list(places) == sorted(values, key=values.get)
    assert np.diff(list(places.values())).min() > 0.1 - 1e-9
    assert places["low"] == pytest.approx(0.1) and places["top"] == pytest.approx(1.0)
    assert (places["a"] + places["c"]) / 2 == places["b"] == pytest.approx(0.505)


def drawn():
    """Figures as commands draw them; those of benchmarks from the committed reports."""
    point = {"task": "t", "partner": "p", "half": "report", "noise": 0.4, "val": 50, "mean": 1.0,
             "low": 0.0, "high": 2.0, "family": "f"}  # fmt: skip
    yield report_figures.gain_by_task({"pretrained": [point]})
    for draw in report_figures.DRAWN.values():
        yield draw({"scratch": {"saflex": [point, point | {"val": 100}]}})
    course = {"noise": 0.4, "steps": [1, 2], "noise_rate": np.ones((1, 2)),
              "relabelled": np.ones((1, 2))}  # fmt: skip
    yield report_figures.course({"t": course})
    sample = {"input": np.zeros((2, 2, 1)), "clean": 1, "wrong": True, "prior": 0, "label": 1,
              "confidence": 0.5, "weight": 1.0}  # fmt: skip
    history = [{"step": 1, "eval/weight_right": 1.0, "eval/weight_wrong": 0.5}]
    record = {"seed": 0, "test_accuracy": 0.5, "samples": [sample], "history": history}
    difference = {"upstream": None, "saflex": {"mean": 0.1, "low": 0.0, "high": 0.2}}
    runs = {"upstream": [record], "saflex": [record]}
    yield figures.compare(runs, title="a task of a long name " * 5, differences=difference)


def test_no_text_is_too_small_and_all_figures_have_one_width(monkeypatch):
    found = list(drawn())
    monkeypatch.setattr(style, "save", lambda figure, path: found.append(figure))
    for benchmark in (fidelity.Fidelity, peers.Peers, step_cost.StepCost):
        name = benchmark.__module__.rpartition(".")[2]
        report = json.loads((ROOT / "docs" / f"{name}.json").read_text())
        benchmark.draw(report, pathlib.Path("x.png"))
    assert len(found) == 9
    for figure in found:
        assert figure.get_figwidth() == style.WIDTH
        texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
        assert min(t.get_fontsize() for t in texts) >= style.SMALL


def test_every_figure_of_the_documentation_is_shown_and_has_the_common_width():
    folder = ROOT / "docs"
    there = {path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg")}
    pages = [ROOT / "README.md", *folder.rglob("*.md")]
    named = set()
    for page in pages:
        for link in re.findall(r"[\w./-]+\.(?:png|jpg)\b", page.read_text()):
            target = page.parent / link
            if target.parent.resolve() == folder:
                named.add(target.name)
    assert there <= named, f"shown nowhere: {there - named}"
    for name in there & named:
        if name.endswith(".png"):
            with Image.open(folder / name) as image:
                assert image.width == round(style.WIDTH * style.DPI), name
