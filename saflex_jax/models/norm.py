"""The one place that chooses a normalisation layer."""

from __future__ import annotations

import flax.linen as nn
import jax

from saflex_jax import checks


class Norm(nn.Module):
    """GroupNorm or BatchNorm.

    Attributes:
      kind: "group" (rows independent, no state; the default everywhere) or "batch".
      axis_name: BatchNorm only: the pmap axis over which batch statistics are averaged. Leave
        None under jit, where the batch is global already.
    """

    kind: str = "group"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        checks.choice("norm", self.kind, ("group", "batch"))
        if self.kind == "group":
            return nn.GroupNorm(num_groups=min(8, x.shape[-1]))(x)
        return nn.BatchNorm(
            use_running_average=not train, momentum=0.9, axis_name=self.axis_name
        )(x)
