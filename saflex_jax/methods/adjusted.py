"""An upstream pipeline that adjusts itself: it draws operations with harmful utilities less often.

    utility of a row  ->  mean per alternative and step  ->  probability that it helps  ->  share

It goes in front of any method, like `upstream`. An operation at several strengths counts as several
alternatives, so the shares set both how often it is drawn and how strong it is.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from saflex_jax import checks
from saflex_jax.augment.alternatives import Alternatives
from saflex_jax.core import pooled
from saflex_jax.core.pooled import Pooled, Pools
from saflex_jax.core.targets import score_scale
from saflex_jax.core.tree import gather, identity
from saflex_jax.rules.scoring import Scoring
from saflex_jax.types import Method, PyTree, TrainState


class Adjusted(NamedTuple):
    """`TrainState.extra` of an adjusted method.

    Attributes:
      method: the method's own.
      pools: utilities of the C alternatives, f32[C, 1 + K]: of all rows, and by class. One step's
        mean is one observation.
    """

    method: PyTree
    pools: Pools


@dataclasses.dataclass(frozen=True)
class Options:
    """How shares follow utilities.

    Attributes:
      decay: in [0, 1), of the memory of steps; 0.999 remembers about a thousand. Utilities are
        largest early on, before the network has memorised the samples.
      floor: in [0, 1], part of every starting share that is kept, so that no alternative is lost.
      margin: in [0, 1), the part of the largest utility that an alternative must reach.
      strength: >= 0; 0 adjusts nothing and only remembers. May be traced.
      scoring: of utilities. The greedy direction separates operations less well
        (docs/generation.md).
    """

    decay: float = 0.999
    floor: float = 0.05
    margin: float = 0.5
    strength: float | jax.Array = 1.0
    scoring: Scoring = Scoring()

    def __post_init__(self):
        checks.decay(decay=self.decay)
        checks.fraction(floor=self.floor)
        checks.decay(margin=self.margin)
        checks.at_least_zero(strength=self.strength)


def shares(
    found: Pooled,
    start: jax.Array,
    *,
    floor: float,
    margin: float = 0.0,
    strength: float | jax.Array = 1.0,
) -> jax.Array:
    """How often to draw each alternative, f32[C], given its utility.

        p_c = floor p0_c + (1 - floor) p0_c h_c^a / sum_j p0_j h_j^a
        h_c = min(1, 2 P(u_c > margin max(0, max_j m_j)))

    with P from the mean's Gaussian. Alternatives that help, help more, or are unknown are drawn
    alike, so a pipeline without harm stays unchanged. With a margin, an alternative that helps much
    less than the best counts as harmful, too.

    >>> found = Pooled(jnp.array([9.0, 9.0]), jnp.array([0.3, -0.3]), jnp.array([0.1, 0.1]))
    >>> [round(float(p), 3) for p in shares(found, jnp.array([0.5, 0.5]), floor=0.1)]
    [0.948, 0.052]

    Args:
      found: each f32[C].
      start: p0, f32[C], the shares at the start; they sum to one.
      floor: in [0, 1].
      margin: in [0, 1).
      strength: a >= 0.
    """
    known = jnp.isfinite(found.error)
    largest = jnp.max(jnp.where(known & (start > 0), found.mean, 0.0), initial=0.0)
    helps = jnp.minimum(2 * ndtr((found.mean - margin * largest) / found.error), 1.0)
    kept = start * jnp.maximum(helps, 1e-6) ** strength
    return floor * start + (1 - floor) * kept / jnp.sum(kept)


def adjusted(
    method: Method,
    alternatives: Alternatives,
    options: Options = Options(),
    *,
    start: jax.Array | None = None,
) -> Method:
    """The method, with candidates augmented by alternatives whose shares follow their utility.

        from saflex_jax.augment import of_operations
        from saflex_jax.methods.adjusted import adjusted

        method = adjusted(saflex.make(model, tx, run), of_operations())

    Metrics: "share/NAME", "utility/NAME" of every alternative. A utility is <label, scores> over
    the batch's root mean square. The mean over an alternative's rows in one step is one
    observation, because they share one validation gradient.

    Args:
      method: any Method. It needs validation samples, which should not be trained on.
      alternatives: see `augment.alternatives`.
      options: see `Options`.
      start: shares f[C] at the start, may be traced; None = equal.

    Raises:
      ValueError: shares of another number; concrete ones that are no distribution; (on a step) no
        validation samples.
    """
    number = len(alternatives.names)
    start = jnp.full(number, 1 / number) if start is None else jnp.asarray(start, jnp.float32)
    checks.rows(number, start=start)
    checks.simplex(start=start[None])

    def init(key, inputs):
        state = method.init(key, inputs)
        classes = jax.eval_shape(method.predict, state, inputs).shape[-1]
        return state._replace(extra=Adjusted(state.extra, pooled.no_pools(number, 1 + classes)))

    def inside(state):
        return state._replace(extra=state.extra.method)

    def now(state):
        return shares(
            _overall(state.extra.pools), start,
            floor=options.floor, margin=options.margin, strength=options.strength,
        )  # fmt: skip

    def augmented(state, streams):
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0x5AF1EC)
        drawn, cell = alternatives.draw(key, streams.candidates, jnp.log(now(state)))
        return streams._replace(candidates=drawn), cell

    def step(state, streams, *, reduce=identity):
        if streams.val is None:
            raise ValueError("adjusted needs validation samples; given streams.val=None")
        streams, cell = augmented(state, streams)
        utility = _utility(method, inside(state), streams, options.scoring, reduce)
        pools = _observed(
            state.extra.pools, utility, cell, streams.candidates, options.decay, reduce
        )
        new, metrics = method.step(inside(state), streams, reduce=reduce)
        return new._replace(extra=Adjusted(new.extra, pools)), metrics | said(state, pools)

    def said(state, pools):
        share, utility = now(state), _overall(pools).mean
        one = jnp.ones(())
        named = list(enumerate(alternatives.names))
        return {f"share/{name}": (share[c], one) for c, name in named} | {
            f"utility/{name}": (utility[c], one) for c, name in named
        }

    def targets(state, streams):
        return method.targets(inside(state), augmented(state, streams)[0])

    def predict(state, inputs):
        return method.predict(inside(state), inputs)

    return Method(init, step, predict, targets if method.targets else None)


def _overall(pools: Pools) -> Pooled:
    """Each f32[C]."""
    return jax.tree.map(lambda x: x[:, 0], pooled.pooled(pools))


def _utility(method: Method, state: TrainState, streams, scoring: Scoring, reduce) -> jax.Array:
    """<label, scores> of the candidates in units of the batch's root mean square, f32[B]."""

    def logits_fn(params, inputs):
        return method.predict(state._replace(params=params), inputs)

    score = scoring.prepare(state, logits_fn, streams, reduce=reduce)
    scored, *_ = score(scoring.init(state.params), jnp.zeros((), jnp.int32))
    candidates = streams.candidates
    scale = score_scale(scored.scores, candidates.mask, reduce=reduce)
    return jnp.sum(candidates.labels * scored.scores, -1) / scale


def _observed(pools, utility, cell, candidates, decay, reduce) -> Pools:
    """The pools after one step, whose mean of each alternative, and class, is one row."""
    given = utility, cell, candidates.labels, candidates.mask
    utility, cell, labels, mask = gather(given, reduce)
    number, columns = pools.weight.shape
    own = (cell[:, None] == jnp.arange(number)[None]) & mask[:, None]
    of_class = labels.argmax(-1)[:, None] == jnp.arange(columns - 1)[None]
    column = jnp.concatenate([jnp.ones((len(cell), 1), bool), of_class], 1)
    rows = (own[:, :, None] & column[:, None]).astype(jnp.float32)
    count = rows.sum(0)
    mean = jnp.einsum("bck,b->ck", rows, utility) / jnp.maximum(count, 1)
    places = jnp.indices(count.shape)
    groups, classes = (place.ravel() for place in places)
    return pooled.add_utilities(
        pools, mean.ravel(), groups, classes, count.ravel() > 0, decay=decay
    )
