"""The only place that depends on the version of JAX, and on what else is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

try:
    from jax import enable_x64 as enable_x64
except ImportError:  # until JAX 0.8
    from jax.experimental import enable_x64 as enable_x64  # type: ignore


def auto_mesh(devices: Sequence[jax.Device], axis_name: str) -> Mesh:
    """A 1-D mesh whose axis is `Auto`.

    Written out because the default of jax.make_mesh has been Explicit since 0.9, under which
    random permutations, jnp.roll and microbatch reshapes of sharded arrays are errors.
    """
    return Mesh(np.asarray(devices), (axis_name,), axis_types=(AxisType.Auto,))


@contextlib.contextmanager
def optional(package: str, extra: str = "data") -> Iterator[None]:
    """Context for importing a package that only an extra of `saflex_jax` installs.

    Raises:
      ImportError: the package is missing; names the extra that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f'this needs {package}: pip install "saflex_jax[{extra}]"') from error
