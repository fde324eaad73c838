"""MADAug: the policy's gradient, the curriculum, what is drawn and what operations do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Model, Streams
from saflex_jax.augment import OPERATIONS
from saflex_jax.core.tree import identity
from saflex_jax.methods import madaug
from saflex_jax.models import MLP, from_linen
from saflex_jax.parallel import RUNNERS, jit_runner
from tests.parallel import setup_
from tests.problems import assert_close, softmax

NAMES = tuple(madaug.SPACE)
N, T, LR = len(NAMES), 3.0, 0.7


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), 1))


# --- the policy's gradient -------------------------------------------------------------------


def reference_mixture(made, h, features, temperature):
    """x~ = sum_k p_k (op_k + m_k - constant m_k), written out."""
    out = features @ h["kernel"] + h["bias"][None]
    m, e = 1 / (1 + jnp.exp(-out[:, :N])), jnp.exp(out[:, N:] / temperature)
    p = e / e.sum(1, keepdims=True)
    ops = made + (m - jax.lax.stop_gradient(m))[:, :, None, None, None]
    return (p[:, :, None, None, None] * ops).sum(1)


def test_the_gradient_is_the_one_through_the_unrolled_step():
    rng = np.random.default_rng(0)
    size, width, classes, shape = 5, 6, 3, (2, 3, 1)
    with jax.enable_x64(True):
        made, inputs, features = (
            jnp.asarray(rng.normal(size=s)) for s in ((size, N, *shape), (4, *shape), (size, width))
        )
        labels, val_labels = (np.eye(classes)[rng.integers(classes, size=n)] for n in (size, 4))
        h = {
            "kernel": jnp.asarray(rng.normal(size=(width, 2 * N))),
            "bias": jnp.asarray(rng.normal(size=2 * N)),
        }
        params = {"in": jnp.asarray(rng.normal(size=(6, 5))), "out": rng.normal(size=(5, classes))}

        def loss(params, images, labels):
            hidden = jnp.tanh(images.reshape(-1, 6) @ params["in"])
            return cross_entropy(hidden @ params["out"], labels)

        def unrolled(h):
            inner = lambda params: loss(params, reference_mixture(made, h, features, T), labels)
            ahead = jax.tree.map(lambda p, g: p - LR * g, params, jax.grad(inner)(params))
            return loss(ahead, inputs, val_labels)

        def ahead(h):
            return madaug.lookahead_gradient(
                lambda params, h: loss(
                    params, madaug.mixture(made, madaug.policy(h, features, T)), labels
                ),
                jax.value_and_grad(lambda params: loss(params, inputs, val_labels)),
                params,
                h,
                learning_rate=LR,
            )

        expected, found = jax.jit(jax.value_and_grad(unrolled))(h), jax.jit(ahead)(h)
    assert np.abs(expected[1]["kernel"][:, :N]).max() > 1e-3  # strengths matter, and so
    assert np.abs(expected[1]["kernel"][:, N:]).max() > 1e-3  # do probabilities
    assert_close(found, expected, 1e-11)


SIZE, VAL, MASKED, CLASSES, WIDTH = 8, 6, 2, 3, 4


def network():
    """Two layers; in training mode its logits are doubled and its features useless."""
    rng = np.random.default_rng(1)
    params = {
        "in": jnp.asarray(rng.normal(size=(12, WIDTH)), jnp.float32),
        "out": jnp.asarray(rng.normal(size=(WIDTH, CLASSES)), jnp.float32),
    }

    def outputs(params, x):
        hidden = jnp.tanh(x.reshape(len(x), -1) @ params["in"])
        return {"class": hidden @ params["out"], "features": hidden}

    def train(params, stats, x, key):
        out = outputs(params, x)
        return {"class": 2 * out["class"], "features": jnp.full_like(out["features"], 7.0)}, stats

    init = lambda key, x: (params, {})
    return Model(init, train, lambda params, stats, x: outputs(params, x))


def batch(rng, size, first=0):
    """Images of 2x2x3, the last two rows padding."""
    mask = np.arange(size) < size - MASKED
    inputs = rng.uniform(size=(size, 2, 2, 3)) + 100.0 * ~mask[:, None, None, None]
    labels = np.eye(CLASSES, dtype=np.float32)[rng.integers(CLASSES, size=size)]
    return Batch(inputs.astype(np.float32), labels, mask, np.arange(first, first + size))


RNG = np.random.default_rng(2)
STREAMS = Streams(batch(RNG, SIZE), batch(RNG, VAL))
SLOPES, OFFSETS = RNG.uniform(-1, 1, (2, N)).astype(np.float32)


@pytest.fixture
def plain_operations(monkeypatch):
    """Operation k is a_k x + b_k + c m_k, and training is on the samples as they are.

    The metric "augmented" says what they would have been drawn by: strength and share.
    """

    def everything(key, batch, strength):
        a, b = (jnp.asarray(c)[None, :, None, None, None] for c in (SLOPES, OFFSETS))
        return a * batch.inputs[:, None] + b + 0.3 * strength[:, :, None, None, None]

    def nothing(key, batch, said, *, share, layers, jitter):
        assert (layers, jitter) == (2, 0.3)
        return batch, said.strength[:, 0] + share

    monkeypatch.setattr(madaug, "all_operations", everything)
    monkeypatch.setattr(madaug, "drawn_operations", nothing)


def start(method, seed=3):
    """The state at step 0, with a policy that says something."""
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)
    rng = np.random.default_rng(seed)
    h = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.extra.policy)
    return state._replace(extra=state.extra._replace(policy=h))


def test_a_search_moves_the_policy_and_a_step_the_network(plain_operations):
    rate, learning_rate = 5.0, 0.2
    method = madaug.make(
        network(), optax.sgd(learning_rate), steps_per_epoch=2, temperature=2.0, search_every=1,
        inner_learning_rate=LR, policy_tx=optax.sgd(rate),
    )  # fmt: skip
    state = start(method)._replace(step=jnp.int32(30))
    new, metrics = jax.jit(functools.partial(method.step, reduce=identity))(state, STREAMS)

    real = lambda b: (b.inputs[b.mask], b.labels[b.mask])
    (x, y), (val_x, val_y) = real(STREAMS.candidates), real(STREAMS.val)
    outputs = lambda params, x: network().logits(params, {}, x)
    features = outputs(state.params, x)["features"]

    out = features @ state.extra.policy["kernel"] + state.extra.policy["bias"][None]
    m = 1 / (1 + np.exp(-np.asarray(out[:, :N])))
    made = SLOPES[None, :, None, None, None] * x[:, None] + 0.3 * m[:, :, None, None, None]
    made = made + OFFSETS[None, :, None, None, None]

    def unrolled(h):
        mixed = reference_mixture(made, h, features, 2.0)
        inner = lambda params: cross_entropy(outputs(params, mixed)["class"], y)
        ahead = jax.tree.map(lambda p, g: p - LR * g, state.params, jax.grad(inner)(state.params))
        return cross_entropy(outputs(ahead, val_x)["class"], val_y)

    val_loss, grads = jax.jit(jax.value_and_grad(unrolled))(state.extra.policy)
    moved = jax.tree.map(lambda new, old: (new - old) / -rate, new.extra.policy, state.extra.policy)
    assert_close(moved, grads, 2e-5)
    np.testing.assert_allclose(np.divide(*metrics["val_loss"]), val_loss, rtol=1e-5)

    # What it draws by is the new policy.
    out = features @ new.extra.policy["kernel"][:, 0] + new.extra.policy["bias"][0]
    drawn_by = np.mean(1 / (1 + np.exp(-out))) + np.tanh(15 / 40) + 0.01
    np.testing.assert_allclose(np.divide(*metrics["augmented"]), drawn_by, rtol=1e-5)

    trained = lambda params: cross_entropy(2 * outputs(params, x)["class"], y)
    loss, grads = jax.jit(jax.value_and_grad(trained))(state.params)
    expected = jax.tree.map(lambda p, g: p - learning_rate * g, state.params, grads)
    assert_close(new.params, expected, 1e-5)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    logits = method.predict(new, STREAMS.val.inputs)
    np.testing.assert_array_equal(logits, outputs(new.params, STREAMS.val.inputs)["class"])


def test_between_searches_nothing_moves_the_policy(plain_operations):
    method = madaug.make(network(), optax.sgd(0.1), steps_per_epoch=1, search_every=3)
    step = jax.jit(functools.partial(method.step, reduce=identity))
    state = start(method)
    for number in range(7):
        new, metrics = step(state, STREAMS)
        moved = lambda a, b: jax.tree.map(lambda a, b: bool((a != b).any()), a, b)
        searched = number % 3 == 0
        assert moved(new.extra.policy, state.extra.policy) == dict(kernel=searched, bias=searched)
        assert any(jax.tree.leaves(moved(new.extra.opt_state, state.extra.opt_state))) == searched
        assert metrics["val_loss"][1] == searched
        assert all(jax.tree.leaves(moved(new.params, state.params)))
        state = new


def test_the_network_hands_out_what_its_head_reads():
    model = from_linen(madaug.network(MLP((5,)), CLASSES))
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    params, stats = model.init(jax.random.key(0), x)
    out = model.logits(params, stats, x)
    assert {k: v.shape for k, v in out.items()} == {"class": (4, CLASSES), "features": (4, 5)}
    head = params["head"]["class"]
    expected = np.asarray(out["features"]) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(out["class"], expected, rtol=1e-5, atol=1e-6)


# --- what is drawn ---------------------------------------------------------------------------


def test_the_curriculum():
    share = functools.partial(madaug.share_at, steps_per_epoch=10, tau=40.0)
    for step in (0, 5, 10, 400, 1000, 100_000):
        expected = min(np.tanh(step / 10 / 40) + 0.01, 1)
        np.testing.assert_allclose(share(jnp.int32(step)), expected, rtol=1e-6)
    assert share(0) == np.float32(0.01) and share(10**6) == 1


@pytest.fixture
def few_operations(monkeypatch):
    """Fewer compile faster."""
    kept = ("identity", "brightness", "invert", "flip", "cutout")
    monkeypatch.setattr(madaug, "SPACE", {name: madaug.SPACE[name] for name in kept})
    return kept


DRAWS = 16_000


def drawing(names, **options):
    """(batch, policy, jitter) -> (augmented batch, which rows), compiled, and what it is given."""
    rng = np.random.default_rng(5)
    images = rng.uniform(size=(DRAWS, 4, 5, 3)).astype(np.float32)
    b = Batch(images, np.ones((DRAWS, 1), np.float32), np.ones(DRAWS, bool), np.arange(DRAWS))
    strength = np.linspace(0.05, 0.95, len(names)).astype(np.float32)
    logits = rng.normal(size=len(names)).astype(np.float32)
    said = madaug.Policy(*(np.tile(x, (DRAWS, 1)) for x in (strength, logits)))

    def draw(b, said, jitter):
        return madaug.drawn_operations(jax.random.key(0), b, said, jitter=jitter, **options)

    return jax.jit(draw), b, said


@functools.cache
def compiled():
    return drawing(NAMES, layers=1, share=1.0)


@functools.cache
def drawn(jitter):
    """(batch with one operation each, the batch itself)."""
    draw, b, said = compiled()
    made, used = jax.device_get(draw(b, said, jitter))
    assert used.all()
    return made, b


def within(found, expected, count):
    """Frequencies are as expected, to five standard deviations."""
    found, expected = np.asarray(found), np.asarray(expected)
    bound = 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12
    assert (np.abs(found - expected) <= bound).all(), (found, expected)


def test_operations_are_drawn_with_the_policys_probabilities_without_replacement(few_operations):
    draw, b, said = drawing(few_operations, layers=2, share=0.6)
    made, used = jax.device_get(draw(b, said, 0.3))
    within(used.mean(), 0.6, DRAWS)
    place = {OPERATIONS.index(name): k for k, name in enumerate(few_operations)}
    found = np.vectorize(place.get)(made.trace.operation[used])
    p = softmax(said.logits[0])
    expected = p[:, None] * p[None] / (1 - p[:, None]) * ~np.eye(len(p), dtype=bool)
    pairs = np.zeros_like(expected)
    np.add.at(pairs, (found[:, 0], found[:, 1]), 1 / len(found))
    within(pairs, expected, len(found))
    # The others are as they were.
    np.testing.assert_array_equal(made.inputs[~used], b.inputs[~used])
    assert (made.trace.operation[~used] == 0).all() and (made.trace.magnitude[~used] == 0).all()


# By strength, on images of 4 x 5: RandAugment's ranges.
VALUES = {
    **dict.fromkeys(("identity", "autocontrast", "equalize", "invert"), lambda m: 0 * m),
    **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), lambda m: 0.9 * m),
    **dict.fromkeys(("shear_x", "shear_y"), lambda m: 0.3 * m),
    "rotate": lambda m: 30 * m,
    "translate_x": lambda m: 150 / 331 * 5 * m,
    "translate_y": lambda m: 150 / 331 * 4 * m,
    "solarize": lambda m: 1 - m,
    "posterize": lambda m: 8 - np.round(4 * m),
    "flip": lambda m: 0 * m + 1,
    "cutout": lambda m: 0.2 * m,
}
SIGNED = ("color", "contrast", "brightness", "sharpness", "shear_x", "shear_y", "rotate",
          "translate_x", "translate_y")  # fmt: skip


def deviation(name, value):
    """Of the trace's value: what a strength scales, without its sign."""
    if name in SIGNED:
        return np.abs(value - (name in ("color", "contrast", "brightness", "sharpness")))
    return value


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_magnitudes_are_the_policys_strengths_with_jitter(jitter):
    made, _ = drawn(jitter)
    for name, strength in zip(NAMES, compiled()[2].strength[0]):
        rows = made.trace.operation[:, 0] == OPERATIONS.index(name)
        value = made.trace.magnitude[rows, 0]
        found = deviation(name, value)
        low, high = np.clip([strength - jitter, strength + jitter], 0, 1)
        ends = sorted(VALUES[name](np.array([low, high])))
        assert rows.sum() > 50
        assert (ends[0] - 1e-5 <= found).all() and (found <= ends[1] + 1e-5).all()
        if jitter and np.ptp(ends):  # the whole range is met
            assert np.ptp(found) > 0.8 * np.ptp(ends)
        if name in SIGNED:
            signs = value - (name in ("color", "contrast", "brightness", "sharpness")) > 0
            within(signs.mean(), 0.5, rows.sum())


def applied(name, image, value):
    """What an operation makes of an image, in NumPy; None where that is not a line or two."""
    if name == "brightness":
        return value * image
    if name == "color":
        grey = image @ np.array([0.299, 0.587, 0.114])
        return grey[..., None] + value * (image - grey[..., None])
    if name == "solarize":
        return np.where(image >= value - 1e-4, 1 - image, image)  # as `image.solarize` has it
    if name == "posterize":
        kept = 2 ** (8 - int(value))
        return np.round(image * 255) // kept * kept / 255
    lines = {"identity": image, "invert": 1 - image, "flip": image[:, ::-1]}
    return lines.get(name)


@pytest.mark.parametrize("name", ["identity", "brightness", "color", "solarize", "posterize",
                                  "invert", "flip"])  # fmt: skip
def test_an_operation_is_applied_at_the_value_that_the_trace_names(name):
    made, b = drawn(0.3)
    rows = np.flatnonzero(made.trace.operation[:, 0] == OPERATIONS.index(name))[:50]
    for row in rows:
        value = made.trace.magnitude[row, 0].astype(np.float64)
        expected = np.clip(applied(name, b.inputs[row].astype(np.float64), value), 0, 1)
        np.testing.assert_allclose(made.inputs[row], expected, atol=1e-5)


def test_cutout_empties_a_box_of_its_share_and_leaves_the_rest(few_operations):
    size, side = 400, 40
    images = np.ones((size, side, side, 1), np.float32)
    share = np.linspace(0.05, 0.5, size).astype(np.float32)
    centre = np.random.default_rng(6).uniform(size=(size, 2)).astype(np.float32)
    operation = np.full(size, OPERATIONS.index("cutout"))
    made = np.asarray(jax.jit(madaug.apply)(images, operation, share, centre))[..., 0]
    for image, s, middle in zip(made, share, centre):
        assert set(np.unique(image)) <= {0, 1}
        for axis in (0, 1):
            gone = np.flatnonzero((image == 0).any(1 - axis))
            low, high = side * np.clip(middle[axis] + np.array([-s, s]) / 2, 0, 1)
            assert abs(gone[0] - low) <= 1 and abs(gone[-1] + 1 - high) <= 1
            np.testing.assert_array_equal(gone, np.arange(gone[0], gone[-1] + 1))
        assert (image == 0).sum() == (image == 0).any(0).sum() * (image == 0).any(1).sum()


def test_a_search_sees_every_operation_at_its_strength():
    few = jax.tree.map(lambda x: x[:64], compiled()[1])
    strength = np.linspace(0.6, 0.95, N).astype(np.float32)
    everything = jax.jit(madaug.all_operations)
    found = np.asarray(everything(jax.random.key(1), few, np.tile(strength, (64, 1))))
    assert found.shape == (64, N, *few.inputs.shape[1:]) and found.min() >= 0 and found.max() <= 1
    for k, name in enumerate(NAMES):
        value = VALUES[name](strength[k].astype(np.float64))
        if name in ("color", "brightness"):
            values = 1 - value, 1 + value
        else:
            values = (value,)
        if applied(name, few.inputs[0], value) is not None:
            one_of = [np.clip([applied(name, x, v) for x in few.inputs], 0, 1) for v in values]
            hits = [np.abs(found[:, k] - made).max((1, 2, 3)) < 1e-4 for made in one_of]
            assert np.any(hits, 0).all() and all(hit.any() for hit in hits)
    # The others do something, too.
    changed = (np.abs(found - few.inputs[:, None]).max((2, 3, 4)) > 1e-3).mean(0) > 0.3
    assert set(NAMES) - set(np.array(NAMES)[changed]) == {"identity"}


# --- runners, and what it is for -------------------------------------------------------------


def linear(pixels, classes):
    """Softmax regression on pixels, which are the features too."""

    def outputs(params, stats, x):
        features = x.reshape(len(x), -1) - 0.5
        return {"class": features @ params["kernel"], "features": features}

    def init(key, x):
        return {"kernel": 0.1 * jax.random.normal(key, (pixels, classes))}, {}

    return Model(init, lambda params, stats, x, key: (outputs(params, stats, x), stats), outputs)


def on_devices(make_runner):
    """State and metrics after some steps, padding among the rows."""
    method = madaug.make(
        linear(36, setup_.CLASSES), setup_.TX, steps_per_epoch=1, tau=3.0, search_every=2,
        policy_tx=optax.sgd(10.0),
    )  # fmt: skip
    runner = make_runner(method.step)
    state = runner.put_state(method.init(jax.random.key(0), setup_.POOL.inputs[:2]))
    for streams in setup_.make_batches("implicit_padding"):
        state, metrics = runner.step(state, runner.put_batch(streams))
    averages = {name: np.divide(*pair) for name, pair in jax.device_get(metrics).items()}
    return setup_.flatten(state), averages


@pytest.mark.slow
def test_eight_devices_agree_with_one(monkeypatch):
    kept = ("brightness", "cutout")
    monkeypatch.setattr(madaug, "SPACE", {name: madaug.SPACE[name] for name in kept})
    expected, metrics = on_devices(functools.partial(jit_runner, devices=jax.devices()[:1]))
    assert np.abs(expected["extra/policy/kernel"]).max() > 1e-3
    assert 0 < metrics["augmented"] < 1
    for name in RUNNERS:
        state, found = on_devices(RUNNERS[name])
        for key, value in expected.items():
            np.testing.assert_allclose(state[key], value, rtol=0, atol=5e-6, err_msg=key)
        for key, value in metrics.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)


def test_an_operation_that_changes_the_class_is_unlearned(few_operations):
    # Bright and dark images: inverted, each is the other; mirrored, none is.
    rng = np.random.default_rng(7)

    def draw(size):
        label = rng.integers(2, size=size)
        images = 0.35 + 0.3 * label[:, None, None, None] + rng.normal(0, 0.1, (size, 4, 4, 1))
        images = np.clip(images, 0, 1).astype(np.float32)
        labels = np.eye(2, dtype=np.float32)[label]
        return Batch(images, labels, np.ones(size, bool), np.arange(size))

    model, streams = linear(16, 2), Streams(draw(64), draw(32))
    method = madaug.make(
        model, optax.sgd(0.5), steps_per_epoch=1, tau=50.0, search_every=1, temperature=1.0,
        inner_learning_rate=0.5, policy_tx=optax.sgd(30.0),
    )  # fmt: skip
    state = method.init(jax.random.key(7), streams.candidates.inputs)
    step = jax.jit(functools.partial(method.step, reduce=identity))
    for _ in range(25):
        state, _ = step(state, streams)
    features = model.logits(state.params, {}, streams.candidates.inputs)["features"]
    p = softmax(madaug.policy(state.extra.policy, features, 1.0).logits).mean(0)
    p = dict(zip(few_operations, p))
    assert p["invert"] < 0.05 and min(p["flip"], p["identity"]) > 0.25


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps_per_epoch": 0}, "steps_per_epoch must be positive and finite; given 0"),
        ({"tau": -1.0}, "tau must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"inner_learning_rate": 0.0}, "inner_learning_rate must be positive"),
        ({"layers": 0}, "layers must be a whole number >= 1; given 0"),
        ({"layers": 18}, "layers must be at most 17; given 18"),
        ({"jitter": 1.5}, r"jitter must lie in \[0, 1\]; given 1.5"),
        ({"search_every": 0}, "search_every must be a whole number >= 1; given 0"),
        ({"policy_tx": -1e-3}, "policy_tx must be positive"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        madaug.make(network(), optax.sgd(0.1), **{"steps_per_epoch": 1, **options})


def test_features_images_and_validation_samples_are_needed():
    method = madaug.make(network(), optax.sgd(0.1), steps_per_epoch=1)
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)
    with pytest.raises(ValueError, match="madaug needs validation samples"):
        method.step(state, STREAMS._replace(val=None), reduce=identity)
    with pytest.raises(ValueError, match="inputs must be images"):
        method.init(jax.random.key(0), np.zeros((2, 5), np.float32))
    for out, given in ({"class": 0}, r"\['class'\]"), (np.zeros(3), r"\['logits'\]"):
        plain = network()._replace(logits=lambda params, stats, x, out=out: out)
        method = madaug.make(plain, optax.sgd(0.1), steps_per_epoch=1)
        with pytest.raises(ValueError, match=f"'class' and 'features'; given {given}"):
            method.init(jax.random.key(0), STREAMS.candidates.inputs)
