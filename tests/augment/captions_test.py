"""Captions of others: how often, of whom, and that all else stays."""

import jax
import numpy as np
import pytest

from saflex_jax import Batch
from saflex_jax.augment import parse, swapped_classes, wrong_captions

SIZE, CLASSES, REAL = 1000, 5, 900
_rng = np.random.default_rng(0)
LABELS = np.eye(CLASSES, dtype=np.float32)[_rng.choice(CLASSES, SIZE, p=[0.6, 0.1, 0.1, 0.1, 0.1])]
LABELS[REAL:] = 0.2  # of padding, and never another row's
BATCH = Batch(
    _rng.normal(size=(SIZE, 2)), LABELS, np.arange(SIZE) < REAL, np.arange(SIZE, dtype=np.int32)
)


def drawn(augment):
    made = jax.device_get(augment(jax.random.key(3), BATCH))
    for name in ("inputs", "mask", "index"):
        np.testing.assert_array_equal(getattr(made, name), getattr(BATCH, name))
    return made.labels[:REAL].argmax(1), made.trace.magnitude[:REAL, 0], made


def test_wrong_captions_are_those_of_other_rows():
    classes, was_drawn, made = drawn(wrong_captions(0.4))
    assert abs(was_drawn.mean() - 0.4) < 0.05
    same = LABELS[:REAL].argmax(1) == classes
    assert same[was_drawn == 0].all()
    shares = np.bincount(classes[was_drawn == 1], minlength=CLASSES) / was_drawn.sum()
    np.testing.assert_allclose(shares, LABELS[:REAL].mean(0), atol=0.07)
    assert (made.labels[:REAL].max(1) == 1).all()


def test_swapped_classes_are_all_alike_and_never_the_own():
    classes, moved, _ = drawn(swapped_classes(0.4))
    own = LABELS[:REAL].argmax(1)
    np.testing.assert_array_equal((own + moved.astype(int)) % CLASSES, classes)
    assert abs((moved > 0).mean() - 0.4) < 0.05
    shares = np.bincount(moved.astype(int), minlength=CLASSES)[1:] / (moved > 0).sum()
    np.testing.assert_allclose(shares, 1 / (CLASSES - 1), atol=0.07)


def test_they_have_a_text_and_limits():
    classes, *_ = drawn(parse("swapped_classes(0.0) | wrong_captions(0)"))
    np.testing.assert_array_equal(classes, LABELS[:REAL].argmax(1))
    for make in (wrong_captions, swapped_classes):
        with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\]; given 1.5"):
            make(1.5)
