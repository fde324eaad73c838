"""Nothing is compiled twice or moved behind one's back while a method trains in the loop."""

import jax
import numpy as np
import optax
import pytest

from saflex_jax import parallel, train
from saflex_jax.data import ArrayStream, IndexStream, sizes
from saflex_jax.methods import METHODS, NETWORKS
from saflex_jax.models import MLP, Classifier, SmallCNN, from_linen
from saflex_jax.types import Batch, Streams

SAMPLES, CLASSES, STEPS = 64, 3, 200
_rng = np.random.default_rng(0)


def pool(size, *shape):
    return Batch(
        _rng.normal(size=(size, *shape)).astype(np.float32),
        np.eye(CLASSES, dtype=np.float32)[_rng.integers(CLASSES, size=size)],
        np.ones(size, bool),
        np.arange(size, dtype=np.int32),
    )


TABLES, IMAGES = (Streams(pool(SAMPLES, *s), pool(24, *s)) for s in ((5,), (6, 6, 1)))
OF_IMAGES = ("sla", "automix", "fixmatch", "invariance", "madaug", "protonet")
MEMORY = {"memory_decay": 0.9, "num_samples": SAMPLES, "num_classes": CLASSES}
# Every method of the package as it comes, and the branches of saflex.
OPTIONS = {
    "saflex": [
        {},
        {"direction": "identity", "predicate": None, **MEMORY},
        {
            "every": 3,
            "start": 20,
            "val_every": 2,
            "val_decay": 0.5,
            "memory_dtype": "bfloat16",
            **MEMORY,
        },
    ],
    "implicit": [{"prior": TABLES.candidates.labels}],
    "drw": [{"counts": TABLES.candidates.labels.sum(0)}],
    "automix": [{"num_steps": STEPS}],
    "madaug": [{"steps_per_epoch": 4}],
    "protonet": [{"ways": 2, "queries": 3}],
}
# As it comes with the data held on the devices, otherwise with batches from the host.
CASES = [
    pytest.param(name, options, place == 0, id=f"{name}-{place}")
    for name in METHODS
    for place, options in enumerate(OPTIONS.get(name, [{}]))
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
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name, options, held", CASES)
def test_a_run_compiles_once_and_moves_nothing_implicitly(name, options, held, compilations):
    pools, backbone, devices = TABLES, MLP((8,)), jax.devices()
    if name in OF_IMAGES:  # dearer
        pools, backbone, devices = IMAGES, SmallCNN((3, 4)), devices[:1]
    if name == "fixmatch":
        pools = pools._replace(clean=pools.val)
    model = from_linen(NETWORKS.get(name, Classifier)(backbone, CLASSES))
    method = METHODS[name](model, optax.adam(1e-2), **options)
    runner = parallel.jit_runner(method.step, devices=devices)
    state = method.init(jax.random.key(0), pools.candidates.inputs[:1])
    options = dict(batch_size=16, val_batch_size=8, seed=0)
    if held:
        runner, stream = runner.hold(pools), IndexStream(sizes(pools), **options)
    else:
        stream = ArrayStream(pools, **options)

    compiled = []  # names, after each step

    def step(state, streams, step=runner.step):
        after = step(state, streams)
        compiled.append(tuple(compilations))
        return after

    with jax.transfer_guard("disallow"):
        state = train.fit(
            runner._replace(step=step), state, stream, num_steps=STEPS, log_every=50, progress=False
        ).state
    assert state.step == STEPS == len(compiled)
    assert compiled[0].count("jit(run)") == 1
    assert compiled[-1] == compiled[0]
