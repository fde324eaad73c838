"""Contrastive losses: the images and captions of a batch as two classifiers.

    z_ik = scale <x_i, t_k> ,   p_ik = softmax_k(z)_ik ,   r_ik = softmax_i(z)_ik

p says which caption belongs to an image, r which image belongs to a caption. All captions of one
class are right answers to an image of that class, so an image is learned as a label on classes:

    l_ic = mean over captions k of class c of -(log p_ik + log r_ik) / 2
    L = mean_i w_i sum_c y_ic l_ic

L is linear in y and w. Its scores are S_ic = <v, grad l_ic>, of one forward-mode product over both
towers: rules get them through `class_log_probs`. With dz, the derivative of z along v,
`pair_scores` and `sigmoid_scores` are those of each pair in closed form, for loops of your own.
With one caption per class and hard labels, L is CLIP's loss, except that other captions of the same
class are not negatives.

Shapes: B rows on all devices, b of them on this one (b = B under jit), K classes, E numbers per
embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.tree import gather, identity
from saflex_jax.types import Reduce

# Logit of what is no answer. Finite: of a device that has padding alone, -inf would make NaN.
NEVER = -1e30
ABSENT = -80.0  # log-probability of a class without a caption in the batch; exp of it is a f32


class Captions(NamedTuple):
    """The captions of all devices' rows, by class.

    >>> captions = captions_of(jnp.array([0, 0, 1]), jnp.ones(3, bool), num_classes=2)
    >>> captions.mean.tolist()
    [[0.5, 0.0], [0.5, 0.0], [0.0, 1.0]]

    Attributes:
      mean: f32[B, K], 1 / n_c where caption k is of class c, else 0. x @ mean is the mean of
        x f32[b, B] over the captions of a class; 0 for a class without captions.
      number: f32[K], n, captions of each class in this batch.
      mask: bool[B], False on padding.
    """

    mean: jax.Array
    number: jax.Array
    mask: jax.Array


def captions_of(
    classes: jax.Array, mask: jax.Array, num_classes: int, *, reduce: Reduce = identity
) -> Captions:
    """Groups the captions of all devices by class.

    >>> captions_of(jnp.array([0, 2, 0]), jnp.ones(3, bool), num_classes=3).number.tolist()
    [2.0, 0.0, 1.0]

    Args:
      classes: i32[b], of this device's captions.
      mask: bool[b].
      num_classes: K.
      reduce: mean over the data-parallel axis.

    Raises:
      ValueError: lengths disagree.
    """
    checks.rows(len(classes), mask=mask)
    classes, mask = gather((classes, mask), reduce)
    member = jax.nn.one_hot(classes, num_classes) * mask[:, None]
    number = jnp.sum(member, axis=0)
    return Captions(member / jnp.maximum(number, 1)[None], number, mask)


def similarities(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: jax.Array | float = 0.0,
    *,
    reduce: Reduce = identity,
) -> jax.Array:
    """Logits of this device's images with the captions of all devices, f32[b, B].

        z_ik = scale <x_i, t_k> + bias

    >>> similarities(jnp.eye(2), jnp.eye(2)[::-1], scale=jnp.array(2.0)).tolist()
    [[0.0, 2.0], [2.0, 0.0]]

    Args:
      image: x, f32[b, E], normalised.
      text: t, f32[b, E], normalised.
      scale: f32[], inverse temperature.
      bias: f32[], SigLIP's; 0 for CLIP.
      reduce: mean over the data-parallel axis. Embeddings are gathered with their gradients.

    Raises:
      ValueError: the shapes of image and text disagree.
    """
    checks.same_shape(image_embeddings=image, text_embeddings=text)
    product = jnp.matmul(image, gather(text, reduce).T, precision=jax.lax.Precision.HIGHEST)
    return scale * product + bias


def softmax_losses(
    logits: jax.Array, captions: Captions, mask: jax.Array, *, reduce: Reduce = identity
) -> jax.Array:
    """CLIP's loss of every image if its class were c, f32[b, K], nats; 0 for absent classes.

        l_ic = mean_(k in c) (log sum_j e^z_ij + log sum_j e^z_jk) / 2 - z_ik

    >>> captions = captions_of(jnp.array([0, 1]), jnp.ones(2, bool), num_classes=3)
    >>> losses = softmax_losses(jnp.zeros((2, 2)), captions, jnp.ones(2, bool))
    >>> [round(float(x), 3) for x in losses[0]]  # log 2; the third class has no caption
    [0.693, 0.693, 0.0]

    Args:
      logits: z, f32[b, B].
      captions: of all devices.
      mask: bool[b]; False rows are no negatives.
      reduce: mean over the data-parallel axis.

    Source: Radford et al. (CLIP), ICML 2021; several positives: Khosla et al., "Supervised
    Contrastive Learning", NeurIPS 2020, equation 2.
    """
    rows, columns = _normalisers(logits, captions.mask, mask, reduce)
    pairs = (rows[:, None] + columns[None]) / 2 - logits
    return jnp.matmul(pairs, captions.mean, precision=jax.lax.Precision.HIGHEST)


def _normalisers(logits, of_captions, of_images, reduce):
    """(log sum_j e^z_ij f32[b], log sum_j e^z_jk f32[B] over the images of all devices)."""
    rows = jax.nn.logsumexp(jnp.where(of_captions[None], logits, NEVER), axis=1)
    here = jax.nn.logsumexp(jnp.where(of_images[:, None], logits, NEVER), axis=0)
    return rows, jax.nn.logsumexp(gather(here[None], reduce), axis=0)


def sigmoid_losses(logits: jax.Array, captions: Captions) -> jax.Array:
    """SigLIP's loss of every image if its class were c, f32[b, K], nats.

        l_ic = sum_k softplus(z_ik) - sum_(k in c) z_ik

    Each pair is a binary question: do the two belong together? Without a normaliser, only captions
    are gathered. A class without captions has the first sum only.

    >>> captions = captions_of(jnp.array([0, 1]), jnp.ones(2, bool), num_classes=2)
    >>> [round(float(x), 3) for x in sigmoid_losses(jnp.zeros((1, 2)), captions)[0]]  # 2 log 2
    [1.386, 1.386]

    Args:
      logits: z, f32[b, B], with the bias.
      captions: of all devices.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023.
    """
    everyone = jnp.sum(jnp.where(captions.mask[None], jax.nn.softplus(logits), 0.0), axis=1)
    positive = jnp.matmul(logits, captions.mean, precision=jax.lax.Precision.HIGHEST)
    return everyone[:, None] - positive * captions.number[None]


def class_log_probs(evidence: jax.Array, captions: Captions) -> jax.Array:
    """Class log-probabilities of a batch of pairs, f32[b, K]: what rules see.

        log p_ic = e_ic + log n_c - log sum_c' n_c' e^e_ic' ,   e = -`softmax_losses`

    -l averages two estimates of log P(c | image): by the row and, with Bayes' rule, by the column.
    A rule's scores are S_ic - sum_c' p_ic' S_ic', so that sum_c p_ic S_ic = 0, as for every
    softmax: a score of zero means "as good as the network's own label". A class without a caption
    in the batch has probability and score zero. Its label then comes from the prior and from
    earlier visits.

    >>> captions = captions_of(jnp.array([0, 0, 1]), jnp.ones(3, bool), num_classes=3)
    >>> log_probs = class_log_probs(jnp.zeros((1, 3)), captions)
    >>> [round(float(p), 3) for p in jnp.exp(log_probs)[0]]
    [0.667, 0.333, 0.0]

    Args:
      evidence: e, f32[b, K]; for the sigmoid loss the mean logit of a class's captions.
      captions: of all devices.
    """
    present = captions.number > 0
    weighted = evidence + jnp.log(jnp.maximum(captions.number, 1))[None]
    log_probs = jax.nn.log_softmax(jnp.where(present[None], weighted, NEVER))
    # Not the value of an absent class itself: it would get the mean of the others as its score.
    return jnp.where(present[None], log_probs, ABSENT)


def pair_scores(
    logits: jax.Array,
    change: jax.Array,
    captions: jax.Array | None = None,
    images: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """How much a step on each pair would lower the validation loss, f32[B, B] by rows and columns.

        rows:     <v, grad -log p_ik> = sum_j p_ij dz_ij - dz_ik
        columns:  <v, grad -log r_ik> = sum_j r_jk dz_jk - dz_ik

    Identical captions have identical columns in both. The score of class c for image i is the mean
    of both, averaged over the captions of c: the linear form of `softmax_losses`.

    >>> z, dz = jnp.zeros((2, 2)), jnp.array([[1.0, 0.0], [0.0, 0.0]])
    >>> rows, columns = pair_scores(z, dz)  # along v the first pair moves together
    >>> rows.tolist(), columns.tolist()
    ([[-0.5, 0.5], [0.0, 0.0]], [[-0.5, 0.0], [0.5, 0.0]])

    Args:
      logits: z, f32[B, B], of all rows (under jit).
      change: dz, the derivative of z along v, by one `jax.jvp`.
      captions, images: bool[B], False on padding; None = all count.

    Raises:
      ValueError: shapes disagree.
    """
    checks.same_shape(logits=logits, change=change)
    size, others = logits.shape
    captions = jnp.ones(others, bool) if captions is None else captions
    images = jnp.ones(size, bool) if images is None else images
    p = jax.nn.softmax(jnp.where(captions[None], logits, NEVER), axis=1)
    r = jax.nn.softmax(jnp.where(images[:, None], logits, NEVER), axis=0)
    rows = jnp.sum(p * change, axis=1, keepdims=True) - change
    return rows, jnp.sum(r * change, axis=0, keepdims=True) - change


def sigmoid_scores(logits: jax.Array, change: jax.Array) -> jax.Array:
    """Scores f32[B, B, 2] of the two answers to each pair, apart (0) and together (1).

        S_ika = (sigmoid(z_ik) - a) dz_ik

    >>> sigmoid_scores(jnp.zeros((1, 1)), jnp.full((1, 1), 2.0)).tolist()
    [[[1.0, -1.0]]]

    Args:
      logits: z, f32[B, B], with the bias.
      change: dz, the derivative of z along v.

    Raises:
      ValueError: shapes disagree.
    """
    checks.same_shape(logits=logits, change=change)
    p = jax.nn.sigmoid(logits)
    return jnp.stack([p, p - 1], axis=-1) * change[..., None]
