"""How a backbone hands out one of its feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import jax


def with_map(
    features: jax.Array, maps: Sequence[jax.Array], stage: int | None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """What a backbone returns: its features, and the map of one of its stages if one is asked for.

    Args:
      features: f32[B, D].
      maps: of all stages, f32[B, h, w, C] each.
      stage: place in `maps`, from the end where negative; None = no map.

    Raises:
      ValueError: there is no such stage.
    """
    if stage is None:
        return features
    if not -len(maps) <= stage < len(maps):
        raise ValueError(
            f"stage must be in [{-len(maps)}, {len(maps) - 1}], the backbone's; given {stage}"
        )
    return features, maps[stage]
