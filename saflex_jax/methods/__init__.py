"""Training methods, one file each: `make(model, tx, **options) -> Method`.

To add one, write the file and name it here; loop, runners and checkpoints stay as they are.
"""

from saflex_jax.methods import erm, implicit, l2rw, meta_weight_net, saflex

METHODS = {
    "erm": erm.make,
    "saflex": saflex.make,
    "implicit": implicit.make,
    "l2rw": l2rw.make,
    "meta_weight_net": meta_weight_net.make,
}
