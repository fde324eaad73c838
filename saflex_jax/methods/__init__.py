"""Training methods, one file each: `make(model, tx, **options) -> Method`.

To add one, write the file and name it here; loop, runners and checkpoints stay as they are.
"""

from saflex_jax.methods import erm, implicit, saflex

METHODS = {"erm": erm.make, "saflex": saflex.make, "implicit": implicit.make}
