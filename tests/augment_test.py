from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate, ndimage, stats

from saflex_jax import Batch, Method, Streams
from saflex_jax.augment import affine, chain, feature_noise, mixup, shift, upstream
from saflex_jax.methods import erm, saflex
from saflex_jax.models import from_function

KEY = jax.random.key(7)
PER_EXAMPLE = {
    "shift": shift(2),
    "affine": affine(degrees=30.0, scale=0.2, shear=0.1),
    "feature_noise": feature_noise(0.5),
    "chain": chain(shift(1), affine(degrees=10.0), feature_noise(0.1)),
}
ALL = {**PER_EXAMPLE, "mixup": mixup(1.0)}
JITTED = {name: jax.jit(augment) for name, augment in ALL.items()}
SIZE = 256  # of most batches: the sampler of beta variates alone compiles for seconds


def images(size, seed=0, pixels=6, channels=2, classes=3):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(size, pixels, pixels, channels)).astype(np.float32)
    labels = np.eye(classes, dtype=np.float32)[rng.integers(classes, size=size)]
    index = rng.permutation(10 * size)[:size].astype(np.int32)
    return jax.tree.map(jnp.asarray, Batch(inputs, labels, np.ones(size, bool), index))


def coded(size):
    """Row i is the unit vector i, in inputs and in labels: a mixture shows its parts."""
    unit = jnp.eye(size)
    return Batch(
        {"table": unit, "image": unit[:, None, :, None]}, unit, unit[0] >= 0, jnp.arange(size)
    )


@pytest.mark.parametrize("name", ALL)
def test_a_key_decides_everything(name):
    batch = images(SIZE)
    eager, jitted, again = (f(KEY, batch) for f in (ALL[name], JITTED[name], JITTED[name]))
    other = JITTED[name](jax.random.key(8), batch)
    np.testing.assert_array_equal(jitted.inputs, again.inputs)
    np.testing.assert_allclose(eager.inputs, jitted.inputs, atol=1e-5)
    np.testing.assert_allclose(eager.labels, jitted.labels, atol=1e-6)
    assert float(jnp.abs(eager.inputs - other.inputs).max()) > 1e-2
    assert eager.inputs.dtype == batch.inputs.dtype
    np.testing.assert_array_equal(eager.index, batch.index)
    np.testing.assert_array_equal(eager.mask, batch.mask)


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_a_sample_depends_on_its_index_and_not_on_its_place(name):
    augment, batch = JITTED[name], images(SIZE)
    whole = augment(KEY, batch)
    np.testing.assert_array_equal(whole.labels, batch.labels)
    rows = np.random.default_rng(1).integers(SIZE, size=SIZE)  # other places, other neighbours
    part = augment(KEY, jax.tree.map(lambda x: x[rows], batch))
    np.testing.assert_allclose(part.inputs, whole.inputs[rows], atol=1e-6)
    moved = augment(KEY, batch._replace(index=batch.index + 1))
    same = (moved.inputs == whole.inputs).all((1, 2, 3))
    assert float(same.mean()) < 0.1  # a shift by 2 has 25 outcomes


# --- images


def test_shift_is_a_crop_of_the_zero_padded_image_at_a_uniform_place():
    batch = images(450, pixels=4)
    found = np.asarray(jax.jit(shift(1))(KEY, batch).inputs)
    padded = np.pad(batch.inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    hits = np.zeros((3, 3))
    for image, around in zip(found, padded):
        here = [
            (r, c)
            for r in range(3)
            for c in range(3)
            if np.array_equal(image, around[r : r + 4, c : c + 4])
        ]
        assert len(here) == 1
        hits[here[0]] += 1
    assert stats.chisquare(hits.ravel()).pvalue > 1e-4


@pytest.mark.parametrize(
    "augment", [shift(0), affine(), feature_noise(0.0), mixup(1.0, probability=0.0)]
)
def test_parameters_of_zero_are_the_identity(augment):
    batch = images(SIZE)
    found = augment(KEY, batch)
    np.testing.assert_allclose(found.inputs, batch.inputs, atol=1e-6)
    np.testing.assert_array_equal(found.labels, batch.labels)


@pytest.mark.parametrize(
    ("degrees", "scale", "shear"),
    [(180.0, 0, 0), (40.0, 0.3, 0.2)],
)
def test_affine_is_the_documented_map(degrees, scale, shear):
    size, pixels = 60, 9
    augment = jax.jit(affine(degrees=degrees, scale=scale, shear=shear))
    centre = (pixels - 1) / 2
    offsets = np.stack(np.meshgrid(*2 * [np.arange(pixels) - centre], indexing="ij"), -1)
    # Channels: the coordinates, which bilinear interpolation reproduces, and one to see the inside.
    ruler = np.concatenate([offsets, np.ones((pixels, pixels, 1))], -1).astype(np.float32)
    batch = images(size, pixels=pixels)
    measured = augment(KEY, batch._replace(inputs=jnp.tile(ruler, (size, 1, 1, 1)))).inputs
    found = augment(KEY, batch).inputs
    drawn = []
    for i, image in enumerate(np.asarray(measured, np.float64)):
        inside = image[..., 2] > 1 - 1e-5
        matrix = np.linalg.lstsq(offsets[inside], image[inside][:, :2], rcond=None)[0].T
        shifted = centre - matrix @ (centre, centre)
        for channel in range(2):
            expected = ndimage.affine_transform(
                np.float64(batch.inputs[i, ..., channel]),
                matrix,
                shifted,
                order=1,
                mode="grid-constant",
            )
            np.testing.assert_allclose(found[i, ..., channel], expected, atol=1e-4)
        angle = np.arctan2(matrix[1, 0], matrix[0, 0])
        cos, sin = np.cos(angle), np.sin(angle)
        upper = np.array([[cos, sin], [-sin, cos]]) @ matrix
        np.testing.assert_allclose([upper[1, 0], upper[1, 1] - upper[0, 0]], 0, atol=1e-4)
        drawn.append([np.rad2deg(angle), upper[0, 0] - 1, upper[0, 1]])
    for values, bound in zip(np.array(drawn).T, (degrees, scale, shear)):
        assert np.abs(values).max() <= bound + 1e-3
        if bound:  # uniform on [-bound, bound], and independent of one another
            assert stats.kstest(values / bound, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    if degrees and scale and shear:
        correlation = np.corrcoef(np.array(drawn).T)
        assert np.abs(correlation - np.eye(3)).max() < 0.45  # 3.5 standard deviations


# --- mixing


def test_mixup_mixes_labels_as_inputs_and_keeps_the_larger_share():
    size, alpha = SIZE, 0.7
    found = mixup(alpha)(KEY, coded(size))
    shares = np.asarray(found.labels, np.float64)
    np.testing.assert_array_equal(found.inputs["table"], found.labels)
    np.testing.assert_array_equal(found.inputs["image"][:, 0, :, 0], found.labels)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    assert (shares >= 0).all()
    own = np.diag(shares)
    assert (own >= 0.5).all()
    partners = (shares - np.diag(own)) > 0
    assert (partners.sum(1) <= 1).all()
    assert (partners.sum(0) <= 1).all()  # everybody is a partner once
    assert partners.sum() > 0.95 * size
    # own ~ max(l, 1 - l) with l ~ Beta(alpha, alpha): its density is that of l, doubled.
    density = stats.beta(alpha, alpha).pdf
    mean = integrate.quad(lambda l: 2 * l * density(l), 0.5, 1)[0]
    mixed = own[partners.any(1)]
    np.testing.assert_allclose(mixed.mean(), mean, atol=4 * mixed.std() / len(mixed) ** 0.5)


def test_mixup_never_mixes_padding_in():
    batch, real = coded(SIZE), SIZE - 100
    mask = jnp.arange(SIZE) < real
    shares = np.asarray(mixup(1.0)(KEY, batch._replace(mask=mask)).labels)[:real]
    assert (shares[:, real:] == 0).all()
    assert (np.diag(shares) < 1).any()


def test_mixup_mixes_its_share_of_the_samples():
    shares = np.concatenate(
        [
            np.diag(mixup(1.0, probability=0.3)(jax.random.key(s), coded(SIZE)).labels)
            for s in range(4)
        ]
    )
    assert stats.binomtest(int((shares < 1).sum()), shares.size, 0.3).pvalue > 1e-4


# --- tables, composition


def test_feature_noise_has_its_variance_and_chained_noise_is_independent():
    rows, columns, deviation = 400, 50, 0.3
    table = jnp.tile(jnp.arange(columns, dtype=jnp.float32), (rows, 1))
    batch = Batch(table, jnp.ones((rows, 1)), jnp.ones(rows, bool), jnp.arange(rows))
    for augment, variance in [
        (feature_noise(deviation), deviation**2),
        (chain(feature_noise(deviation), feature_noise(deviation)), 2 * deviation**2),
    ]:
        noise = np.asarray(augment(KEY, batch).inputs - table, np.float64).ravel()
        assert abs(noise.mean()) < 4 * (variance / noise.size) ** 0.5
        assert abs(noise.var() / variance - 1) < 4 * (2 / noise.size) ** 0.5
        assert stats.kstest(noise / variance**0.5, "norm").pvalue > 1e-4


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (partial(shift, -1), "pixels"),
        (partial(affine, degrees=-1.0), "degrees"),
        (partial(affine, shear=-0.1), "shear"),
        (partial(affine, scale=1.0), "scale"),
        (partial(affine, scale=-0.1), "scale"),
        (partial(mixup, 0.0), "alpha"),
        (partial(mixup, float("inf")), "alpha"),
        (partial(mixup, 1.0, probability=1.5), "probability"),
        (partial(mixup, 1.0, probability=float("nan")), "probability"),
        (partial(feature_noise, -0.5), "deviation"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=f"^{name} must "):
        make()


def test_upstream_augments_the_candidates_and_nothing_else():
    seen = []

    def look(state, streams, **kwargs):
        seen.append(streams)
        return state, {}

    model = from_function(lambda key, x: jnp.zeros((72, 3)), lambda p, x: x.reshape(len(x), -1) @ p)
    tx = optax.sgd(0.1)
    plain = erm.make(model, tx)
    augment = chain(shift(1), feature_noise(0.3))
    spy = upstream(Method(plain.init, look, plain.predict, look), augment)
    streams = Streams(images(8), images(8, seed=1), images(8, seed=2))
    state = plain.init(KEY, streams.candidates.inputs)
    later = state._replace(step=state.step + 1)
    spy.step(state, streams, reduce=lambda x: x)
    spy.targets(state, streams)
    spy.step(later, streams, reduce=lambda x: x)
    for s in seen:
        assert s.val is streams.val and s.clean is streams.clean
        assert float(jnp.abs(s.candidates.inputs - streams.candidates.inputs).max()) > 0.1
    stepped, looked, next_step = (s.candidates.inputs for s in seen)
    np.testing.assert_array_equal(
        stepped, looked
    )  # what `targets` shows is what the step trains on
    assert float(jnp.abs(stepped - next_step).max()) > 0.1  # drawn anew in every step
    # Around a real method it is that method on the augmented candidates.
    method = saflex.make(model, tx, direction="identity", predicate=None)
    step = jax.jit(partial(method.step, reduce=lambda x: x))
    whole, _ = jax.jit(partial(upstream(method, augment).step, reduce=lambda x: x))(state, streams)
    parts, without = step(state, seen[0])[0], step(state, streams)[0]
    np.testing.assert_allclose(whole.params, parts.params, atol=1e-6)
    assert float(jnp.abs(whole.params - without.params).max()) > 1e-3
    assert upstream(plain._replace(targets=None), augment).targets is None
