"""Contrastive losses against NumPy, and their scores against gradients of single pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax import label_scores
from saflex_jax.core import contrastive
from saflex_jax.core.contrastive import captions_of
from saflex_jax.core.curvature import dot
from saflex_jax.models import unit

SIZE, CLASSES, WIDTH, EMBED = 7, 4, 5, 3
CLASS = np.array([0, 1, 1, 0, 2, 1, 3])  # of each pair; 3 is padding's alone, and so absent
MASK = np.arange(SIZE) < 6
_rng = np.random.default_rng(0)


def draw(*shape):
    return _rng.normal(size=shape).astype(np.float32)


IMAGES, TEXTS = draw(SIZE, WIDTH), draw(SIZE, WIDTH)
TEXTS[3] = TEXTS[0]  # one caption twice
VAL_IMAGES, VAL_TEXTS, VAL_CLASS = draw(5, WIDTH), draw(5, WIDTH), np.array([0, 1, 2, 0, 1])
PARAMS = {"image": draw(WIDTH, EMBED), "text": draw(WIDTH, EMBED), "scale": np.float32(3.0),
          "bias": np.float32(-1.0)}  # fmt: skip
DIRECTION = jax.tree.map(lambda x: np.asarray(0.3 * draw(*np.shape(x))), PARAMS)
FORMS = ("softmax", "sigmoid")


@jax.jit
def logits_of(params, images=IMAGES, texts=TEXTS):
    embedded = unit(images @ params["image"]), unit(texts @ params["text"])
    return contrastive.similarities(*embedded, params["scale"], params["bias"])


@functools.partial(jax.jit, static_argnames="form")
def class_losses(params, form, images=IMAGES, texts=TEXTS, classes=CLASS, mask=MASK):
    z, captions = logits_of(params, images, texts), captions_of(classes, mask, CLASSES)
    if form == "sigmoid":
        return contrastive.sigmoid_losses(z, captions)
    return contrastive.softmax_losses(z, captions, mask)


def of_classes(pairs, classes=CLASS, mask=MASK):
    """f[B, K]: means over the captions of each class, 0 where there is none, by loops."""
    means = np.zeros((len(pairs), CLASSES))
    for c in range(CLASSES):
        own = mask & (classes == c)
        if own.any():
            means[:, c] = np.asarray(pairs)[:, own].mean(1)
    return means


@functools.cache
def both():
    """(z, dz along DIRECTION)."""
    return jax.jit(functools.partial(jax.jvp, logits_of))((PARAMS,), (DIRECTION,))


def softmax64(z, axis):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def test_softmax_losses_are_the_means_of_rows_and_columns():
    z = np.float64(both()[0])[:6, :6]
    pairs = np.zeros((6, SIZE))
    pairs[:, :6] = -(np.log(softmax64(z, 1)) + np.log(softmax64(z, 0))) / 2
    found = class_losses(PARAMS, "softmax")[:6]
    np.testing.assert_allclose(found, of_classes(pairs), atol=1e-5)


def test_sigmoid_losses_are_those_of_all_pairs():
    z = np.float64(both()[0])[:6, :6]
    together = CLASS[:6, None] == np.arange(CLASSES)  # caption k, class c
    answers = together[None]  # i, k, c
    every = np.logaddexp(0, z)[..., None] - answers * z[..., None]
    np.testing.assert_allclose(class_losses(PARAMS, "sigmoid")[:6], every.sum(1), atol=1e-5)


def test_one_caption_a_class_is_the_loss_of_clip():
    z, size = both()[0], SIZE
    captions = captions_of(np.arange(size), np.ones(size, bool), size)
    losses = contrastive.softmax_losses(z, captions, np.ones(size, bool))
    rows, columns = (np.diag(jax.nn.log_softmax(z, axis)) for axis in (1, 0))
    np.testing.assert_allclose(np.diag(losses), -(rows + columns) / 2, atol=1e-5)


def test_identical_captions_make_no_false_negatives():
    # The loss of CLIP takes a caption of the same words for a negative; that changes no gradient.
    texts = np.stack([TEXTS[c] for c in CLASS])
    mask = np.ones(SIZE, bool)

    def several(params):
        losses = class_losses(params, "softmax", texts=texts, mask=mask)
        return jnp.mean(losses[jnp.arange(SIZE), CLASS])

    def identity(params):
        z = logits_of(params, texts=texts)
        return -jnp.mean(sum(jnp.diag(jax.nn.log_softmax(z, axis)) for axis in (0, 1))) / 2

    found, expected = (jax.jit(jax.grad(loss))(PARAMS) for loss in (several, identity))
    for name in ("image", "text"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def single_pairs(loss):
    """<v, grad loss_ik> of every pair, by a gradient for each."""
    jacobian = jax.jit(jax.jacrev(loss))(PARAMS)
    along = jax.tree.map(
        lambda j, v: np.tensordot(np.float64(j), np.float64(v), axes=np.ndim(v)),
        jacobian,
        DIRECTION,
    )
    return sum(jax.tree.leaves(along))


def masked_log_softmax(z, axis):
    hide = MASK[None] if axis == 1 else MASK[:, None]
    return jax.nn.log_softmax(jnp.where(hide, z, -jnp.inf), axis)


def test_pair_scores_are_gradients_of_single_pairs_in_both_directions():
    found = contrastive.pair_scores(*both(), captions=MASK, images=MASK)
    for axis, scores in zip((1, 0), found):
        expected = single_pairs(lambda p, a=axis: -masked_log_softmax(logits_of(p), a)[:6, :6])
        np.testing.assert_allclose(scores[:6, :6], expected, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1  # they are two things


def test_sigmoid_scores_are_gradients_of_single_pairs():
    for answer in (0, 1):

        def loss(params, a=answer):
            z = logits_of(params)
            return jax.nn.softplus(z) - a * z

        found = contrastive.sigmoid_scores(*both())[..., answer]
        np.testing.assert_allclose(found, single_pairs(loss), atol=1e-5)


def rule_scores(form):
    """(log p, scores) of classes as `core.scores` gives them to a rule."""

    def log_probs(params, inputs):
        del inputs
        captions = captions_of(CLASS, MASK, CLASSES)
        evidence = -class_losses(params, "softmax")
        if form == "sigmoid":
            evidence = logits_of(params) @ captions.mean
        return contrastive.class_log_probs(evidence, captions)

    return label_scores(log_probs, PARAMS, IMAGES, DIRECTION)


@pytest.mark.parametrize("form", FORMS)
def test_rules_see_the_mean_scores_of_captions_less_what_the_network_believes(form):
    z, dz = both()
    if form == "softmax":
        pairs = np.mean(contrastive.pair_scores(z, dz, MASK, MASK), axis=0)
    else:
        pairs = -np.asarray(dz)  # of the mean logit of a class
    expected = of_classes(pairs)
    log_probs, scores = map(np.asarray, rule_scores(form))
    present = np.array([True, True, True, False])
    probs = np.exp(log_probs)
    expected -= np.sum(probs * expected, 1, keepdims=True)
    np.testing.assert_allclose(scores[:6, present], expected[:6, present], atol=1e-5)
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)
    # What is absent is not believed in, and nothing is said against it or for it.
    assert (probs[:, ~present] < 1e-30).all()
    np.testing.assert_allclose(scores[:6, ~present], 0, atol=1e-6)


def test_class_probabilities_count_a_class_by_its_captions():
    z = jnp.zeros((2, 4))
    captions = captions_of(np.array([0, 0, 0, 1]), np.ones(4, bool), 2)
    losses = contrastive.softmax_losses(z, captions, np.ones(2, bool))
    probs = jnp.exp(contrastive.class_log_probs(-losses, captions))
    np.testing.assert_allclose(probs, [[0.75, 0.25]] * 2, atol=1e-6)


def test_scores_say_how_the_validation_loss_changes():
    size = len(VAL_CLASS)

    @jax.jit
    def val_loss(params):
        given = VAL_IMAGES, VAL_TEXTS, VAL_CLASS, np.ones(size, bool)
        return jnp.mean(class_losses(params, "softmax", *given)[np.arange(size), VAL_CLASS])

    @jax.jit
    def moved(by, step):
        return val_loss(jax.tree.map(lambda p, g: p - by * g, PARAMS, step))

    direction = jax.jit(jax.grad(val_loss))(PARAMS)
    for form in FORMS:
        losses = functools.partial(class_losses, form=form)
        scores = jax.jit(functools.partial(jax.jvp, losses))((PARAMS,), (direction,))[1]
        step_of = jax.jit(jax.grad(lambda p, i, c, losses=losses: losses(p)[i, c]))
        for row, label in ((0, 1), (2, 2), (4, 0)):
            step = step_of(PARAMS, row, label)
            rate = 1e-2 / float(jnp.sqrt(dot(step, step)))  # finite in f32
            change = (moved(rate, step) - moved(-rate, step)) / (2 * rate)
            np.testing.assert_allclose(-change, scores[row, label], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_identical_captions_have_identical_scores_and_padding_changes_nothing(form):
    z, dz = both()
    for scores in contrastive.pair_scores(z, dz, MASK, MASK):
        np.testing.assert_allclose(scores[:6, 0], scores[:6, 3], atol=1e-6)
    whole = class_losses(PARAMS, form)[:6]
    alone = class_losses(PARAMS, form, IMAGES[:6], TEXTS[:6], CLASS[:6], MASK[:6])
    other = np.where(MASK[:, None], IMAGES, 9.0), np.where(MASK[:, None], TEXTS, -7.0)
    np.testing.assert_allclose(whole, alone, atol=1e-6)
    np.testing.assert_allclose(whole, class_losses(PARAMS, form, *other)[:6], atol=1e-6)


def test_padding_alone_is_finite():
    def loss(params):
        none = np.zeros(SIZE, bool)
        return jnp.sum(class_losses(params, "softmax", mask=none))

    value, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS)
    assert value == 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"text_embeddings must share .* \(7, 3\).* \(6, 3\)"):
        contrastive.similarities(draw(7, 3), draw(6, 3), 1.0)
    with pytest.raises(ValueError, match=r"mask must have shape \[7\]"):
        captions_of(CLASS, MASK[:3], CLASSES)
    with pytest.raises(ValueError, match="logits and change must share"):
        contrastive.pair_scores(draw(3, 3), draw(3, 2))
