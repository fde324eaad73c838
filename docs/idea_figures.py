"""Draws the figures of docs/idea.md: python docs/idea_figures.py (some seconds, no files needed).

A perceptron on scikit-learn's digits, 40 % of the training labels wrong at random, 200 trusted
samples, after 150 steps on the labels as they are; seed 0.
"""

from __future__ import annotations

import pathlib
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import saflex_jax  # noqa: E402
from experiments import style  # noqa: E402
from saflex_jax import data  # noqa: E402

TRUSTED, NOISE, STEPS, BATCH, SEED = 200, 0.4, 150, 128, 0
SHOWN = 6  # samples of each kind


class Found(NamedTuple):
    """Training samples and what one scoring says of them."""

    images: np.ndarray
    given: np.ndarray
    right: np.ndarray
    scores: np.ndarray
    targets: saflex_jax.Targets


class Network(nn.Module):
    """64 pixels -> 64 features -> 10 logits."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, name="head")(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


def find() -> Found:
    """Trains for a moment and scores every sample with every label."""
    source = data.digits()
    rows = data.stratified_split(source.labels, val=TRUSTED, test=500, seed=SEED)
    images = np.asarray(source.inputs, np.float32)
    images = images / images.max()
    right = source.labels[rows.train]
    given = data.symmetric_noise(right, 10, share=NOISE, seed=SEED)
    x, y = images[rows.train], np.eye(10, dtype=np.float32)[given]
    x_val = images[rows.val]
    y_val = np.eye(10, dtype=np.float32)[source.labels[rows.val]]

    network, tx = Network(), optax.adam(3e-3)

    def apply_fn(params, inputs):
        return network.apply({"params": params}, inputs)

    @jax.jit
    def step(params, opt_state, batch):
        def loss(params):
            return optax.softmax_cross_entropy(apply_fn(params, x[batch]), y[batch]).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    x, y = jnp.asarray(x), jnp.asarray(y)
    params = network.init(jax.random.key(SEED), x[:1])["params"]
    opt_state, rng = tx.init(params), np.random.default_rng(SEED)
    for _ in range(STEPS):
        params, opt_state = step(params, opt_state, rng.integers(len(x), size=BATCH))
    scored = saflex_jax.score(
        apply_fn, params, x, x_val, y_val,
        predicate=saflex_jax.under("head"), solve=saflex_jax.cg_solve(),
    )  # fmt: skip
    part = TRUSTED / (TRUSTED + 65)  # of a Newton step, see docs/own_loop.md
    belief = jax.nn.softmax(scored.log_probs + part * scored.scores)
    targets = saflex_jax.posterior_targets(y, belief, NOISE)
    return Found(np.asarray(x), given, right, np.asarray(scored.scores), targets)


@style.look()
def one_sample(found: Found) -> Figure:
    """A sample with a wrong label: its scores, and what it is trained on."""
    labels = np.asarray(found.targets.labels)
    confident = labels.max(1) * (labels.argmax(1) == found.right) * (found.given != found.right)
    sample = int(confident.argmax())
    figure = style.figure(2.3, "One sample of the pipeline, and what a step on each label would do")
    shown, scores, learned = figure.subplots(1, 3, width_ratios=(0.8, 1.6, 1.6))
    shown.imshow(found.images[sample].reshape(8, 8), cmap=style.PRINTED)
    shown.set_axis_off()
    shown.set_title(f"labelled {found.given[sample]}")
    colours = np.full(10, style.OTHER, object)
    colours[found.given[sample]], colours[found.right[sample]] = style.WRONG, style.RIGHT
    scores.bar(range(10), found.scores[sample], color=colours)
    scores.axhline(0, color=style.INK, lw=0.8)
    scores.set_title("score: > 0 helps on trusted samples")
    learned.bar(range(10), labels[sample], color=colours)
    learned.set_title("learned label")
    for axis in (scores, learned):
        axis.set(xticks=range(10), xlabel="label")
    names = {"the given label, wrong": style.WRONG, "the right label": style.RIGHT}
    style.key(figure, {name: dict(marker="s", ls="", color=c) for name, c in names.items()})
    return figure


@style.look()
def many_samples(found: Found) -> Figure:
    """Samples with right and wrong labels, and the weights of all."""
    weights, wrong = np.asarray(found.targets.weights), found.given != found.right
    figure = style.figure(2.6, "Weights: wrong labels count little")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    axes = left.subplots(2, SHOWN)
    for row, (kind, colour) in zip(axes, ((~wrong, style.RIGHT), (wrong, style.WRONG))):
        for axis, sample in zip(row, np.flatnonzero(kind)[:SHOWN]):
            axis.imshow(found.images[sample].reshape(8, 8), cmap=style.PRINTED)
            axis.set_axis_off()
            axis.set_title(f"{found.given[sample]}\n{weights[sample]:.2f}", color=colour,
                           loc="center", fontsize=style.SMALL)  # fmt: skip
    axis = right.subplots()
    axis.hist(
        [weights[~wrong], weights[wrong]], bins=12, color=[style.RIGHT, style.WRONG], stacked=True
    )
    axis.set(xlabel="weight, mean 1", ylabel="training samples")
    names = {"right label": style.RIGHT, "wrong label": style.WRONG}
    style.key(figure, {name: dict(marker="s", ls="", color=c) for name, c in names.items()})
    return figure


def main() -> None:
    """Writes the figures beside this file."""
    found = find()
    style.save(one_sample(found), HERE / "idea_score.png")
    style.save(many_samples(found), HERE / "idea_weights.png")


if __name__ == "__main__":
    main()
