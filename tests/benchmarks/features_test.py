"""The benchmark of features: the same network in both libraries, and the report's numbers."""

import json
import sys
from functools import partial

import jax
import numpy as np
import pytest

from benchmarks import features
from saflex_jax import models

TINY = features.BACKBONE.clone(blocks=(1, 1), width=8)


def test_the_state_is_the_networks():
    state = features.random_state(TINY)
    variables = models.from_torchvision(state, TINY)
    shapes = jax.eval_shape(
        partial(TINY.init, train=False), jax.random.key(0), np.zeros((1, 32, 32, 3))
    )
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, dict(shapes))
    assert state["layer2.0.downsample.0.weight"].shape == (16, 8, 1, 1)


@pytest.mark.parametrize("torch", [None, "installed"])
def test_the_report_has_every_number_or_the_reason_why_not(monkeypatch, capsys, torch):
    if torch is None:
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        pytest.importorskip("torch")
    monkeypatch.setattr(features, "BACKBONE", TINY)
    monkeypatch.setattr(features, "BATCH", 8)
    monkeypatch.setattr(features, "SECONDS", 0.0)
    assert features.main(["--json", "--rounds", "1", "--size", "40"]) == 0
    made = json.loads(capsys.readouterr().out)
    peers = {"torch", "torch_channels_last"}
    assert set(made["why_null"]) == (peers if torch is None else set())
    for name, rate in made["images_per_second"].items():
        for number in (rate, made["processor_ms_per_image"][name]):
            assert (number is None) == (name in made["why_null"]) and (number is None or number > 0)
    assert made["time_over_commands"]["command"]["ratio"] == 1
