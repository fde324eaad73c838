"""docs/design.md: its rule and its method run, one inside the other, from outside the package."""

import pathlib
import re
import types

import jax
import numpy as np
import optax
import pytest

from saflex_jax import Batch, RunInfo, Streams, configure
from saflex_jax.methods import METHODS
from saflex_jax.models import MLP, from_linen
from saflex_jax.rules import RULES

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "design.md").read_text()
CLASSES, ROWS = 3, 24


def module(heading):
    """The Python file below a heading of the page."""
    _, _, rest = PAGE.partition(f"## {heading}\n")
    found = types.ModuleType(heading)
    exec(re.search(r"```python\n(.*?)```", rest, re.DOTALL)[1], vars(found))
    return found


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(RULES, "soft", module("Add a rule").SPEC)
    monkeypatch.setitem(METHODS, "sam", module("Add a method").SPEC)


def streams():
    rng = np.random.default_rng(0)

    def batch(size):
        labels = rng.integers(CLASSES, size=size)
        inputs = np.eye(CLASSES, 6, dtype=np.float32)[labels] + rng.normal(size=(size, 6)) / 4
        labels = np.eye(CLASSES, dtype=np.float32)[labels]
        return Batch(
            inputs.astype(np.float32), labels, np.ones(size, bool), np.arange(size, dtype=np.int32)
        )

    candidates, val = batch(ROWS), batch(9)
    wrong = np.where(
        np.arange(ROWS)[:, None] < 8, np.roll(candidates.labels, 1, 1), candidates.labels
    )
    return Streams(candidates._replace(labels=wrong), val)


def test_a_rule_and_a_method_of_ones_own_run_by_a_config(added):
    section = {"name": "sam", "rule": "soft", "loss": "cross_entropy"}
    configure.check(section)
    assert configure.all_options()["soft"]["rule"] == {"tau": 1.0}
    run = RunInfo(ROWS, CLASSES)
    model = from_linen(configure.make_network(section, MLP((8,)), CLASSES))
    method = configure.make_method(
        section | {"soft": {"rule": {"tau": 0.5}}, "sam": {"rho": 0.1}}, model, optax.sgd(0.5), run
    )
    data = streams()
    state = method.init(jax.random.key(0), data.candidates.inputs)
    step = jax.jit(method.step)
    losses = []
    for _ in range(30):
        state, metrics = step(state, data)
        losses.append(float(metrics["val_loss"][0]))
    assert losses[-1] < 0.7 * losses[0]
    weights = method.targets(state, data).weights
    assert weights[:8].mean() < 0.8 < 1.1 < weights[8:].mean()  # the first third is wrong
    assert weights.mean() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"soft": {"rule": {"tauu": 1.0}}}, "did you mean 'tau'"),
        ({"soft": {"rule": {"tau": 0.0}}}, "tau must be positive and finite; given 0.0"),
        ({"sam": {"rho": -1.0}}, "rho must be positive and finite; given -1.0"),
        ({"loss": "ldam"}, "loss must be 'cross_entropy' with sam; given 'ldam'"),
        ({"rule": "sof"}, "did you mean 'soft'"),
    ],
)
def test_their_options_are_checked_like_all_others(added, change, message):
    with pytest.raises(ValueError, match=message):
        configure.check({"name": "sam", "rule": "soft", "loss": "cross_entropy"} | change)
