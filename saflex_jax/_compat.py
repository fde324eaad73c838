"""The only place that depends on the version of JAX."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh


def auto_mesh(devices: Sequence[jax.Device], axis_name: str) -> Mesh:
    """A 1-D mesh whose axis is `Auto`.

    Written out because the default of jax.make_mesh has been Explicit since 0.9, under which
    random permutations, jnp.roll and microbatch reshapes of sharded arrays are errors.
    """
    return Mesh(np.asarray(devices), (axis_name,), axis_types=(AxisType.Auto,))
