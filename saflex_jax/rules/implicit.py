"""Weights and soft labels of a finite pool as meta-parameters, by implicit differentiation.

Each source sample owns a weight and a soft label. A step moves those of its batch along the
implicit hypergradient of the validation loss and projects them back (labels on the simplex, weights
on [0, max_weight]). The inner step then trains on them: a row has the weight of its own sample, and
its label is that of its parents, mixed as the pipeline mixed them. A row whose prior label is
neither its sample's nor its parents' mixture keeps it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saflex_jax import checks
from saflex_jax.core import parents, steps
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.targets import rescale
from saflex_jax.core.tree import gather, identity, merge, select
from saflex_jax.rules import directions
from saflex_jax.rules.base import RuleSpec, needs_val, predicate_of
from saflex_jax.rules.directions import Direction
from saflex_jax.types import Batch, PathPredicate, PyTree, RunInfo, Targets

# Operations that give a row a label which is no mixture of its parents': nothing could be learned.
RELABELLING = ("soft_crop", "wrong_captions", "swapped_classes")
_NEAR = 1e-4  # labels of one mixture, computed twice


@dataclasses.dataclass(frozen=True, eq=False)
class Implicit:
    """Persistent targets updated by `core.steps.outer_step`; a `types.Rule`.

        phi = (weights f32[N], labels f32[N, K]) <- project(phi + meta_tx(d L_val / d phi))

    Rows are projected when they are read and when they move. A meta-optimiser with momentum also
    moves other rows; those are projected when they are next read.

    >>> run = RunInfo(num_samples=2, num_classes=2, labels=lambda: np.eye(2))
    >>> Implicit(run, learn="weights").max_weight
    2.0

    Attributes:
      run: what is known about the run; phi starts at its `labels` with weights one.
      meta_tx: optax transformation for phi; a number is SGD's learning rate. A sample's gradient is
        of order 1/B, so use rates of order B/10.
      direction: a `directions.Direction` or its text; solves with the inner Hessian on the selected
        parameters.
      predicate: the parameters of the implicit solve, as a predicate on paths or a path; "" = all.
      max_weight: weights stay in [0, max_weight].
      learn: "both", "weights" or "labels".
      start: first step that moves phi.

    Raises:
      ValueError: an unknown option or a value out of range; labels learned of a pipeline with an
        operation of RELABELLING; at the start, no labels, or labels not in the simplex.
    """

    run: RunInfo | None = None
    meta_tx: optax.GradientTransformation | float = 10.0
    direction: Direction | str = "cg(10, damping=0.01)"
    predicate: PathPredicate | str = "head"
    max_weight: float = 2.0
    learn: str = "both"
    start: int = 0

    def __post_init__(self):
        checks.positive(max_weight=self.max_weight)
        checks.choice(("both", "weights", "labels"), learn=self.learn)
        checks.whole(start=self.start)
        if isinstance(self.meta_tx, int | float):
            checks.positive(meta_tx=self.meta_tx)
        if isinstance(self.direction, str):
            directions.parse(self.direction)
        upstream = "" if self.run is None else self.run.upstream
        given = sorted({*re.findall(r"\w+", upstream)} & {*RELABELLING})
        if given and self.learn != "weights":
            raise ValueError(
                f"learn must be 'weights' behind {given[0]}, whose labels are no mixture of the "
                f"samples'; given {self.learn!r} with upstream {upstream!r}"
            )

    def _optimizer(self) -> optax.GradientTransformation:
        if isinstance(self.meta_tx, int | float):
            return optax.sgd(self.meta_tx)
        return self.meta_tx

    def _prior(self) -> np.ndarray:
        if self.run is None or self.run.labels is None:
            raise ValueError("implicit needs run.labels, the prior labels of the pool; given None")
        prior = np.asarray(self.run.labels())
        checks.simplex(prior=prior)
        return prior

    def _project(self, meta, rows):
        """phi with these rows made feasible; of the whole pool it would cost a sort of each row."""
        weights = jnp.clip(meta["weights"][rows], 0.0, self.max_weight)
        labels = jax.vmap(optax.projections.projection_simplex)(meta["labels"][rows])
        if self.learn == "labels":
            weights = jnp.ones_like(weights)
        if self.learn == "weights":
            labels = jnp.asarray(self._prior())[rows]
        return {
            "weights": meta["weights"].at[rows].set(weights),
            "labels": meta["labels"].at[rows].set(labels),
        }

    def _labels_of(self, candidates: Batch) -> Callable[[PyTree], jax.Array]:
        """phi -> the rows' labels, f32[B, K]; exactly as given while phi is where it started."""
        given, pool = candidates.labels, jnp.asarray(self._prior())
        prior = parents.mixed(candidates, lambda rows: pool[rows])
        same = jnp.all(given == prior, axis=-1, keepdims=True)
        near = jnp.all(jnp.abs(given - prior) < _NEAR, axis=-1, keepdims=True)

        def labels(meta):
            learned = parents.mixed(candidates, lambda rows: meta["labels"][rows])
            learned = jnp.where(same, learned, given + (learned - prior))
            return jnp.where(near, learned, given)

        return labels

    def init(self, params):
        """(phi, state of its optimiser)."""
        del params
        prior = jnp.asarray(self._prior())
        meta = {"weights": jnp.ones(len(prior)), "labels": prior}
        return meta, self._optimizer().init(meta)

    def apply(self, arrays, state, logits_fn, streams, *, reduce=identity):
        """See `types.Rule`."""
        needs_val("implicit", streams.val)
        candidates = streams.candidates
        labels_of = self._labels_of(candidates)
        inner_loss, outer_loss = _losses(logits_fn, state.params, streams, labels_of, reduce)
        direction = self.direction
        if isinstance(direction, str):
            direction = directions.parse(direction)
        rows = gather(parents.samples(candidates), reduce).ravel()
        feasible = partial(self._project, rows=rows)
        old_meta, old_opt = arrays
        meta, opt, metrics = steps.outer_step(
            feasible(old_meta),
            old_opt,
            select(state.params, predicate_of(self.predicate)),
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            meta_tx=self._optimizer(),
            solve=direction(state),
            project=feasible,
            reduce=reduce,
        )
        started = state.step >= self.start
        meta, opt = jax.tree.map(
            lambda new, old: jnp.where(started, new, old), (meta, opt), (old_meta, old_opt)
        )
        weights = jnp.where(candidates.mask, meta["weights"][candidates.index], 0.0)
        weights = rescale(weights, candidates.mask, reduce=reduce)
        labels = labels_of(meta)
        metrics["kept"] = steps.total(weights > 0, candidates.mask, reduce)
        learned = Targets(weights, labels, jnp.zeros_like(weights))
        return jax.lax.stop_gradient(learned), (meta, opt), metrics


def _losses(logits_fn, params, streams, labels_of, reduce):
    """(inner, outer) loss of (selected parameters, phi)."""
    candidates, val = streams.candidates, streams.val

    def logits(part, batch):
        return logits_fn(merge(part, params), batch.inputs)

    def inner(part, meta):
        losses = weighted_cross_entropy(
            logits(part, candidates),
            labels_of(meta),
            meta["weights"][candidates.index],
            candidates.mask,
        )
        return masked_mean(losses, candidates.mask, reduce=reduce)

    def outer(part, meta):
        del meta  # the validation loss depends on it through the inner optimum only
        losses = weighted_cross_entropy(logits(part, val), val.labels, mask=val.mask)
        return masked_mean(losses, val.mask, reduce=reduce)

    return inner, outer


SPEC = RuleSpec(Implicit, of_labels=True)
