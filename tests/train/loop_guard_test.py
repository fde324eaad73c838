"""Nothing is compiled twice, or moved between host and devices, while a method trains."""

import jax
import numpy as np
import optax
import pytest

from saflex_jax import configure, parallel, train
from saflex_jax.data import ArrayStream, IndexStream, sizes
from saflex_jax.methods import METHODS
from saflex_jax.models import MLP, SmallCNN, from_linen
from saflex_jax.rules import RULES
from saflex_jax.types import Batch, RunInfo, Streams

SAMPLES, VAL, CLASSES, STEPS = 32, 16, 3, 24  # an epoch is four steps
_rng = np.random.default_rng(0)


def pool(size, *shape):
    return Batch(
        _rng.normal(size=(size, *shape)).astype(np.float32),
        np.eye(CLASSES, dtype=np.float32)[_rng.integers(CLASSES, size=size)],
        np.ones(size, bool),
        np.arange(size, dtype=np.int32),
    )


TABLES, IMAGES = (Streams(pool(SAMPLES, *s), pool(VAL, *s)) for s in ((5,), (6, 6, 1)))
METHOD_OPTIONS = {  # quick to compile
    "protonet": {"ways": 2, "queries": 1},
    "madaug": {"layers": 1},
    "fixmatch": {"strong": "shift(1)"},
    "invariance": {"augment": "flip"},
    "dividemix": {"warmup": 2.0},
}
# What starts late, is done in turn or keeps arrays of another type.
BRANCHES = {
    "saflex": {
        "scoring": {"val_every": 2, "val_decay": 0.5},
        "rule": {"memory": {"dtype": "bfloat16"}},
        "schedule": {"start": 5, "every": 3},
    },
    "saflex_paper": {"rule": {"memory": {"decay": 0.9}}},
}
CASES = [
    *(pytest.param(name, "as_given", {}, id=name) for name in METHODS),
    *(pytest.param("supervised", rule, {}, id=rule) for rule in RULES if rule != "as_given"),
    *(pytest.param("supervised", rule, o, id=f"{rule}-branches") for rule, o in BRANCHES.items()),
]


@pytest.fixture
def compilations():
    """Names of what JAX compiles, as it does."""
    names = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("name, rule, options", CASES)
def test_a_run_compiles_once_and_moves_nothing_implicitly(name, rule, options, compilations):
    pools, backbone, devices = TABLES, MLP((8,)), jax.devices()
    if name != "supervised":  # which work on images, and are dearer
        pools, devices = IMAGES, devices[:1]
    if name in ("automix", "adautomix"):  # which need feature maps
        backbone = SmallCNN((3, 4))
    if "clean" in METHODS[name].needs:
        pools = pools._replace(clean=pools.val)
    labels = pools.candidates.labels
    run = RunInfo(
        SAMPLES, CLASSES, 0, VAL, STEPS, SAMPLES / 8, labels.sum(0), labels=lambda: labels,
        captions=np.ones((CLASSES, 1, 2), np.float32),
    )  # fmt: skip
    section = {"name": name, "rule": rule, "loss": "cross_entropy", rule: options}
    section[name] = METHOD_OPTIONS.get(name, {})
    model = from_linen(configure.make_network(section, backbone, CLASSES))
    method = configure.make_method(section, model, optax.adam(1e-2), run)
    runner = parallel.jit_runner(method.step, devices=devices)
    state = jax.jit(method.init)(jax.random.key(0), pools.candidates.inputs[:1])
    batches = dict(batch_size=8, val_batch_size=8, seed=0)
    if options:  # batches from the host; otherwise the devices hold the data
        stream = ArrayStream(pools, **batches)
    else:
        runner, stream = runner.hold(pools), IndexStream(sizes(pools), **batches)

    compiled = []  # names, after each step

    def step(state, streams, step=runner.step):
        after = step(state, streams)
        compiled.append(tuple(compilations))
        return after

    with jax.transfer_guard("disallow"):
        state = train.fit(
            runner._replace(step=step), state, stream, num_steps=STEPS, log_every=8, progress=False
        ).state
    assert state.step == STEPS == len(compiled)
    assert compiled[0].count("jit(run)") == 1
    assert compiled[-1] == compiled[0]
