"""FLYP: fine-tunes two towers with their pretraining loss, on pairs of image and caption.

    image, class -> caption of the class, drawn by key -> pairs -> class scores -> (weights, labels)

Rules learn the weight and the classes of a pair as for any classifier: they see log-probabilities
of classes (`core.contrastive`).

Source: Goyal, Kumar, Garg, Kolter and Raghunathan, "Finetune Like You Pretrain", CVPR 2023; where
the paper is silent, the repository locuslab/FLYP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from saflex_jax import checks
from saflex_jax.core import contrastive, steps
from saflex_jax.core.losses import masked_mean
from saflex_jax.core.tree import identity
from saflex_jax.methods.base import MethodSpec, no_clean
from saflex_jax.models import MLP, TextTower, TwoTowers, unit
from saflex_jax.rules import AsGiven
from saflex_jax.types import Batch, Method, Model, Rule, RunInfo, Streams

LOSSES = ("contrastive", "sigmoid", "class_prompts")
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Text:
    """The text tower of `network`.

    Attributes:
      depth: blocks of a transformer over tokens (`models.TextTower`); 0 = captions are embeddings
        f32[E] from a locked encoder.
      projected: whether a trained linear map projects its features.
      vocab_size: number of tokens in the vocabulary.
      context: tokens per caption.
      width: width of the transformer's blocks.
      heads: attention heads per block.
      remat: recompute activations in the backward pass, to save memory.
      dtype: dtype of its computation, "float32" or "bfloat16".

    Raises:
      ValueError: another dtype, or a number out of range.
    """

    depth: int = 0
    projected: bool = True
    vocab_size: int = 49408
    context: int = 77
    width: int = 128
    heads: int = 2
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        checks.choice(("float32", "bfloat16"), dtype=self.dtype)
        checks.whole(depth=self.depth)
        sizes = ("vocab_size", "context", "width", "heads")
        checks.whole(1, **{name: getattr(self, name) for name in sizes})


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of FLYP.

    Attributes:
      loss: "contrastive", within the batch; "sigmoid", SigLIP's; "class_prompts": cross-entropy
        against one prompt of each of the K classes, FLYP's own ablation.
      parts: compute the embeddings in `parts` parts, and again for the gradient, so that the towers
        hold one part's activations. The gradient is the whole batch's (GradCache). For towers
        without batch statistics.
      embed_dim: E, width of the common space, of `network`.
      text: the text tower, of `network`.

    Raises:
      ValueError: an unknown loss, or a number out of range.
    """

    loss: str = "contrastive"
    parts: int = 1
    embed_dim: int = 128
    text: Text = Text()

    def __post_init__(self):
        checks.choice(LOSSES, loss=self.loss)
        checks.whole(1, parts=self.parts, embed_dim=self.embed_dim)


def network(backbone: nn.Module, num_classes: int, options: Options = Options()) -> nn.Module:
    """The backbone as image tower, with a text tower. (`TwoTowers.of` takes a `models.CLIP`.)"""
    del num_classes
    text = options.text
    tower = MLP(())  # embeddings as they are
    if text.depth:
        tower = TextTower(
            text.vocab_size, text.context, text.width, text.depth, text.heads, 4 * text.width,
            dtype=text.dtype, remat=text.remat,
        )  # fmt: skip
    projected = ("image", "text") if text.projected else ("image",)
    return TwoTowers(backbone, tower, options.embed_dim, projected, options.loss == "sigmoid")


def make(
    model: Model,
    tx: optax.GradientTransformation,
    options: Options = Options(),
    *,
    rule: Rule | None = None,
    run: RunInfo,
) -> Method:
    """Contrastive fine-tuning on the candidates, each with a caption of its class.

        L = mean_i w_i sum_c y_ic l_ic ,   w, y by the rule, l by `core.contrastive`

    At each visit a sample gets a random caption of its class, the largest entry of its prior label.
    All rows of one class are positives of each other. A row of weight zero is not learned but stays
    a negative for others. Predictions are zero-shot: cosines with the normalised mean embedding of
    each class's captions.

    For rules, the head is the projections, at "head". Except with "class_prompts", rows depend on
    each other, so a rule cannot score them in chunks.

    >>> from saflex_jax.models import SmallCNN, from_linen
    >>> captions = np.zeros((2, 1, 8), np.float32)  # one embedding of 8 numbers for each class
    >>> run = RunInfo(num_samples=1000, num_classes=2, captions=captions)
    >>> method = make(from_linen(network(SmallCNN(), 2)), optax.sgd(0.1), run=run)

    Args:
      model: of `network`, or of another `models.TwoTowers`.
      tx: optax transformation.
      options: see `Options`.
      rule: for weights and labels; None = as given.
      run: gives the classes and their captions.

    Raises:
      ValueError: no captions, or captions of other classes; clean samples (not supported); parts
        that do not divide a batch, or with batch statistics.
    """
    rule = AsGiven() if rule is None else rule
    table = _captions(run)

    def init(key, inputs):
        pair = {"image": inputs, "text": table[:1, 0]}
        params, model_state = model.init(key, pair)
        if options.parts > 1 and jax.tree.leaves(model_state):
            raise ValueError(
                "parts must be 1 where towers have statistics of the batch (BatchNorm), which "
                f"parts of it do not have; given {options.parts}"
            )
        return steps.init_state(key, params, model_state, tx, rule.init(params))

    def refine(state, streams, reduce):
        """(shown candidates, `_within_batch` or `_against_prompts`, what the rule makes)."""
        no_clean("flyp", streams.clean)
        key = steps.draws_key(state)
        if options.loss == "class_prompts":
            shown, read = streams, _against_prompts(_drawn(table, key), options)
        else:
            shown = Streams(*(None if s is None else _paired(s, table, key) for s in streams))
            read = _within_batch(run.num_classes, options, reduce)

        def logits_fn(params, inputs):
            def apply(part, key):
                del key
                return model.logits(params, state.model_state, part), state.model_state

            return read(apply, inputs, key)[0]

        learned = rule.apply(state.extra, state, logits_fn, shown, reduce=reduce)
        return shown.candidates, read, learned

    def step(state, streams, *, reduce=identity):
        candidates, read, (targets, extra, of_rule) = refine(state, streams, reduce)
        key, mask = steps.step_key(state, candidates.index), candidates.mask

        def loss_fn(params):
            apply = partial(model.train, params, state.model_state)
            _, by_class, model_state = read(apply, candidates.inputs, key)
            losses = targets.weights * jnp.sum(targets.labels * by_class, axis=-1)
            losses = jnp.where(mask, losses, 0.0)
            metrics = {"candidate_loss": steps.total(losses, mask, reduce)}
            return masked_mean(losses, mask, reduce=reduce), (model_state, metrics)

        state, metrics = steps.gradient_step(state, loss_fn, tx=tx, reduce=reduce)
        return state._replace(extra=extra), {**metrics, **of_rule}

    def predict(state, inputs):
        def embedded(part):
            return model.logits(state.params, state.model_state, part)

        image, classes = embedded({"image": inputs}), class_embeddings(embedded, table)
        return image["scale"] * jnp.matmul(image["image"], classes.T, precision=HIGHEST)

    return Method(
        init, step, predict, lambda state, streams: refine(state, streams, identity)[2][0]
    )


def class_embeddings(embedded: Callable, captions: np.ndarray) -> jax.Array:
    """The zero-shot head: the mean of a class's normalised embeddings, normalised; f32[K, E].

    Args:
      embedded: {"text": [K, ...]} -> {"text": f32[K, E], ...}, normalised.
      captions: [K, T, ...], T of each class; embedded one template at a time.
    """
    each = jax.lax.map(lambda text: embedded({"text": text})["text"], jnp.swapaxes(captions, 0, 1))
    return unit(jnp.mean(each, axis=0))


def _captions(run: RunInfo) -> np.ndarray:
    """run.captions, checked."""
    if run is None or run.captions is None:
        raise ValueError("flyp needs run.captions, those of each class; given None")
    captions = np.asarray(run.captions)
    if captions.ndim < 2 or captions.shape[0] != run.num_classes or not captions.shape[1]:
        raise ValueError(
            f"run.captions must have shape [{run.num_classes}, T, ...], one or more of each "
            f"class; given {list(captions.shape)}"
        )
    checks.finite(captions=captions)
    return captions


def _paired(batch: Batch, table: np.ndarray, key: jax.Array) -> Batch:
    """The batch as pairs: each row with one caption of its class, by its sample."""

    def draw(index):
        return jax.random.randint(jax.random.fold_in(key, index), (), 0, table.shape[1])

    classes = jnp.argmax(batch.labels, axis=-1)
    text = jnp.asarray(table)[classes, jax.vmap(draw)(batch.index)]
    pairs = {"image": batch.inputs, "text": text, "class": classes, "mask": batch.mask}
    # No numbers, but a shape: it tells a whole batch from a part of it, of which no row has the
    # logits that it has in the batch.
    whole = jnp.zeros((len(classes), len(classes), 0))
    return batch._replace(inputs=pairs | {"whole": whole})


def _drawn(table: np.ndarray, key: jax.Array) -> jax.Array:
    """One caption of each class, [K, ...], the same on every device."""
    which = jax.random.randint(key, (len(table),), 0, table.shape[1])
    return jnp.asarray(table)[jnp.arange(len(table)), which]


def _within_batch(num_classes: int, options: Options, reduce) -> Callable:
    """(apply, pairs, key) -> (class log-probabilities, class losses f32[b, K], model state)."""

    def read(apply, pairs, key):
        mask, whole = pairs["mask"], pairs["whole"]
        if whole.shape[0] != whole.shape[1]:
            raise ValueError(
                f"rows of a contrastive loss must be scored together (scoring.chunk = None); given "
                f"{whole.shape[0]} of {whole.shape[1]}"
            )
        given = {name: pairs[name] for name in ("image", "text")}
        out, model_state = _in_parts(apply, given, key, options.parts)
        logits = contrastive.similarities(
            out["image"], out["text"], out["scale"], out["bias"], reduce=reduce
        )
        captions = contrastive.captions_of(pairs["class"], mask, num_classes, reduce=reduce)
        if options.loss == "sigmoid":
            losses = contrastive.sigmoid_losses(logits, captions)
            evidence = jnp.matmul(logits, captions.mean, precision=HIGHEST)
        else:
            losses = contrastive.softmax_losses(logits, captions, mask, reduce=reduce)
            evidence = -losses
        return contrastive.class_log_probs(evidence, captions), losses, model_state

    return read


def _against_prompts(prompts: jax.Array, options: Options) -> Callable:
    """(apply, images, key) -> (class log-probabilities, class losses f32[b, K], model state)."""

    def read(apply, images, key):
        out, model_state = _in_parts(apply, {"image": images}, key, options.parts)
        text = apply({"text": prompts}, key)[0]["text"]
        log_probs = jax.nn.log_softmax(
            out["scale"] * jnp.matmul(out["image"], text.T, precision=HIGHEST)
        )
        return log_probs, -log_probs, model_state

    return read


def _in_parts(apply: Callable, inputs: dict, key: jax.Array, parts: int) -> tuple[dict, dict]:
    """`apply` of (inputs, key), one part after the other; of the gradient likewise.

    Each part has a key of its own, so that dropout differs between them.

    Source: Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup", 2021: embeddings first, the loss on all of them, then each part once more for
    its share of the gradient. That is what `jax.checkpoint` of a part in a loop differentiates to.
    """
    if parts == 1:
        return apply(inputs, key)
    size = len(jax.tree.leaves(inputs)[0])
    if size % parts:
        raise ValueError(f"parts must divide the batch of {size} rows (a device's); given {parts}")

    def split(x):  # every device has rows of every part
        return jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1)

    @jax.checkpoint
    def of_part(numbered):
        part, number = numbered
        return apply(part, jax.random.fold_in(key, number))[0]

    out = jax.lax.map(of_part, (jax.tree.map(split, inputs), jnp.arange(parts)))
    joined = {
        name: jnp.swapaxes(out[name], 0, 1).reshape(size, *out[name].shape[2:]) for name in inputs
    }
    return joined | {"scale": out["scale"][0], "bias": out["bias"][0]}, {}


SPEC = MethodSpec(make, takes=("options", "rule", "run"), options=Options(), network=network)
