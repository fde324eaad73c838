"""A classifier is a backbone and a linear head; parameters at "backbone" and "head"."""

from __future__ import annotations

import flax.linen as nn
import jax


class Classifier(nn.Module):
    """Linear head on any backbone.

    Attributes:
      backbone: module with __call__(inputs, *, train) -> features f32[B, D].
      num_classes: K.
    """

    backbone: nn.Module
    num_classes: int

    def setup(self):
        self.head = nn.Dense(self.num_classes)

    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        """Logits f32[B, K]. `train` is BatchNorm's mode: batch statistics, or running ones."""
        return self.head(self.backbone(inputs, train=train))
