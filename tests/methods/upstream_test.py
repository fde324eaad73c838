"""A pipeline in front of a method: what the method sees, and what can be looked at."""

from functools import partial

import jax
import numpy as np
import optax
from scipy import special

from saflex_jax import RunInfo
from saflex_jax.augment import chain, identity, per_example, shift, views
from saflex_jax.methods import supervised
from saflex_jax.methods.upstream import drawn, upstream
from saflex_jax.models import from_function
from saflex_jax.rules.refinement import Refinement
from saflex_jax.rules.scoring import Scoring
from saflex_jax.rules.simplex import Simplex
from saflex_jax.rules.visits import VisitMean
from saflex_jax.types import Batch, Method, Streams

KEY = jax.random.key(3)
TX = optax.sgd(0.1)
LINEAR = from_function(
    lambda key, x: 0.1 * jax.random.normal(key, (6 * 8 * 2, 3)),
    lambda p, x: x.reshape(len(x), -1) @ p,
)
equal = np.testing.assert_array_equal


def images(size, seed=0):
    """Rows whose indices are not their places, one of four masked."""
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(size=(size, 6, 8, 2)).astype(np.float32)
    labels = np.eye(3, dtype=np.float32)[rng.integers(3, size=size)]
    index = rng.permutation(10 * size)[:size].astype(np.int32)
    return Batch(inputs, labels, np.arange(size) % 4 > 0, index)


def add_noise(key, x):
    return x + jax.random.uniform(key, x.shape), 1.0


def test_upstream_augments_the_candidates_and_nothing_else():
    augment = chain(shift(1), per_example("feature_noise", add_noise))
    plain = supervised.make(LINEAR, TX)
    spy = Method(  # whose state is what it was given
        plain.init,
        lambda state, streams, *, reduce: (streams, {"reduce": reduce(1)}),
        plain.predict,
        lambda state, streams: streams,
    )
    method = upstream(spy, augment)
    assert method.init is spy.init and method.predict is spy.predict

    @jax.jit
    def run(state, streams):
        given, metrics = method.step(state, streams, reduce=lambda x: 2 * x)
        looked_at = drawn(augment, state, streams.candidates)
        return given, metrics, method.targets(state, streams), looked_at

    streams = Streams(images(8), images(8, seed=1), images(8, seed=2))
    state = plain.init(KEY, streams.candidates.inputs)
    later, elsewhere = state._replace(step=state.step + 1), state._replace(key=jax.random.key(4))
    seen = []
    for at in (state, later, elsewhere):
        given, metrics, targets, looked_at = jax.device_get(run(at, streams))
        assert metrics == {"reduce": 2}
        jax.tree.map(equal, given[1:], streams[1:])
        assert np.abs(given.candidates.inputs - streams.candidates.inputs).max() > 0.1
        # What `targets` and `drawn` show is what the step trains on.
        jax.tree.map(equal, targets, given)
        jax.tree.map(equal, looked_at, given.candidates)
        # Anew in every step and run.
        assert all(np.abs(given.candidates.inputs - inputs).max() > 0.1 for inputs in seen)
        seen.append(given.candidates.inputs)
    assert upstream(spy._replace(targets=None), augment).targets is None


def test_saflex_remembers_a_sample_by_all_its_views():
    size, samples = 6, 60
    augment = views(identity, shift(2))
    run = RunInfo(num_samples=samples, num_classes=3)
    rule = Refinement(
        Scoring("identity", predicate=""), Simplex(run=run, memory=VisitMean(decay=0.9))
    )
    method = upstream(supervised.make(LINEAR, TX, rule), augment)
    streams = Streams(images(size), images(8, seed=1))
    state = method.init(KEY, streams.candidates.inputs)
    augmented = jax.device_get(jax.jit(partial(drawn, augment))(state, streams.candidates))
    after, metrics = jax.device_get(jax.jit(method.step)(state, streams))
    assert metrics["kept"][1] == 2 * streams.candidates.mask.sum()
    memory = after.extra.rule
    seen = streams.candidates.index[streams.candidates.mask]
    visits = np.zeros(samples)
    visits[seen] = 1
    equal(memory.visits[:samples], visits)

    # S_ik = <g, x_i (p_i - e_k)'> of a linear model, then the mean of the two rows, by hand.
    def flat(x):
        return np.asarray(x, np.float64).reshape(len(x), -1)

    params = np.asarray(state.params, np.float64)
    x, x_val = flat(augmented.inputs), flat(streams.val.inputs)
    residual = special.softmax(x_val @ params, 1) - streams.val.labels
    mask = streams.val.mask
    along = x @ (x_val[mask].T @ residual[mask] / mask.sum())
    scores = (special.softmax(x @ params, 1) * along).sum(1, keepdims=True) - along
    own, shifted = scores[0::2], scores[1::2]
    assert np.abs(own - shifted).max() > 0.1 * np.abs(own).max()
    expected = ((own + shifted) / 2)[streams.candidates.mask]
    remembered = np.asarray(memory.mean[:samples], np.float64)[seen]
    scale = (remembered * expected).sum() / (expected**2).sum()  # the memory holds its own units
    assert scale > 0
    np.testing.assert_allclose(remembered, scale * expected, atol=1e-4 * np.abs(remembered).max())
