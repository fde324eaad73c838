"""What a backbone returns: features, and optionally the feature map of one of its stages."""

from __future__ import annotations

from collections.abc import Sequence

import jax


def with_map(
    features: jax.Array, maps: Sequence[jax.Array], stage: int | None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The features, with the map of a stage if `stage` is given.

    Args:
      features: f32[B, D].
      maps: of all stages, f32[B, h, w, C] each.
      stage: index into `maps`, may be negative; None = no map.

    Raises:
      ValueError: a stage that the backbone does not have.
    """
    if stage is None:
        return features
    if not -len(maps) <= stage < len(maps):
        raise ValueError(
            f"stage must be in [{-len(maps)}, {len(maps) - 1}], the backbone's; given {stage}"
        )
    return features, maps[stage]
