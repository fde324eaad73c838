"""CLIP and SigLIP: an image tower and a text tower that embed into one space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from saflex_jax import checks
from saflex_jax.models.norm import LayerNorm, spread
from saflex_jax.models.vit import Block
from saflex_jax.types import PyTree

# Of the colours that a family was trained on.
MEAN = {"clip": (0.48145466, 0.4578275, 0.40821073), "siglip": (0.5, 0.5, 0.5)}
DEVIATION = {"clip": (0.26862954, 0.26130258, 0.27577711), "siglip": (0.5, 0.5, 0.5)}
EPSILON = {"clip": 1e-5, "siglip": 1e-6}  # of the normalisations
FAMILIES = tuple(EPSILON)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), the activation of OpenAI's weights.

    >>> quick_gelu(jnp.zeros(1)).tolist()
    [0.0]
    """
    return x * nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), Phi the normal distribution's."""
    return nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_tanh": nn.gelu}


def clip_inputs(images: jax.Array, family: str = "clip") -> jax.Array:
    """Images normalised as the family's image tower expects; `ImageTower` does this itself.

        x <- (x - m_c) / s_c ,   m and s of the family's training colours

    >>> clip_inputs(jnp.full((1, 8, 8, 3), 0.75), "siglip")[0, 0, 0].tolist()
    [0.5, 0.5, 0.5]

    Args:
      images: f[B, H, W, 3] in [0, 1].
      family: "clip" or "siglip".

    Raises:
      ValueError: another family, or inputs that are not images of three colours.
    """
    checks.choice(FAMILIES, family=family)
    checks.images(images=images)
    if images.shape[-1] != 3:
        raise ValueError(f"images must have 3 channels; given {images.shape[-1]}")
    mean, deviation = (np.array(of[family], images.dtype) for of in (MEAN, DEVIATION))
    shape = (1, 1, 1, 3)
    return (images - mean.reshape(shape)) / deviation.reshape(shape)


def _blocks(tower: nn.Module, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Tokens f[B, T, D] after the tower's blocks, which become its modules."""
    make = nn.remat(Block) if tower.remat else Block
    for number in range(tower.depth):
        block = make(
            tower.heads,
            tower.mlp_width,
            ACTIVATIONS[tower.activation],
            epsilon=EPSILON[tower.family],
            dtype=tower.dtype,
            name=f"block_{number}",
        )
        x = block(x, mask=mask)
    return x


def _check_tower(tower: nn.Module) -> None:
    checks.choice(FAMILIES, family=tower.family)
    checks.choice(ACTIVATIONS, activation=tower.activation)
    sizes = ("width", "depth", "heads", "mlp_width")
    checks.whole(1, **{name: getattr(tower, name) for name in sizes})


def _add(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Tokens f[B, T, D] plus f[T, D], in the tokens' dtype."""
    return x + spread(positions.astype(x.dtype), x.shape, 1, 2)


class AttentionPool(nn.Module):
    """One learned token attends to all of f[B, T, D], then a perceptron: f32[B, D].

        a = attention(probe, x),   features = a + mlp(norm(a))

    Source: Zhai et al., "Scaling Vision Transformers", CVPR 2022 (its "MAP head").
    """

    heads: int
    mlp_width: int
    activation: str
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        probe = spread(probe[0, 0], (len(x), 1, width), 2)
        attention = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="attention")
        x = attention(probe, x)[:, 0]
        hidden = LayerNorm(EPSILON["siglip"], name="norm")(x)
        hidden = nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(hidden)
        hidden = ACTIVATIONS[self.activation](hidden)
        return (x + nn.Dense(width, dtype=self.dtype, name="mlp_out")(hidden)).astype(jnp.float32)


class ImageTower(nn.Module):
    """Vision transformer of CLIP, by default B/32: images f[B, size, size, 3] -> f32[B, width].

    Images are in [0, 1] and normalised inside (`clip_inputs`). CLIP has a class token, whose
    features are returned, and a normalisation before the first block; SigLIP has neither and ends
    with `AttentionPool`. Without dropout, training and evaluation mode are the same. The blocks are
    initialised as in `ViT`.

    >>> tower = ImageTower(size=8, patch=4, width=64, depth=1, heads=1, mlp_width=64)
    >>> x = jnp.zeros((2, 8, 8, 3))
    >>> jax.eval_shape(lambda: tower.init_with_output(jax.random.key(0), x, train=False)[0]).shape
    (2, 64)

    Attributes:
      size: side of the images in pixels; a multiple of patch.
      patch: side of a patch in pixels.
      width: D, of a token; a multiple of heads.
      depth: number of blocks.
      heads: of each attention; width / 64 in the published weights up to L/14.
      mlp_width: hidden width of each block's perceptron.
      activation: "quick_gelu" (OpenAI's weights), "gelu" (most of OpenCLIP's) or "gelu_tanh"
        (SigLIP's).
      family: "clip" or "siglip".
      dtype: of the computation ("bfloat16"); None = f32. Parameters, normalisations and features
        are f32.
      remat: whether to recompute blocks for the gradient, to save memory.

    Raises:
      ValueError: an unknown name; images of another size or, outside of jit, out of [0, 1].

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", ICML 2021; Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023.
    """

    size: int = 224
    patch: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    family: str = "clip"
    dtype: DTypeLike | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        _check_tower(self)
        check_images(images, self)
        is_clip, epsilon = self.family == "clip", EPSILON[self.family]
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, side, padding="VALID", use_bias=not is_clip,
                    dtype=self.dtype, name="patches")(clip_inputs(images, self.family))  # fmt: skip
        x = x.reshape(len(x), -1, self.width)
        if is_clip:
            init = nn.initializers.normal(self.width**-0.5)
            first = self.param("class", init, (self.width,)).astype(x.dtype)
            first = spread(first, (len(x), 1, self.width), 2)
            x = jnp.concatenate([first, x], axis=1)
        x = _add(x, self.param("positions", nn.initializers.normal(0.02), x.shape[1:]))
        if is_clip:
            x = LayerNorm(epsilon, name="first_norm")(x).astype(x.dtype)
            return LayerNorm(epsilon, name="last_norm")(_blocks(self, x)[:, 0])
        x = LayerNorm(epsilon, name="last_norm")(_blocks(self, x))
        options = self.heads, self.mlp_width, self.activation, self.dtype
        pool = AttentionPool(*options, name="pool")
        return pool(x)


class TextTower(nn.Module):
    """Text transformer of CLIP, by default B/32's: tokens i32[B, T], T <= context -> f32[B, width].

    CLIP returns the features of the first token with the largest number, which ends the caption;
    attention is causal, so later tokens do not matter. SigLIP attends to all tokens and returns the
    last one's features, with T = context.

    >>> tower = TextTower(vocab_size=9, context=4, width=64, depth=1, heads=1, mlp_width=64)
    >>> tokens = jnp.array([[1, 8, 0, 0]])
    >>> jax.eval_shape(lambda: tower.init_with_output(jax.random.key(0), tokens, train=False)[0])
    ShapeDtypeStruct(shape=(1, 64), dtype=float32)

    Attributes:
      vocab_size: V; V - 1 is the token that ends a caption.
      context: most tokens of a caption.
      width, depth, heads, mlp_width, activation, family, dtype, remat: see `ImageTower`.

    Raises:
      ValueError: an unknown name; tokens that are not integers [B, T], or too many; outside of jit
        also tokens beyond the vocabulary, and captions without an end token.

    Source: as `ImageTower`.
    """

    vocab_size: int = 49408
    context: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_width: int = 2048
    activation: str = "quick_gelu"
    family: str = "clip"
    dtype: DTypeLike | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        _check_tower(self)
        check_tokens(tokens, self)
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(
            self.vocab_size, self.width, self.dtype, embedding_init=init, name="tokens"
        )
        positions = self.param(
            "positions", nn.initializers.normal(0.01), (self.context, self.width)
        )
        length = tokens.shape[1]
        x = _add(embed(tokens), positions[:length])
        if self.family == "clip":
            x = _blocks(self, x, np.tri(length, dtype=bool)[None, None])
            x = x[jnp.arange(len(x)), jnp.argmax(tokens, axis=1)]
        else:
            x = _blocks(self, x)[:, -1]
        return LayerNorm(EPSILON[self.family], name="last_norm")(x)


class Projections(nn.Module):
    """Linear maps of features into the common space, by the tower's name; f32."""

    width: int
    use_bias: bool

    @nn.compact
    def __call__(self, features: jax.Array, tower: str) -> jax.Array:
        return nn.Dense(self.width, self.use_bias, name=tower)(features.astype(jnp.float32))


class CLIP(nn.Module):
    """Two towers and their projections into one space, where cosines compare images and captions.

        z_ij = exp(s) <x_i, t_j> (+ b) ,   x and t normalised embeddings

    A tower is any module with __call__(inputs, *, train) -> features f[B, D]: `ImageTower` and
    `TextTower`, a ResNet, or an `MLP` on precomputed features. Parameters are at "image", "text",
    "head/image", "head/text" and "logit_scale" (and "logit_bias").

    >>> from saflex_jax.models import MLP
    >>> clip = CLIP(MLP((8,)), MLP((8,)), embed_dim=4)
    >>> inputs = jnp.ones((2, 3)), jnp.ones((5, 6))
    >>> (images, texts, scale), variables = clip.init_with_output(jax.random.key(0), *inputs)
    >>> images.shape, texts.shape, round(float(scale), 2), sorted(variables["params"]["head"])
    ((2, 4), (5, 4), 14.29, ['image', 'text'])

    Attributes:
      image: tower of the images.
      text: tower of the captions.
      embed_dim: E, width of the common space.
      projected: towers with a projection; other towers' features are the embeddings.
      sigmoid: as in SigLIP: a parameter "logit_bias", b; projections with biases; an initial scale
        of 10.

    Raises:
      ValueError: an unknown tower; a tower without projection whose features do not have width E.

    Source: as `ImageTower`.
    """

    image: nn.Module
    text: nn.Module
    embed_dim: int
    projected: Sequence[str] = ("image", "text")
    sigmoid: bool = False

    def setup(self):
        checks.whole(1, embed_dim=self.embed_dim)
        checks.known("projected", self.projected, ("image", "text"))
        self.head = Projections(self.embed_dim, use_bias=self.sigmoid)
        scale = math.log(10.0 if self.sigmoid else 1 / 0.07)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(scale), ())
        if self.sigmoid:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), ())

    def encode_image(self, images: PyTree, *, train: bool = False) -> jax.Array:
        """Embeddings f32[B, E] of images, not normalised.

        Args:
          images: the image tower's inputs.
          train: mode of the tower.
        """
        return self._embedded("image", self.image(images, train=train))

    def encode_text(self, tokens: PyTree, *, train: bool = False) -> jax.Array:
        """Embeddings f32[B, E] of captions, not normalised.

        Args:
          tokens: the text tower's inputs.
          train: mode of the tower.
        """
        return self._embedded("text", self.text(tokens, train=train))

    def _embedded(self, tower: str, features: jax.Array) -> jax.Array:
        if tower in self.projected:
            return self.head(features, tower)
        if features.shape[-1] != self.embed_dim:
            raise ValueError(
                f"embed_dim must be {features.shape[-1]}, the width of {tower!r}, which is not "
                f"projected; given {self.embed_dim}"
            )
        return features.astype(jnp.float32)

    def __call__(
        self, images: PyTree, tokens: PyTree, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(normalised image embeddings f32[B, E], text embeddings f32[B', E], exp(logit_scale))."""
        image = unit(self.encode_image(images, train=train))
        text = unit(self.encode_text(tokens, train=train))
        return image, text, jnp.exp(self.logit_scale)


def unit(x: jax.Array) -> jax.Array:
    """Rows divided by their Euclidean norm; a row of zeros stays.

    >>> unit(jnp.array([[0.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.0, 1.0], [0.0, 0.0]]

    Args:
      x: f[B, E].
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


# --- what towers accept


def check_images(images: jax.Array, tower: ImageTower) -> None:
    """Raises ValueError unless the tower takes these images; checks values outside of jit.

    >>> check_images(np.zeros((1, 32, 32, 3), np.float32), ImageTower())
    Traceback (most recent call last):
        ...
    ValueError: images must have shape [B, 224, 224, 3]; resize them first; given [1, 32, 32, 3]

    Args:
      images: f[B, H, W, 3] in [0, 1].
      tower: that will take them.
    """
    checks.whole(1, size=tower.size, patch=tower.patch)
    if tower.size % tower.patch:
        raise ValueError(f"size must be a multiple of patch = {tower.patch}; given {tower.size}")
    checks.images(images=images)
    shape = [tower.size, tower.size, 3]
    if list(images.shape[1:]) != shape:
        wanted = f"[B, {str(shape)[1:]}"
        raise ValueError(
            f"images must have shape {wanted}; resize them first; given {list(images.shape)}"
        )
    if checks.concrete(images) and images.size:
        values = np.asarray(images)  # not by JAX: inside of jit that would be traced
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"images must lie in [0, 1], as they are before any normalisation; given values "
                f"from {low:.4g} to {high:.4g}"
            )


def check_tokens(tokens: jax.Array, tower: TextTower) -> None:
    """Raises ValueError unless the tower takes these tokens; checks values outside of jit.

    >>> check_tokens(np.array([[1, 9]]), TextTower(vocab_size=9))
    Traceback (most recent call last):
        ...
    ValueError: tokens must lie in [0, 9), the vocabulary; row 0 has 9

    Args:
      tokens: i32[B, T].
      tower: that will take them.
    """
    checks.whole(1, vocab_size=tower.vocab_size, context=tower.context)
    if np.ndim(tokens) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers [B, T]; given {tokens.dtype}{list(np.shape(tokens))}"
        )
    longest = tokens.shape[1]
    if not (1 <= longest <= tower.context and (tower.family == "clip" or longest == tower.context)):
        accepted = f"1 to {tower.context}" if tower.family == "clip" else str(tower.context)
        raise ValueError(f"tokens must have {accepted} columns, the context; given {longest}")
    if not checks.concrete(tokens):
        return
    a = np.asarray(tokens)
    bad = (a < 0) | (a >= tower.vocab_size)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"tokens must lie in [0, {tower.vocab_size}), the vocabulary; row {row} has "
            f"{a[row, column]}"
        )
    without = ~(a == tower.vocab_size - 1).any(1)
    if tower.family == "clip" and without.any():
        raise ValueError(
            f"each row of tokens must hold {tower.vocab_size - 1}, which ends a caption; row "
            f"{int(np.flatnonzero(without)[0])} does not"
        )


# --- the published sizes


def _sizes(embed_dim, size, patch, width, depth, text_width, text_depth, **text):
    image = dict(size=size, patch=patch, width=width, depth=depth,
                 heads=width // 64, mlp_width=4 * width)  # fmt: skip
    text |= dict(width=text_width, depth=text_depth,
                 heads=text_width // 64, mlp_width=4 * text_width)  # fmt: skip
    return embed_dim, image, text


CLIPS = {
    "tiny": _sizes(64, 64, 8, 128, 2, 128, 2, vocab_size=2048, context=16),
    "B/32": _sizes(512, 224, 32, 768, 12, 512, 12),
    "B/16": _sizes(512, 224, 16, 768, 12, 512, 12),
    "L/14": _sizes(768, 224, 14, 1024, 24, 768, 12),
    "L/14@336": _sizes(768, 336, 14, 1024, 24, 768, 12),
}


def make_clip(
    name: str,
    *,
    activation: str = "quick_gelu",
    dtype: DTypeLike | None = None,
    remat: bool = False,
) -> CLIP:
    """CLIP of a published size (B/32 has 151.3 M parameters), or a tiny one.

    `clip.clone(text=clip.text.clone(vocab_size=1000))` changes a field of a tower.

    >>> make_clip("L/14").image.depth
    24

    Args:
      name: in `CLIPS`.
      activation, dtype, remat: of both towers; see `ImageTower`.

    Raises:
      ValueError: an unknown name or activation.
    """
    checks.choice(CLIPS, name=name)
    checks.choice(ACTIVATIONS, activation=activation)
    embed_dim, image, text = CLIPS[name]
    options = dict(activation=activation, dtype=dtype, remat=remat)
    return CLIP(ImageTower(**image, **options), TextTower(**text, **options), embed_dim)
