"""Methods, one file each: how a step works. What to train on is a rule (`saflex_jax.rules`).

To add a method, write its file (fork `supervised.py` or `sla.py`) and name it in METHODS; the loop,
runners, checkpoints and configs need no change. From outside the package, use
`METHODS["mine"] = MethodSpec(...)`.
"""

from saflex_jax.methods import (
    adautomix,
    automix,
    co_teaching,
    dividemix,
    elr,
    fixmatch,
    flyp,
    invariance,
    madaug,
    protonet,
    saflex,
    sla,
    supervised,
)
from saflex_jax.methods.base import Episode, MethodSpec

METHODS = {
    "supervised": supervised.SPEC,
    "sla": sla.SPEC,
    "automix": automix.SPEC,
    "adautomix": adautomix.SPEC,
    "fixmatch": fixmatch.SPEC,
    "co_teaching": co_teaching.SPEC,
    "elr": elr.SPEC,
    "dividemix": dividemix.SPEC,
    "invariance": invariance.SPEC,
    "madaug": madaug.SPEC,
    "protonet": protonet.SPEC,
    "flyp": flyp.SPEC,
}

__all__ = ["METHODS", "Episode", "MethodSpec", "saflex"]
