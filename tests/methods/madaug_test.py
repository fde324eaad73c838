"""MADAug: the policy's gradient, the curriculum, what is drawn and what operations do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Model, RunInfo, Streams
from saflex_jax._compat import enable_x64
from saflex_jax.augment import OPERATIONS
from saflex_jax.methods import madaug
from saflex_jax.models import MLP, from_linen
from saflex_jax.parallel import RUNNERS, jit_runner
from tests.parallel import setup_
from tests.problems import assert_close, softmax

NAMES = tuple(madaug.SPACE)
N, T, LR = len(NAMES), 3.0, 0.7


def make(model, tx, *, steps_per_epoch=1, **options):
    run = RunInfo(num_samples=16, num_classes=3, steps_per_epoch=steps_per_epoch)
    return madaug.make(model, tx, madaug.Options(**options), run=run)


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), 1))


# --- the policy's gradient -------------------------------------------------------------------


def reference_mixture(variants, h, features, temperature):
    """x~ = sum_k p_k (op_k + m_k - constant m_k), written out."""
    out = features @ h["kernel"] + h["bias"][None]
    m, e = 1 / (1 + jnp.exp(-out[:, :N])), jnp.exp(out[:, N:] / temperature)
    p = e / e.sum(1, keepdims=True)
    ops = variants + (m - jax.lax.stop_gradient(m))[:, :, None, None, None]
    return (p[:, :, None, None, None] * ops).sum(1)


def test_the_gradient_is_the_one_through_the_unrolled_step():
    rng = np.random.default_rng(0)
    size, width, classes, shape = 5, 6, 3, (2, 3, 1)
    variants, inputs, features = (
        rng.normal(size=s) for s in ((size, N, *shape), (4, *shape), (size, width))
    )
    labels, val_labels = (np.eye(classes)[rng.integers(classes, size=n)] for n in (size, 4))
    h = {"kernel": rng.normal(size=(width, 2 * N)), "bias": rng.normal(size=2 * N)}
    params = {"in": rng.normal(size=(6, 5)), "out": rng.normal(size=(5, classes))}

    def loss(params, images, labels):
        hidden = jnp.tanh(images.reshape(-1, 6) @ params["in"])
        return cross_entropy(hidden @ params["out"], labels)

    def val_loss(params):
        return loss(params, inputs, val_labels)

    def unrolled(h, params):
        def inner(params):
            return loss(params, reference_mixture(variants, h, features, T), labels)

        ahead = jax.tree.map(lambda p, g: p - LR * g, params, jax.grad(inner)(params))
        return val_loss(ahead)

    def inner_loss(params, h):
        return loss(params, madaug.mixture(variants, madaug.policy(h, features, T)), labels)

    @jax.jit
    def both(h, params):
        ahead = madaug.lookahead_gradient(
            inner_loss, jax.value_and_grad(val_loss), params, h, learning_rate=LR
        )
        return jax.value_and_grad(unrolled)(h, params), ahead

    with enable_x64(True):
        expected, ahead = both(h, params)
    assert np.abs(expected[1]["kernel"][:, :N]).max() > 1e-3  # strengths matter, and so
    assert np.abs(expected[1]["kernel"][:, N:]).max() > 1e-3  # do probabilities
    assert_close(ahead, expected, 1e-11)


SIZE, VAL, MASKED, CLASSES, WIDTH = 8, 6, 2, 3, 4


def network():
    """Two layers; in training mode its logits are doubled and its features useless."""
    rng = np.random.default_rng(1)
    params = {
        "in": rng.normal(size=(12, WIDTH)).astype(np.float32),
        "out": rng.normal(size=(WIDTH, CLASSES)).astype(np.float32),
    }

    def outputs(params, x):
        hidden = jnp.tanh(x.reshape(len(x), -1) @ params["in"])
        return {"class": hidden @ params["out"], "features": hidden}

    def train(params, stats, x, key):
        out = outputs(params, x)
        return {"class": 2 * out["class"], "features": jnp.full_like(out["features"], 7.0)}, stats

    return Model(lambda key, x: (params, {}), train, lambda params, stats, x: outputs(params, x))


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

    def nothing(key, batch, output, *, share, layers, jitter):
        assert (layers, jitter) == (2, 0.3)
        return batch, output.strength[:, 0] + share

    monkeypatch.setattr(madaug, "all_operations", everything)
    monkeypatch.setattr(madaug, "drawn_operations", nothing)


RATE, LEARNING_RATE = 5.0, 0.2


@functools.cache
def searching():
    """A state at step 0 whose policy says something, and a step with all that it is to be.

    Call it within `plain_operations`.
    """
    method = make(
        network(), optax.sgd(LEARNING_RATE), steps_per_epoch=2, temperature=2.0, search_every=3,
        inner_learning_rate=LR, policy_tx=optax.sgd(RATE, momentum=0.5),
    )  # fmt: skip
    state, rng = method.init(jax.random.key(0), STREAMS.candidates.inputs), np.random.default_rng(3)
    h = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), state.extra.params)
    state = state._replace(extra=state.extra._replace(params=h))
    (x, y), (val_x, val_y) = ((b.inputs[b.mask], b.labels[b.mask]) for b in STREAMS[:2])

    def outputs(params, x):
        return network().logits(params, {}, x)

    def written_out(state, new):
        """Values and gradients of the policy and the network, and the strength by new h."""
        features = outputs(state.params, x)["features"]
        out = features @ state.extra.params["kernel"] + state.extra.params["bias"][None]
        m = 1 / (1 + jnp.exp(-out[:, :N]))
        variants = SLOPES[None, :, None, None, None] * x[:, None]
        variants += OFFSETS[None, :, None, None, None] + 0.3 * m[:, :, None, None, None]

        def unrolled(h):
            mixed = reference_mixture(variants, h, features, 2.0)

            def inner(params):
                return cross_entropy(outputs(params, mixed)["class"], y)

            slope = jax.grad(inner)(state.params)
            ahead = jax.tree.map(lambda p, g: p - LR * g, state.params, slope)
            return cross_entropy(outputs(ahead, val_x)["class"], val_y)

        def trained(params):
            return cross_entropy(2 * outputs(params, x)["class"], y)

        of_policy = jax.value_and_grad(unrolled)(state.extra.params)
        of_network = jax.value_and_grad(trained)(state.params)
        out = features @ new.extra.params["kernel"][:, 0] + new.extra.params["bias"][0]
        return of_policy, of_network, jnp.mean(1 / (1 + jnp.exp(-out)))

    @jax.jit
    def step(state):
        new, metrics = method.step(state, STREAMS)
        logits = method.predict(new, val_x), outputs(new.params, val_x)["class"]
        return new, metrics, logits, written_out(state, new)

    return state, step


def test_a_search_moves_the_policy_and_a_step_the_network(plain_operations):
    state, step = searching()
    state = state._replace(step=np.int32(30))
    new, metrics, logits, ((val_loss, slopes), (loss, grads), strength) = step(state)
    moved = jax.tree.map(lambda a, b: (a - b) / -RATE, *map(host, (new, state)))
    assert_close(moved.extra.params, slopes, 2e-5)
    np.testing.assert_allclose(np.divide(*metrics["val_loss"]), val_loss, rtol=1e-5)
    # What it draws by is the new policy.
    drawn_by = strength + np.tanh(15 / 40) + 0.01
    np.testing.assert_allclose(np.divide(*metrics["augmented"]), drawn_by, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - LEARNING_RATE * np.asarray(g), state.params, grads)
    assert_close(new.params, expected, 1e-5)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    np.testing.assert_array_equal(*logits)


def host(state):
    """On the host, without its key."""
    return jax.device_get(state._replace(key=()))


def test_between_searches_nothing_moves_the_policy(plain_operations):
    state, step = searching()
    for number in range(7):
        new, metrics, *_ = step(state)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), *map(host, (new, state)))
        searched = number % 3 == 0
        assert moved.extra.params == dict(kernel=searched, bias=searched)
        assert any(jax.tree.leaves(moved.extra.opt_state)) == searched
        assert metrics["val_loss"][1] == searched
        assert all(jax.tree.leaves(moved.params))
        state = new


def test_the_network_hands_out_what_its_head_reads():
    model = from_linen(madaug.network(MLP((5,)), CLASSES))
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)

    @jax.jit
    def run(key):
        params, stats = model.init(key, x)
        return params["head"]["class"], model.logits(params, stats, x)

    head, out = run(jax.random.key(0))
    assert {k: v.shape for k, v in out.items()} == {"class": (4, CLASSES), "features": (4, 5)}
    expected = np.asarray(out["features"]) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(out["class"], expected, rtol=1e-5, atol=1e-6)


# --- what is drawn ---------------------------------------------------------------------------


def test_the_curriculum():
    steps = np.int32([0, 5, 10, 400, 1000, 100_000, 10**6])
    share = np.asarray(madaug.share_at(steps, steps_per_epoch=10, tau=40.0))
    expected = np.minimum(np.tanh(steps / 10 / 40) + 0.01, 1)
    np.testing.assert_allclose(share, expected, rtol=1e-6)
    assert share[0] == np.float32(0.01) and share[-1] == 1


def only(monkeypatch, *names):
    """Fewer operations compile faster."""
    monkeypatch.setattr(madaug, "SPACE", {name: madaug.SPACE[name] for name in names})


DRAWS = 16_000


@functools.cache
def images():
    rng = np.random.default_rng(5)
    inputs = rng.uniform(size=(DRAWS, 4, 5, 3)).astype(np.float32)
    return Batch(inputs, np.ones((DRAWS, 1), np.float32), np.ones(DRAWS, bool), np.arange(DRAWS))


@functools.cache
def said(number):
    """What a policy over so many operations says of all images."""
    strength = np.linspace(0.05, 0.95, number).astype(np.float32)
    logits = np.random.default_rng(6).uniform(-1, 1, number).astype(np.float32)
    return madaug.PolicyOutput(*(np.tile(x, (DRAWS, 1)) for x in (strength, logits)))


def within(shares, expected, count):
    """Frequencies are as expected, to five standard deviations."""
    shares, expected = np.asarray(shares), np.asarray(expected)
    bound = 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12
    assert (np.abs(shares - expected) <= bound).all(), (shares, expected)


# Those that `applied` knows.
IN_NUMPY = ("identity", "brightness", "color", "solarize", "posterize", "invert", "flip")


@functools.cache
def drawn_twice():
    """(augmented batch, which rows) of two layers of operations that NumPy does in a line or two.

    Call it within `only(monkeypatch, *IN_NUMPY)`.
    """

    @jax.jit
    def draw(batch, output):
        key = jax.random.key(0)
        return madaug.drawn_operations(key, batch, output, share=0.6, layers=2, jitter=0.3)

    return jax.device_get(draw(images(), said(len(IN_NUMPY))))


def test_operations_are_drawn_with_the_policys_probabilities_without_replacement(monkeypatch):
    only(monkeypatch, *IN_NUMPY)
    augmented, used = drawn_twice()
    within(used.mean(), 0.6, DRAWS)
    place = {OPERATIONS.index(name): k for k, name in enumerate(IN_NUMPY)}
    drawn = np.vectorize(place.get)(augmented.trace.operation[used])
    p = softmax(said(len(IN_NUMPY)).logits[0])
    expected = p[:, None] * p[None] / (1 - p[:, None]) * ~np.eye(len(p), dtype=bool)
    pairs = np.zeros_like(expected)
    np.add.at(pairs, (drawn[:, 0], drawn[:, 1]), 1 / len(drawn))
    within(pairs, expected, len(drawn))
    # The others are as they were.
    np.testing.assert_array_equal(augmented.inputs[~used], images().inputs[~used])
    trace = augmented.trace
    assert (trace.operation[~used] == 0).all() and (trace.magnitude[~used] == 0).all()


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


@functools.cache
def traced():
    """(policy's output, jitter) -> trace of one operation each; images are not made."""

    @jax.jit
    def draw(output, jitter):
        augmented, used = madaug.drawn_operations(
            jax.random.key(0), images(), output, share=1.0, layers=1, jitter=jitter
        )
        return augmented.trace, used

    return draw


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_magnitudes_are_the_policys_strengths_with_jitter(jitter):
    trace, used = jax.device_get(traced()(said(N), jitter))
    assert used.all()
    for name, strength in zip(NAMES, said(N).strength[0]):
        rows = trace.operation[:, 0] == OPERATIONS.index(name)
        value = trace.magnitude[rows, 0]
        size = deviation(name, value)
        low, high = np.clip([strength - jitter, strength + jitter], 0, 1)
        ends = sorted(VALUES[name](np.array([low, high])))
        assert rows.sum() > 50
        assert (ends[0] - 1e-5 <= size).all() and (size <= ends[1] + 1e-5).all()
        if jitter and np.ptp(ends):  # the whole range is met
            assert np.ptp(size) > 0.8 * np.ptp(ends)
        if name in SIGNED:
            signs = value - (name in ("color", "contrast", "brightness", "sharpness")) > 0
            within(signs.mean(), 0.5, rows.sum())


def applied(name, image, value):
    """What an operation of IN_NUMPY makes of an image."""
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
    return {"identity": image, "invert": 1 - image, "flip": image[:, ::-1]}[name]


@pytest.mark.parametrize("name", IN_NUMPY)
@pytest.mark.parametrize("layer", [0, 1])
def test_an_operation_is_applied_at_the_value_that_the_trace_names(monkeypatch, name, layer):
    only(monkeypatch, *IN_NUMPY)
    augmented, used = drawn_twice()
    operation, magnitude = augmented.trace.operation, augmented.trace.magnitude
    other = operation[:, 1 - layer] == OPERATIONS.index("identity")
    wanted = used & (operation[:, layer] == OPERATIONS.index(name))
    rows = np.flatnonzero(wanted & (other | (name == "identity")))[:50]
    assert len(rows) == 50
    for row in rows:
        image = images().inputs[row].astype(np.float64)
        if name != "identity":
            image = applied(name, image, magnitude[row, layer].astype(np.float64))
        else:  # and so of the other layer: what it changes is its own
            there = OPERATIONS[operation[row, 1 - layer]]
            image = applied(there, image, magnitude[row, 1 - layer].astype(np.float64))
        np.testing.assert_allclose(augmented.inputs[row], np.clip(image, 0, 1), atol=1e-5)


def test_cutout_empties_a_box_of_its_share_and_leaves_the_rest(monkeypatch):
    only(monkeypatch, "cutout")
    size, side = 400, 40
    ones = np.ones((size, side, side, 1), np.float32)
    share = np.linspace(0.05, 0.5, size).astype(np.float32)
    centre = np.random.default_rng(6).uniform(size=(size, 2)).astype(np.float32)
    operation = np.full(size, OPERATIONS.index("cutout"))
    boxed = np.asarray(jax.jit(madaug.apply)(ones, operation, share, centre))[..., 0]
    for image, s, middle in zip(boxed, share, centre):
        assert set(np.unique(image)) <= {0, 1}
        for axis in (0, 1):
            gone = np.flatnonzero((image == 0).any(1 - axis))
            low, high = side * np.clip(middle[axis] + np.array([-s, s]) / 2, 0, 1)
            assert abs(gone[0] - low) <= 1 and abs(gone[-1] + 1 - high) <= 1
            np.testing.assert_array_equal(gone, np.arange(gone[0], gone[-1] + 1))
        assert (image == 0).sum() == (image == 0).any(0).sum() * (image == 0).any(1).sum()


def test_a_search_sees_every_operation_at_its_strength():
    few = jax.tree.map(lambda x: x[:64], images())
    strength = np.linspace(0.6, 0.95, N).astype(np.float32)
    everything = jax.jit(madaug.all_operations)
    variants = np.asarray(everything(jax.random.key(1), few, np.tile(strength, (64, 1))))
    assert variants.shape == (64, N, *few.inputs.shape[1:])
    assert variants.min() >= 0 and variants.max() <= 1
    for k, name in enumerate(NAMES):
        value = VALUES[name](strength[k].astype(np.float64))
        if name in ("color", "brightness"):
            values = 1 - value, 1 + value
        else:
            values = (value,)
        if name in IN_NUMPY:
            one_of = [np.clip([applied(name, x, v) for x in few.inputs], 0, 1) for v in values]
            hits = [np.abs(variants[:, k] - x).max((1, 2, 3)) < 1e-4 for x in one_of]
            assert np.any(hits, 0).all() and all(hit.any() for hit in hits)
    # The others do something, too.
    changed = (np.abs(variants - few.inputs[:, None]).max((2, 3, 4)) > 1e-3).mean(0) > 0.3
    assert set(NAMES) - set(np.array(NAMES)[changed]) == {"identity"}


# --- runners, and what it is for -------------------------------------------------------------


def linear(pixels, classes):
    """Softmax regression on pixels, which are the features too."""

    def outputs(params, stats, x):
        features = x.reshape(len(x), -1) - 0.5
        return {"class": features @ params["kernel"], "features": features}

    def train(params, stats, x, key):
        return outputs(params, stats, x), stats

    kernel = 0.1 * np.random.default_rng(8).normal(size=(pixels, classes)).astype(np.float32)
    return Model(lambda key, x: ({"kernel": kernel}, {}), train, outputs)


def on_devices(make_runner):
    """State and metrics after some steps, padding among the rows."""
    options = {"tau": 3.0, "search_every": 2, "policy_tx": optax.sgd(10.0)}
    method = make(linear(36, setup_.CLASSES), setup_.TX, **options)
    runner = make_runner(method.step)
    state = runner.put_state(method.init(jax.random.key(0), setup_.POOL.inputs[:2]))
    for streams in setup_.make_batches("implicit_padding"):
        state, metrics = runner.step(state, runner.put_batch(streams))
    averages = {name: np.divide(*pair) for name, pair in jax.device_get(metrics).items()}
    return setup_.flatten(state), averages


@pytest.mark.slow
def test_eight_devices_agree_with_one(monkeypatch):
    only(monkeypatch, "brightness", "cutout")
    expected, metrics = on_devices(functools.partial(jit_runner, devices=jax.devices()[:1]))
    assert np.abs(expected["extra/params/kernel"]).max() > 1e-3
    assert 0 < metrics["augmented"] < 1
    for name in RUNNERS:
        state, averages = on_devices(RUNNERS[name])
        for key, value in expected.items():
            np.testing.assert_allclose(state[key], value, rtol=0, atol=5e-6, err_msg=key)
        for key, value in metrics.items():
            np.testing.assert_allclose(averages[key], value, rtol=1e-5, err_msg=key)


def test_an_operation_that_changes_the_class_is_unlearned(monkeypatch):
    # Bright and dark images: inverted, each is the other; mirrored, none is.
    names = ("identity", "invert", "flip")
    only(monkeypatch, *names)
    rng = np.random.default_rng(7)

    def draw(size):
        label = rng.integers(2, size=size)
        images = 0.35 + 0.3 * label[:, None, None, None] + rng.normal(0, 0.1, (size, 4, 4, 1))
        images = np.clip(images, 0, 1).astype(np.float32)
        labels = np.eye(2, dtype=np.float32)[label]
        return Batch(images, labels, np.ones(size, bool), np.arange(size))

    model, streams = linear(16, 2), Streams(draw(64), draw(32))
    method = make(
        model, optax.sgd(0.5), tau=50.0, search_every=1, temperature=1.0,
        inner_learning_rate=0.5, policy_tx=optax.sgd(30.0),
    )  # fmt: skip
    state = method.init(jax.random.key(7), streams.candidates.inputs)
    step = jax.jit(method.step)
    for _ in range(25):
        state, _ = step(state, streams)
    out = streams.candidates.inputs.reshape(64, -1) - 0.5
    out = out @ np.asarray(state.extra.params["kernel"]) + state.extra.params["bias"][None]
    p = dict(zip(names, softmax(out[:, len(names) :]).mean(0)))
    assert p["invert"] < 0.05 and min(p["flip"], p["identity"]) > 0.25


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
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
        madaug.Options(**options)


def test_features_images_validation_samples_and_a_clock_are_needed():
    method = make(network(), optax.sgd(0.1))
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)
    with pytest.raises(ValueError, match="madaug needs validation samples"):
        method.step(state, STREAMS._replace(val=None))
    with pytest.raises(ValueError, match="inputs must be images"):
        method.init(jax.random.key(0), np.zeros((2, 5), np.float32))
    for out, given in ({"class": 0}, r"\['class'\]"), (np.zeros(3), r"\['logits'\]"):
        plain = network()._replace(logits=lambda params, stats, x, out=out: out)
        method = make(plain, optax.sgd(0.1))
        with pytest.raises(ValueError, match=f"'class' and 'features'; given {given}"):
            method.init(jax.random.key(0), STREAMS.candidates.inputs)
    for run in (None, RunInfo(16, 3)):
        with pytest.raises(ValueError, match=r"run.steps_per_epoch must be positive .*given 0\.0"):
            madaug.make(network(), optax.sgd(0.1), run=run)
