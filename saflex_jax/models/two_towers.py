"""CLIP's towers as one network of this package: pairs in, embeddings out."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from saflex_jax.models.adapters import from_linen
from saflex_jax.models.clip import CLIP, unit
from saflex_jax.models.clip_weights import load_clip
from saflex_jax.types import Model, PyTree


class TwoTowers(CLIP):
    """`CLIP`, called as methods call networks; same attributes, same parameters.

    >>> from saflex_jax.models import MLP
    >>> network = TwoTowers(MLP((8,)), MLP((8,)), embed_dim=4)
    >>> pairs = {"image": jnp.ones((2, 3)), "text": jnp.ones((5, 6))}
    >>> outputs, _ = network.init_with_output(jax.random.key(0), pairs, train=False)
    >>> sorted(outputs), outputs["text"].shape
    (['bias', 'image', 'scale', 'text'], (5, 4))

    Attributes:
      image, text, embed_dim, projected, sigmoid: see `CLIP`.
    """

    @classmethod
    def of(cls, clip: CLIP) -> TwoTowers:
        """The network of a CLIP, which shares its weights."""
        names = ("image", "text", "embed_dim", "projected", "sigmoid")
        return cls(**{name: getattr(clip, name) for name in names})

    def __call__(self, inputs: dict[str, PyTree], *, train: bool) -> dict[str, jax.Array]:
        """Normalised embeddings of the given inputs, "image" f32[B, E] and "text" f32[B', E].

        The result also has "scale" and "bias" f32[], for `core.contrastive.similarities`.
        """
        encode = {"image": self.encode_image, "text": self.encode_text}
        outputs = {name: unit(encode[name](inputs[name], train=train)) for name in inputs}
        bias = self.logit_bias if self.sigmoid else jnp.zeros(())
        return outputs | {"scale": jnp.exp(self.logit_scale), "bias": bias}


def pretrained_towers(
    folder: str | os.PathLike, *, dtype: DTypeLike | None = None, remat: bool = False
) -> Model:
    """Both towers of a downloaded folder as a Model that starts from its weights.

    >>> model = pretrained_towers("data/weights/clip-vit-base-patch32")  # doctest: +SKIP

    Args:
      folder, dtype, remat: see `load_clip`.

    Raises:
      ValueError: as `load_clip`.
    """
    clip, params = load_clip(folder, dtype=dtype, remat=remat)
    return from_linen(TwoTowers.of(clip))._replace(init=lambda key, inputs: (params, {}))
