"""Training methods, one file each: `make(model, tx, **options) -> Method`.

To add one, write the file and name it here; loop, runners and checkpoints stay as they are.
"""

from saflex_jax.methods import (
    automix,
    bootstrap,
    co_teaching,
    drw,
    erm,
    fixmatch,
    implicit,
    invariance,
    l2rw,
    label_smoothing,
    madaug,
    meta_weight_net,
    protonet,
    saflex,
    sla,
    small_loss,
)

METHODS = {
    "erm": erm.make,
    "saflex": saflex.make,
    "implicit": implicit.make,
    "l2rw": l2rw.make,
    "meta_weight_net": meta_weight_net.make,
    "drw": drw.make,
    "label_smoothing": label_smoothing.make,
    "bootstrap": bootstrap.make,
    "small_loss": small_loss.make,
    "co_teaching": co_teaching.make,
    "sla": sla.make,
    "automix": automix.make,
    "fixmatch": fixmatch.make,
    "invariance": invariance.make,
    "madaug": madaug.make,
    "protonet": protonet.make,
}
# The rules for weights and labels. A method of the same name is plain training with that rule; sla,
# automix and fixmatch take one as `refiner`.
REFINERS = {
    "saflex": saflex.refiner,
    "implicit": implicit.refiner,
    "l2rw": l2rw.refiner,
    "meta_weight_net": meta_weight_net.refiner,
    "drw": drw.refiner,
    "label_smoothing": label_smoothing.refiner,
    "bootstrap": bootstrap.refiner,
    "small_loss": small_loss.refiner,
}
# (backbone, num_classes, **options) -> the module that a method trains; of the others a Classifier.
NETWORKS = {
    "sla": sla.network,
    "automix": automix.network,
    "madaug": madaug.network,
    "protonet": protonet.network,
}
# (labels f32[N, K], **options) -> priors of the samples that a method shows its refiner, where
# these are not the samples themselves.
PRIORS = {"sla": sla.priors}
