"""AutoMix and its relatives against their two losses, written down and differentiated apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Refiner, Streams, Targets
from saflex_jax.augment import OPERATIONS
from saflex_jax.core import steps
from saflex_jax.core.tree import identity
from saflex_jax.methods import automix
from saflex_jax.methods.automix import Kept, Mixture
from saflex_jax.models import AdversarialMixBlock, MixBlock, SmallCNN, from_linen
from saflex_jax.parallel import jit_runner
from tests import problems
from tests.parallel import setup_
from tests.problems import CLASSES, assert_close

SIZE, REAL, PIXELS = 8, 6, (8, 8)  # rows, those that are no padding
KEY, LR, NUM_STEPS = jax.random.key(0), 0.2, 10
TX = optax.sgd(LR, momentum=0.9)  # its state is the first step's gradient
MOMENTUM = {"momentum": 0.5, "momentum_end": 0.9}


# --- a small problem -------------------------------------------------------------------------


@functools.cache
def model(norm="group", widths=(4,)):
    return from_linen(automix.network(SmallCNN(widths, norm=norm), CLASSES, stage=-1))


def make(norm="group", widths=(4,), **options):
    return automix.make(model(norm, widths), TX, num_steps=NUM_STEPS, **MOMENTUM, **options)


def make_batch(seed=0):
    """Images in quarters, which a mixture by sixteenths rounds nowhere; the last rows padding."""
    rng = np.random.default_rng(seed)
    return Batch(
        inputs=rng.integers(-8, 9, (SIZE, *PIXELS, 2)).astype(np.float32) / 4,
        labels=problems.hard_labels(rng, SIZE),
        mask=np.arange(SIZE) < REAL,
        index=np.arange(20, 20 + SIZE, dtype=np.int32),
    )


STREAMS = Streams(make_batch(), make_batch(1))
ROWS = np.array(
    [[0, 1, 2, 3, 4, 5, 6, 7], [3, 0, 2, 5, 1, 4, 6, 7], [1, 4, 0, 2, 5, 3, 6, 7]], np.int32
)


def mixture(*shares, rows=(0, 1)):
    return Mixture(ROWS[list(rows)], np.array(shares, np.float32))


# Of the mix block, and of the network.
MIDDLE = mixture(0.25, 0.75), mixture(0.625, 0.375, rows=(0, 2))
MARGIN = mixture(0.9375, 0.0625), mixture(0.0625, 0.9375, rows=(0, 2))
THREE = mixture(0.25, 0.25, 0.5, rows=(0, 1, 2)), mixture(0.5, 0.375, 0.125, rows=(0, 2, 1))


def start(method, step=7):
    """A state in which nothing is as after `init`: k is not q, nor are its running statistics."""
    shapes = jax.eval_shape(method.init, KEY, STREAMS.candidates.inputs)
    rng = np.random.default_rng(5)

    def draw(path, shape):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, shape.shape).astype(np.float32)
        # Masks far from equal, and a network that is no chaos.
        scale = 3.0 if path[0].key == "mix_block" else 0.5 if name == "kernel" else 1.0
        return scale * rng.normal(size=shape.shape).astype(np.float32)

    drawn = functools.partial(jax.tree_util.tree_map_with_path, draw)
    params, k = drawn(shapes.params), drawn(shapes.extra.momentum)
    kept = Kept(k, {"targets": GIVEN} if shapes.extra.refiner else ())
    state = steps.init_state(KEY, params, drawn(shapes.model_state), TX, kept)
    return state._replace(step=jnp.int32(step))


# --- a rule that gives what it was given, and keeps what it was shown ------------------------

_rng = np.random.default_rng(2)
GIVEN = Targets(
    _rng.uniform(0.2, 2.0, SIZE).astype(np.float32),
    problems.soft_labels(_rng, SIZE),
    np.zeros(SIZE, np.float32),
)


def _given(arrays, state, logits_fn, streams, *, reduce):
    logits = logits_fn(state.params, streams.candidates.inputs)
    return arrays["targets"], {**arrays, "shown": streams, "logits": logits}, {}


RULE = Refiner(lambda params: {"targets": GIVEN}, _given)


def taking(method):
    """(state, streams, (of the block, of the network)) -> the step with these draws."""

    @jax.jit
    def step(state, streams, mixtures):
        left = iter(mixtures)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(automix, "draw", lambda *_: next(left))
            return method.step(state, streams, reduce=identity)

    return step


# --- the step, by two gradients --------------------------------------------------------------


def parts(params):
    params = dict(params)
    return params.pop("mix_block"), params


def cross_entropy(logits, labels):
    return -jnp.sum(labels * (logits - jax.nn.logsumexp(logits, 1, keepdims=True)), 1)[:REAL]


def images(masks, batch, of):
    return sum(m[..., None] * batch.inputs[rows] for m, rows in zip(masks, of.rows))


def labels(batch, of):
    return sum(share * batch.labels[rows] for share, rows in zip(of.shares, of.rows))


def constant(of):
    return jnp.ones((len(of.shares), SIZE, *PIXELS)) * of.shares[:, None, None, None]


def expected(model, block, generator, network, *, settle=lambda masks, of: masks, third=False):
    """(state, batch, mixtures, m, *weights) -> what a step makes of them.

    `generator` is (logits of k for mixtures, labels, M, mixture, logits of k for images, *weights),
    `network` (logits "mix" of the mixtures, labels, logits "one" of images, batch, logits "one" of
    the constant mixtures if `third`), -> loss f32[].
    """
    train = lambda params, stats, x: model.train(params, stats, x, KEY)

    @jax.jit
    def step(state, batch, mixtures, m, *weights):
        of_block, of_network = mixtures
        (phi, q), k = parts(state.params), state.extra.momentum
        clean, k_stats = train(k, state.model_state["k"], batch.inputs)

        def masks(phi, of):
            return block.apply({"params": phi}, clean["map"][of.rows], of.shares, size=PIXELS)

        def of_generator(phi):
            found = masks(phi, of_block)
            out, stats = train(k, k_stats, images(found, batch, of_block))
            args = labels(batch, of_block), found, of_block, clean["mix"]
            return generator(out["mix"], *args, *weights), stats

        mixed = images(settle(masks(phi, of_network), of_network), batch, of_network)

        def of_classifier(q):
            one, stats = train(q, state.model_state["q"], batch.inputs)
            mix, stats = train(q, stats, mixed)
            target, linear = labels(batch, of_network), None
            if third:
                both = images(constant(of_network), batch, of_network)
                linear, stats = train(q, stats, both)
                linear = linear["one"]
            return network(mix["mix"], target, one["one"], batch, linear), stats

        (loss_phi, k_stats), grad_phi = jax.value_and_grad(of_generator, has_aux=True)(phi)
        (loss_q, q_stats), grad_q = jax.value_and_grad(of_classifier, has_aux=True)(q)
        new_q = jax.tree.map(lambda x, g: x - LR * g, q, grad_q)
        return {
            "grads": (grad_phi, grad_q),
            "k": jax.tree.map(lambda a, b: m * a + (1 - m) * b, k, new_q),
            "stats": {"q": q_stats, "k": k_stats},
            "losses": (loss_phi, loss_q),
            "mixed": mixed,
        }

    return step


def momentum_of(step):
    """m of MOMENTUM after the first tenth of the run."""
    return 0.9 - 0.4 * (np.cos(np.pi * step / NUM_STEPS) + 1) / 2


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def assert_step(found, reference, state):
    """Gradients, and what an optimiser's step and an average make of them."""
    new, metrics = found
    grads = new.opt_state[0].trace
    for part, wanted in zip(parts(grads), reference["grads"]):
        largest = np.abs(flat(wanted)).max()
        assert largest > 1e-4
        np.testing.assert_allclose(flat(part), flat(wanted), rtol=0, atol=2e-5 * largest)
    assert_close(new.params, jax.tree.map(lambda x, g: x - LR * g, state.params, grads), 1e-6)
    assert_close(new.extra.momentum, reference["k"], 1e-5)
    assert_close(new.model_state, reference["stats"], 1e-5)
    of_phi, of_q = reference["losses"]
    np.testing.assert_allclose(np.divide(*metrics["generator_loss"]), of_phi, rtol=1e-5)
    np.testing.assert_allclose(np.divide(*metrics["loss"]), of_phi + of_q, rtol=1e-5)
    assert new.step == state.step + 1


WIDTHS, WEIGHT, LIMIT = (4, 6), 0.7, 0.05


def automix_generator(logits, labels, masks, of, clean):
    own = masks[0, :REAL]
    off = jnp.maximum(jnp.abs(jnp.mean(own) - of.shares[0]) - LIMIT, 0)
    return jnp.mean(cross_entropy(logits, labels)) + WEIGHT * (off - 2 * jnp.var(own, ddof=1))


def given_targets(logits, labels, one, batch, linear):
    mixtures = GIVEN.weights[:REAL] * cross_entropy(logits, GIVEN.labels)
    return jnp.mean(mixtures) + jnp.mean(cross_entropy(one, batch.labels))


def at_margin(masks, of):
    lam = of.shares[0]
    return jnp.where((lam <= 0.0625) | (lam >= 0.9375), constant(of), masks)


@functools.cache
def automix_step():
    method = make(
        widths=WIDTHS, refiner=RULE, mask_loss="l1_variance", mask_weight=WEIGHT, mask_margin=LIMIT,
        lam_margin=0.0625,
    )  # fmt: skip
    return method, taking(method)


def test_each_part_moves_by_its_own_loss_and_k_follows():
    method, step = automix_step()
    network = model(widths=WIDTHS)
    reference = expected(network, MixBlock(), automix_generator, given_targets, settle=at_margin)
    for number, mixtures in ((7, MIDDLE), (9, MARGIN)):  # the block's draw knows no margin
        state = start(method, number)
        found = step(state, STREAMS, mixtures)
        made = reference(state, STREAMS.candidates, mixtures, momentum_of(number))
        assert_step(found, made, state)
    assert found[1]["candidate_loss"][1] == found[1]["image_loss"][1] == REAL


def test_the_rule_is_shown_the_mixtures_and_the_networks_logits():
    method, step = automix_step()
    state = start(method)
    (new, _), (_, of) = step(state, STREAMS, MIDDLE), MIDDLE
    shown, batch = new.extra.refiner["shown"], STREAMS.candidates
    np.testing.assert_array_equal(shown.candidates.labels, labels(batch, of))
    np.testing.assert_array_equal(shown.candidates.index, batch.index)  # .625 is one's own
    np.testing.assert_array_equal(shown.candidates.mask, batch.mask)
    assert_close(shown.val, STREAMS.val, 0)
    logits = jax.jit(model(widths=WIDTHS).logits)(
        parts(state.params)[1], state.model_state["q"], shown.candidates.inputs
    )
    assert_close(new.extra.refiner["logits"], logits["mix"])
    assert_close(method.targets(state, STREAMS), GIVEN, 0)
    look = jax.jit(functools.partial(automix.look, model(widths=WIDTHS), MixBlock()))
    masks, looked = look(state, batch, of)
    assert_close(looked, shown.candidates)
    assert_close(looked.inputs, images(masks, batch, of))


def test_at_the_margin_a_mixture_is_mixups():
    method, step = automix_step()
    state, batch = start(method), STREAMS.candidates
    shown = lambda of: step(state, STREAMS, (MIDDLE[0], of))[0].extra.refiner["shown"].candidates
    for lam in (0.0625, 0.9375):
        of = mixture(lam, 1 - lam)
        x, y = batch.inputs, batch.labels
        np.testing.assert_array_equal(shown(of).inputs, lam * x + (1 - lam) * x[of.rows[1]])
        np.testing.assert_array_equal(shown(of).labels, lam * y + (1 - lam) * y[of.rows[1]])
    for lam in (0.0626, 0.9374):
        of = mixture(lam, 1 - lam)
        apart = shown(of).inputs - images(constant(of), batch, of)
        assert np.abs(apart[:REAL]).max() > 0.1


def test_padding_changes_nothing():
    method, step = automix_step()
    other = make_batch(9)
    keep = lambda a, b: np.where(STREAMS.candidates.mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    garbage = STREAMS.candidates._replace(
        inputs=keep(STREAMS.candidates.inputs, 50 * other.inputs),
        labels=keep(STREAMS.candidates.labels, other.labels),
    )
    found, again = (
        step(start(method), STREAMS._replace(candidates=batch), MIDDLE)
        for batch in (STREAMS.candidates, garbage)
    )
    part = lambda x: (x[0].params, x[0].opt_state, x[0].extra.momentum, x[1])
    assert_close(part(found), part(again), 0)


def brier(logits, targets, candidates):
    apart = jnp.sum((jax.nn.softmax(logits) - targets.labels) ** 2, 1)
    return jnp.where(candidates.mask, targets.weights * apart, 0.0)


def test_batch_normalisation_mask_adjust_and_another_loss():
    def scaled(masks, of):
        """Each row's mask has the mean lambda, by NumPy's formula of the less and the more."""
        first, lam = masks[0], of.shares[0]
        mean = first.mean((1, 2), keepdims=True)
        more = 1 - (1 - first) * (1 - lam) / (1 - mean)
        first = jnp.where(mean > lam, first * lam / mean, more)
        return jnp.stack([first, 1 - first])

    def generator(logits, labels, masks, of, clean):
        return jnp.mean(cross_entropy(logits, labels))

    def network(logits, labels, one, batch, linear):
        apart = jnp.sum((jax.nn.softmax(logits) - GIVEN.labels) ** 2, 1)[:REAL]
        direct = jnp.mean(cross_entropy(one, batch.labels))
        return jnp.mean(GIVEN.weights[:REAL] * apart) + direct

    options = {"upsample": "bilinear", "lam_mul": 1.0, "v_neck": True, "qk_concat": True}
    method = make("batch", refiner=RULE, loss=brier, mask_adjust=1.0, mask_loss="none", **options)
    state, batch = start(method), STREAMS.candidates
    found = taking(method)(state, STREAMS, MIDDLE)
    reference = expected(model("batch"), MixBlock(**options), generator, network, settle=scaled)
    made = reference(state, batch, MIDDLE, momentum_of(7))
    assert_step(found, made, state)
    refiner = found[0].extra.refiner
    assert_close(refiner["shown"].candidates.inputs, made["mixed"])
    stats = state.model_state["q"]  # the rule sees evaluation mode
    logits = jax.jit(model("batch").logits)(parts(state.params)[1], stats, made["mixed"])["mix"]
    assert_close(refiner["logits"], logits)


def test_the_adversarial_rule():
    share, linear_share = 0.2, 0.25

    def generator(logits, labels, masks, of, clean, of_loss, of_likeness):
        norm = lambda x: jnp.sqrt(jnp.sum(x**2, 1))
        likeness = 0.0
        for lam, rows in zip(of.shares, of.rows):
            products = jnp.sum(logits * clean[rows], 1)
            likeness += lam * products / (norm(logits) * norm(clean[rows]))
        value = jnp.mean(cross_entropy(logits, labels))
        return of_loss * value + of_likeness * jnp.mean(likeness[:REAL])

    def network(logits, labels, one, batch, linear):
        value = jnp.mean(cross_entropy(logits, labels))
        value += (1 - linear_share) * jnp.mean(cross_entropy(one, batch.labels))
        return value + linear_share * jnp.mean(cross_entropy(linear, labels))

    options = automix.ADAUTOMIX | {"adversarial_every": 3, "adversarial_share": share}
    method = make(linear_share=linear_share, **options)
    step = taking(method)
    reference = expected(model(), AdversarialMixBlock(), generator, network, third=True)
    # The last of three steps is cooperative: against every third only.
    for number, weights in ((6, (-share, 1 - share)), (8, (1.0, 0.0))):
        state = start(method, number)
        made = reference(state, STREAMS.candidates, THREE, momentum_of(number), *weights)
        assert_step(step(state, STREAMS, THREE), made, state)


# --- the parts -------------------------------------------------------------------------------


def test_k_starts_as_q_and_the_block_near_one_half():
    known = start(make())
    q = jax.tree.map(jnp.asarray, parts(known.params)[1])
    stats = {"batch_stats": {"some": jnp.ones(3)}}
    fixed = model()._replace(init=lambda key, inputs: (q, stats))
    method = automix.make(fixed, TX, num_steps=NUM_STEPS, refiner=RULE)
    state = method.init(KEY, jnp.zeros((1, *PIXELS, 2)))
    phi, made = parts(state.params)
    assert_close(made, q, 0)
    assert_close(state.extra.momentum, q, 0)
    assert_close(state.model_state, {"q": stats, "k": stats}, 0)
    assert state.extra.refiner == {"targets": GIVEN}
    assert set(phi) == {"query", "value"}
    own, twin = (x.unsafe_buffer_pointer() for x in (made["head"]["one"]["bias"],
                 state.extra.momentum["head"]["one"]["bias"]))  # fmt: skip
    assert own != twin  # a step may donate q's


def test_momentum_is_constant_for_a_tenth_and_then_a_cosine():
    for num_steps in (10, 30, 70, 100, 330, 1000, 100_000):
        at = functools.partial(automix.momentum_at, num_steps=num_steps, start=0.999, end=0.999999)
        t = np.unique(np.linspace(0, num_steps, 11).astype(np.int32)[:, None] + [-1, 0, 1])
        t = t[(0 <= t) & (t <= num_steps)]
        cosine = 0.999999 - (0.999999 - 0.999) * (np.cos(np.pi * t / num_steps) + 1) / 2
        exact = np.where(10 * t < num_steps, 0.999, cosine)
        found = jax.jit(at)(t.astype(np.int32))  # a compiled quotient rounds another way
        np.testing.assert_allclose(found, exact, rtol=0, atol=1.3e-7, err_msg=str(num_steps))
    jump = automix.momentum_at(jnp.array([99, 100]), 1000, start=0.999, end=0.999999)
    np.testing.assert_allclose(jump, [0.999, 0.9990245], rtol=0, atol=1e-7)


MASK = np.array([True, False, True, True])


def mask_losses(own, lam, margin):
    """In double precision, over the pixels of rows that count."""
    own = np.float64(own)[MASK]
    off, variance = abs(own.mean() - lam), own.var(ddof=1)
    return {
        "none": 0.0,
        "l1": max(off - margin, 0),
        "l1_variance": max(off - margin, 0) - 2 * variance,
        "l2_variance": max(off**2 - margin**2, 0) - 2 * variance,
        "sparsity": max((own * (1 - own)).mean() - margin, 0),
    }


@pytest.mark.parametrize("kind", automix.MASK_LOSSES)
def test_mask_losses(kind):
    rng = np.random.default_rng(0)
    own = rng.uniform(0.2, 1.0, (4, 3, 5)).astype(np.float32)
    own[1] = 7.0  # padding
    at = lambda own, lam, margin: automix.distance(
        own, jnp.float32(lam), MASK, kind=kind, margin=margin
    )
    for lam, margin in ((0.1, 0.1), (0.95, 0.1), (0.1, 0.0)):  # on either side of the mean
        wanted = mask_losses(own, lam, margin)
        assert wanted["l1"] > 0.1 and wanted["sparsity"] > 0
        np.testing.assert_allclose(at(own, lam, margin), wanted[kind], rtol=1e-5)

    # Inside the margin nothing is asked of the mean; what rewards binary masks stays.
    value, grad = jax.value_and_grad(at)(own, own[MASK].mean() + 0.05, 0.3)
    counted = np.where(MASK[:, None, None], own, own[MASK].mean())
    variance, slope = own[MASK].var(ddof=1), 2 * (counted - own[MASK].mean()) / (own[MASK].size - 1)
    reward = -2 if "variance" in kind else 0
    np.testing.assert_allclose(value, reward * variance, rtol=1e-5)
    np.testing.assert_allclose(grad, reward * slope, rtol=1e-4, atol=1e-7)


def test_masks_are_scaled_to_the_mean_lambda():
    rng = np.random.default_rng(0)
    first = rng.uniform(size=(6, 4, 5)).astype(np.float32) ** rng.uniform(0.2, 4, (6, 1, 1))
    first[4], first[5] = 0, 1
    masks = np.stack([first, 1 - first]).astype(np.float32)
    for lam in (0.0, 0.3, 0.5, 0.8, 1.0):
        found = np.asarray(automix.with_mean(masks, jnp.float32(lam)))
        np.testing.assert_allclose(found.mean((2, 3))[0], lam, atol=1e-6)
        np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)
        assert -1e-6 <= found.min() and found.max() <= 1 + 1e-6
        # What is too much shrinks towards 0 in proportion, what is too little grows towards 1.
        own, partner = masks[:, :4]
        mean = own.mean((1, 2), keepdims=True)
        less, more = own * lam / mean, 1 - partner * (1 - lam) / (1 - mean)
        np.testing.assert_allclose(found[0, :4], np.where(mean > lam, less, more), atol=1e-6)


def test_similarity_is_the_weighted_mean_of_cosines():
    rng = np.random.default_rng(0)
    mixed, logits = rng.normal(size=(2, SIZE, 4)).astype(np.float32)
    of = THREE[0]
    found = automix.similarity(mixed, logits, of)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = [(unit(mixed) * unit(logits)[rows]).sum(1) for rows in of.rows]
    np.testing.assert_allclose(found, of.shares @ np.stack(cosines), atol=1e-6)
    total = lambda mixed: automix.similarity(mixed, logits, of).sum()
    assert np.isfinite(jax.grad(total)(np.zeros_like(mixed))).all()


@pytest.mark.parametrize("of", [*MIDDLE, MARGIN[1], *THREE])
def test_a_mixture(of):
    batch = STREAMS.candidates
    masks = np.random.default_rng(0).dirichlet(np.ones(len(of.shares)), (SIZE, *PIXELS))
    masks = np.moveaxis(masks, -1, 0).astype(np.float32)
    found = automix.mixed(batch, of, masks)
    inputs, target = np.zeros_like(batch.inputs), np.zeros_like(batch.labels)
    for mask, share, rows in zip(masks, of.shares, of.rows):
        for b, row in enumerate(rows):
            inputs[b] += mask[b, :, :, None] * batch.inputs[row]
            target[b] += share * batch.labels[row]
    np.testing.assert_allclose(found.inputs, inputs, atol=1e-6)
    np.testing.assert_allclose(found.labels, target, atol=1e-6)  # whatever the masks
    np.testing.assert_array_equal(found.index, batch.index[of.rows[np.argmax(of.shares)]])
    np.testing.assert_array_equal(found.mask, batch.mask)
    column = jax.tree.map(lambda x: np.asarray(x)[:, 0], found.trace)
    assert [OPERATIONS[i] for i in column.operation] == ["automix"] * SIZE
    np.testing.assert_array_equal(column.magnitude, of.shares[0])
    np.testing.assert_array_equal(column.partner, batch.index[of.rows[1]])
    assert automix.mixed(found, of, masks).trace.operation.shape == (SIZE, 2)


# --- drawing ---------------------------------------------------------------------------------


def draws(alpha, number, count=4000):
    batch = jax.tree.map(jnp.asarray, STREAMS.candidates)
    drawn = jax.vmap(lambda key: automix.draw(key, batch, alpha, number))
    return jax.tree.map(np.asarray, jax.jit(drawn)(jax.random.split(jax.random.key(3), count)))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_lambda_is_drawn_from_a_beta_distribution(alpha):
    shares = draws(alpha, 2).shares.astype(np.float64)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    lam = np.sort(shares[:, 0])
    cdf = {1.0: lam, 2.0: 3 * lam**2 - 2 * lam**3}[alpha]
    empirical = np.arange(1, len(lam) + 1) / len(lam)
    assert np.abs(cdf - empirical).max() < 1.63 / np.sqrt(len(lam))  # Kolmogorov: 1 % beyond
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 4 * np.sqrt(variance / len(lam))
    np.testing.assert_allclose(lam.var(), variance, rtol=0.1)


def test_shares_of_several_images_are_normalised_beta_draws():
    shares = draws(1.0, 3).shares.astype(np.float64)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    uniform = np.random.default_rng(0).uniform(size=(400_000, 3))
    wanted = uniform / uniform.sum(1, keepdims=True)
    error = wanted.std() / np.sqrt(len(shares))
    np.testing.assert_allclose(shares.mean(0), 1 / 3, atol=4 * error)
    np.testing.assert_allclose(shares.std(0), wanted.std(), rtol=0.05)
    # Each of the three is another draw.
    np.testing.assert_allclose(np.corrcoef(shares.T)[~np.eye(3, dtype=bool)], -0.5, atol=0.05)


def test_partners_are_any_real_row():
    drawn = draws(1.0, 3).rows
    np.testing.assert_array_equal(drawn[:, 0], np.broadcast_to(np.arange(SIZE), drawn[:, 0].shape))
    assert (drawn[:, 1] != drawn[:, 2]).mean() > 0.5
    for partners in (drawn[:, 1], drawn[:, 2]):
        own = partners == np.arange(SIZE)
        assert ((partners < REAL) | own).all()
        for row in range(REAL):  # those that met padding stay alone
            wanted = np.full(REAL, 1 / SIZE)
            wanted[row] += (SIZE - REAL) / SIZE
            found = np.bincount(partners[:, row], minlength=SIZE)[:REAL] / len(partners)
            np.testing.assert_allclose(found, wanted, atol=4 * np.sqrt(0.25 / len(partners)))


def test_every_step_makes_two_draws_of_its_own():
    method = make()

    @jax.jit
    def drawn(state, streams):
        real, found = automix.draw, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(automix, "draw", lambda *a: found.append(real(*a)) or found[-1])
            method.step(state, streams, reduce=identity)
        return found

    def lambdas(step):
        return [float(of.shares[0]) for of in drawn(start(method, step), STREAMS)]

    seen = lambdas(0) + lambdas(1) + lambdas(2)
    assert len(set(seen)) == len(seen) == 6
    assert lambdas(1) == seen[2:4]
    rows = [np.asarray(of.rows) for of in drawn(start(method), STREAMS)]
    assert (rows[0] != rows[1]).any()


# --- prediction, runners, errors -------------------------------------------------------------


def test_the_reported_head_and_network():
    names = [f"{head}_{network}" for head in ("one", "mix") for network in ("q", "k")]
    methods = {name: make("batch", predict=name) for name in names}
    state, inputs = start(make("batch")), STREAMS.val.inputs

    @jax.jit
    def predictions(state):
        reported = {name: method.predict(state, inputs) for name, method in methods.items()}
        return reported, make("batch").predict(state, inputs)

    @jax.jit
    def outputs(params, stats):
        return model("batch").logits(params, stats, inputs)

    found, default = predictions(state)
    params = {"q": parts(state.params)[1], "k": state.extra.momentum}
    for network in ("q", "k"):
        wanted = outputs(params[network], state.model_state[network])
        for head in ("one", "mix"):
            assert_close(found[f"{head}_{network}"], wanted[head])
    for a in names:
        for b in names:
            assert a == b or np.abs(found[a] - found[b]).max() > 1e-2
    assert_close(default, found["one_q"])


def trained(devices, norm, options):
    method = make(norm, **options)
    runner = jit_runner(method.step, devices=devices)
    state = runner.put_state(start(method, 0))
    for seed in (0, 1):
        state, metrics = runner.step(state, runner.put_batch(Streams(make_batch(seed))))
    averages = {name: total / count for name, (total, count) in jax.device_get(metrics).items()}
    return {**setup_.flatten(state), **averages}


@pytest.mark.parametrize(
    "norm, options",
    [
        ("batch", automix.SAMIX),
        pytest.param("group", automix.ADAUTOMIX, marks=pytest.mark.slow),
    ],
    ids=["samix", "adautomix"],
)
def test_eight_devices_agree_with_one(norm, options):
    one, eight = (trained(jax.devices()[:n], norm, options) for n in (1, 8))
    assert one.keys() == eight.keys()
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=0, atol=1e-6, err_msg=name)


FRACTIONS = ("lam_margin", "mask_adjust", "momentum", "momentum_end",
             "adversarial_share", "linear_share")  # fmt: skip
NOT_ADVERSARIAL = {"mask_loss": "l1", "mask_adjust": 0.5, "lam_mul": 1.0, "lam_mul_k": 0.25,
                   "lam_concat_v": True, "qk_concat": True, "v_concat": True,
                   "v_neck": True}  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_loss": "l2"}, "mask_loss must be one of .* given 'l2'"),
        ({"predict": "mix"}, "predict must be one of .* given 'mix'"),
        ({"alpha": 0.0}, "alpha must be positive and finite; given 0.0"),
        ({"num_steps": 0}, "num_steps must be a whole number >= 1; given 0"),
        ({"images": 1}, "images must be a whole number >= 2; given 1"),
        ({"images": 3}, "images must be 2 without adversarial_every; given 3"),
        ({"adversarial_every": -1}, "adversarial_every must be a whole number >= 0"),
        ({"mask_weight": -0.1}, "mask_weight must be >= 0; given -0.1"),
        ({"mask_margin": -0.1}, "mask_margin must be >= 0; given -0.1"),
        *(({name: 1.5}, f"{name} must lie in .0, 1.; given 1.5") for name in FRACTIONS),
        *(
            (
                {"adversarial_every": 2, "mask_loss": "none", name: value},
                f"{name}.* must be .* with adversarial_every; given .*{value!r}",
            )
            for name, value in NOT_ADVERSARIAL.items()
        ),
    ],
)
def test_an_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        automix.make(model(), TX, **{"num_steps": NUM_STEPS} | options)


def test_what_a_step_and_init_refuse():
    method = make()
    streams = STREAMS._replace(clean=STREAMS.val)
    with pytest.raises(ValueError, match="automix trains on candidates alone"):
        jax.eval_shape(functools.partial(method.step, reduce=identity), start(method), streams)
    with pytest.raises(ValueError, match="inputs must be images of floats"):
        method.init(KEY, jnp.zeros((2, 7)))
    plain = from_linen(automix.Heads(SmallCNN((4,)), {"one": 2, "mix": 2}))
    with pytest.raises(ValueError, match="model must hand out 'one', 'mix' and 'map'"):
        automix.make(plain, TX, num_steps=1).init(KEY, jnp.zeros((1, *PIXELS, 2)))


def test_the_relatives_options_are_taken_and_the_network_has_its_parts():
    for options in (automix.SAMIX, automix.ADAUTOMIX):
        make(**options)
    images = jnp.zeros((2, *PIXELS, 2))
    network = from_linen(automix.network(SmallCNN((4, 6, 8)), CLASSES))
    params, stats = jax.eval_shape(network.init, KEY, images)
    assert set(params) == {"backbone", "head"} and set(params["head"]) == {"one", "mix"}
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(network.logits, params, stats, images))
    assert shapes == {"one": (2, CLASSES), "mix": (2, CLASSES), "map": (2, 4, 4, 6)}
