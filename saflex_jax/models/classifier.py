"""A classifier: a backbone and linear heads, with parameters at "backbone" and "head"."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from saflex_jax.types import PyTree

_MIX = {"inputs", "partner", "share", "layer"}  # the entries that `augment.manifold_mixup` makes


def mix_hidden(h: jax.Array, mix: dict[str, jax.Array], layer: int) -> jax.Array:
    """Mixes rows with their partners if the mix is for this layer.

        h_i <- s_i h_i + (1 - s_i) h_p(i)  where  mix["layer"]_i = layer

    >>> mix = {"partner": jnp.array([1, 0]), "share": jnp.array([0.75, 1.0]), "layer": jnp.zeros(2)}
    >>> mix_hidden(jnp.array([[0.0], [8.0]]), mix, layer=0).tolist()
    [[2.0], [8.0]]

    Args:
      h: f[B, ...].
      mix: "partner" rows i32[B], "share" s f32[B], "layer" i32[B].
      layer: number of the calling layer.

    Source: Verma et al., "Manifold Mixup", ICML 2019.
    """
    share = jnp.where(mix["layer"] == layer, mix["share"], 1.0)
    share = share.reshape(-1, *[1] * (h.ndim - 1))
    return (share * h + (1 - share) * h[mix["partner"]]).astype(h.dtype)


class CosineLinear(nn.Module):
    """Cosines of features with the columns of a kernel, f32[B, D] -> f32[B, width].

        z_k = <f, w_k> / (||f|| ||w_k||)

    Source: the head that the repository kaidic/LDAM-DRW trains with its loss.
    """

    width: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (features.shape[-1], self.width))

        def unit(x, axis):
            return x * jax.lax.rsqrt(jnp.sum(x**2, axis, keepdims=True) + 1e-12)

        return unit(features, -1) @ unit(kernel, 0)


def linear(width: int, cosine: bool, name: str | None = None) -> nn.Module:
    """A linear head of `width` outputs, or a cosine one."""
    return (CosineLinear if cosine else nn.Dense)(width, name=name)


class Classifier(nn.Module):
    """A linear head on any backbone: f32[B, K].

    Inputs are the backbone's, or the dict of `augment.manifold_mixup`: rows are then mixed with
    their partners at layer 0, the inputs, or 1, the features, also in evaluation mode.

    >>> from saflex_jax.models import MLP
    >>> network = Classifier(MLP((8,)), num_classes=3)
    >>> variables = network.init(jax.random.key(0), jnp.zeros((1, 4)), train=False)
    >>> sorted(variables["params"])
    ['backbone', 'head']

    Attributes:
      backbone: module with __call__(inputs, *, train) -> features f32[B, D].
      num_classes: K.
      cosine: whether logits are cosines, as `losses.ldam_loss` needs them; see `CosineLinear`.
    """

    backbone: nn.Module
    num_classes: int
    cosine: bool = False

    def setup(self):
        self.head = linear(self.num_classes, self.cosine)

    def __call__(self, inputs: PyTree, *, train: bool) -> jax.Array:
        """Logits f32[B, K].

        Args:
          inputs: the backbone's, or the dict of `augment.manifold_mixup`.
          train: BatchNorm's mode: batch statistics (True) or running ones.
        """
        if not (isinstance(inputs, dict) and set(inputs) == _MIX):
            return self.head(self.backbone(inputs, train=train))
        mixed = jax.tree.map(lambda x: mix_hidden(x, inputs, 0), inputs["inputs"])
        features = self.backbone(mixed, train=train)
        return self.head(mix_hidden(features, inputs, 1))


class Linears(nn.Module):
    """Several linear maps of the same features, by name."""

    widths: Mapping[str, int]
    cosine: bool

    @nn.compact
    def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
        return {
            name: linear(width, self.cosine, name)(features) for name, width in self.widths.items()
        }


class Heads(nn.Module):
    """Several linear heads on any backbone, with parameters at "head/NAME".

    >>> from saflex_jax.models import MLP
    >>> network = Heads(MLP((8,)), widths={"class": 3, "view": 4})
    >>> outputs, _ = network.init_with_output(jax.random.key(0), jnp.zeros((1, 4)), train=False)
    >>> outputs["view"].shape
    (1, 4)

    Attributes:
      backbone: as in `Classifier`. With `stage` its call is
        __call__(inputs, *, train, stage) -> (features f32[B, D], map f32[B, h, w, C]).
      widths: name -> outputs of that head.
      stage: stage of the backbone whose feature map to return; -1 = the last, None = no map.
      features: whether to return the features.
      cosine: whether logits are cosines, see `CosineLinear`.
    """

    backbone: nn.Module
    widths: Mapping[str, int]
    stage: int | None = None
    features: bool = False
    cosine: bool = False

    def setup(self):
        self.head = Linears(self.widths, self.cosine)

    def __call__(self, inputs: PyTree, *, train: bool) -> dict[str, jax.Array]:
        """Name -> logits f32[B, width]; and "map", the feature map, and "features" f32[B, D]."""
        if self.stage is None:
            features, extra = self.backbone(inputs, train=train), {}
        else:
            features, feature_map = self.backbone(inputs, train=train, stage=self.stage)
            extra = {"map": feature_map}
        if self.features:
            extra["features"] = features
        return {**self.head(features), **extra}
