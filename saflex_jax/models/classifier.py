"""A classifier is a backbone and a linear head; parameters at "backbone" and "head"."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from saflex_jax.types import PyTree

_MIX = {"inputs", "partner", "share", "layer"}  # what `augment.manifold_mixup` makes


def mix_hidden(h: jax.Array, mix: dict[str, jax.Array], layer: int) -> jax.Array:
    """Mixes the rows that are to be mixed at this layer.

        h_i <- s_i h_i + (1 - s_i) h_p(i)  where  mix["layer"]_i = layer

    Args:
      h: f[B, ...].
      mix: "partner" rows i32[B], "share" s f32[B], "layer" i32[B].
      layer: this one.

    Source: Verma et al., "Manifold Mixup", ICML 2019.
    """
    share = jnp.where(mix["layer"] == layer, mix["share"], 1.0)
    share = share.reshape(-1, *[1] * (h.ndim - 1))
    return (share * h + (1 - share) * h[mix["partner"]]).astype(h.dtype)


class Classifier(nn.Module):
    """Linear head on any backbone.

    Takes what the backbone takes, or the dict of `augment.manifold_mixup`: rows are then mixed with
    their partners at layer 0, the inputs, or 1, the features. Logits of mixed rows depend on their
    partners in evaluation mode too.

    Attributes:
      backbone: module with __call__(inputs, *, train) -> features f32[B, D].
      num_classes: K.
    """

    backbone: nn.Module
    num_classes: int

    def setup(self):
        self.head = nn.Dense(self.num_classes)

    def __call__(self, inputs: PyTree, *, train: bool) -> jax.Array:
        """Logits f32[B, K]. `train` is BatchNorm's mode: batch statistics, or running ones."""
        if not (isinstance(inputs, dict) and set(inputs) == _MIX):
            return self.head(self.backbone(inputs, train=train))
        mixed = jax.tree.map(lambda x: mix_hidden(x, inputs, 0), inputs["inputs"])
        features = self.backbone(mixed, train=train)
        return self.head(mix_hidden(features, inputs, 1))
