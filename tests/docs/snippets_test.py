"""The Python blocks of pages for newcomers run; other pages have tests of their own."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import saflex_jax
import saflex_jax.audit
from saflex_jax import Batch
from tests.plugin_test import bare, blobs

DOCS = pathlib.Path(__file__).parents[2] / "docs"
QUICK = saflex_jax.audit.Head(
    widths=(), steps=60, batch_size=32, learning_rate=0.1, weight_decay=0.1
)


def run(page: str, scope: dict) -> dict:
    """What the page's blocks define, given these names."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, scope)
    return scope


def test_getting_started():
    apply_fn, params = bare()
    (x, y), (x_val, y_val) = blobs(40, 0, wrong=0.3), blobs(12, 1)
    scope = dict(saflex_jax=saflex_jax, apply_fn=apply_fn, params=params, x=x, y=y, x_val=x_val,
                 y_val=y_val, logits=apply_fn(params, x))  # fmt: skip
    assert np.isfinite(run("getting_started.md", scope)["loss"])


@pytest.fixture
def noisy():
    """Two classes that features tell; of 160 labels 16 are wrong, 40 are trusted."""
    rng = np.random.default_rng(0)
    right = rng.integers(2, size=200)
    features = (rng.normal(size=(200, 4)) + 6 * right[:, None]).astype(np.float32)
    labels = np.where(np.arange(200) < 16, 1 - right, right)
    return dict(features=features, labels=labels, trusted=np.arange(200) >= 160, num_classes=2)


def test_noisy_labels(noisy, monkeypatch):
    audit = saflex_jax.audit.audit

    def sure(*arrays, **options):
        found = audit(*arrays, head=QUICK, **options)
        return dataclasses.replace(found, evidence=9.0)  # of heads that are this quick it is not

    monkeypatch.setattr(saflex_jax.audit, "audit", sure)
    scope = run("noisy_labels.md", noisy | {"classifier": LogisticRegression()})
    np.testing.assert_array_equal(np.flatnonzero(scope["found"].wrong), np.arange(16))
    right = np.where(np.arange(200) < 16, 1 - noisy["labels"], noisy["labels"])
    assert scope["keep"].all() and scope["classifier"].score(noisy["features"], right) == 1
    rows, labels = np.arange(8), np.eye(2, dtype=np.float32)[noisy["labels"][:8]]
    batch = Batch(noisy["features"][:8], labels, rows >= 0, rows)
    assert scope["state"].extra.rule.rule.agreement == np.float32(scope["found"].noise_rate)
    state = scope["method"].init(jax.random.key(0), batch.inputs)
    assert scope["method"].predict(state, batch.inputs).shape == (8, 2)
