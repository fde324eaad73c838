"""An upstream pipeline that adjusts itself: it draws operations with harmful utilities less often.

    utility of a row  ->  mean per alternative, class and step  ->  probability that it helps  ->
    share of the alternative in the class

It goes in front of any method, like `upstream`. An operation at several strengths counts as several
alternatives, so the shares set both how often it is drawn and how strong it is. A row's class is
the most probable one of its label.
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
from saflex_jax.core.steps import pipeline_key
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
      strength: >= 0, the sharper the larger; 0 adjusts nothing and only remembers. May be traced.
      scoring: of utilities, with a fresh validation gradient each. The greedy direction separates
        operations less well (docs/generation.md).
    """

    decay: float = 0.999
    floor: float = 0.01
    margin: float = 0.5
    strength: float | jax.Array = 2.0
    scoring: Scoring = Scoring()

    def __post_init__(self):
        checks.decay(decay=self.decay)
        checks.fraction(floor=self.floor)
        checks.decay(margin=self.margin)
        checks.at_least_zero(strength=self.strength)
        if self.scoring.val_every > 1 or self.scoring.val_decay > 0:
            raise ValueError(
                "scoring must compute the validation gradient on every step (val_every = 1, "
                f"val_decay = 0), since its utilities are averaged anyway; given {self.scoring}"
            )


def by_class(found: Pooled) -> Pooled:
    """What each alternative is worth in each class, f32[C, K], where evidence may be thin.

        s_ck = m_c + w_ck d_ck ,   d_ck = m_ck - m_c - a_k ,   w_ck = t_c / (t_c + e_ck^2)

    m_c is the utility over all rows. d says how a class differs, beyond a_k, the median difference
    of the alternatives there, which is no reason to prefer one. t_c, the mean of d^2 - e^2 over
    classes, estimates the variance of the true d. A class of which nothing is known has the overall
    utility, and so has every class of an alternative whose classes differ by no more than chance.

    >>> mean = jnp.array([[0.5, 1.0, 0.0], [0.5, 0.0, 1.0], [0.5, 0.5, 0.5]])
    >>> stats = Pooled(jnp.full((3, 3), 9.0), mean, jnp.full((3, 3), 0.1))
    >>> [[round(float(u), 2) for u in row] for row in by_class(stats).mean]
    [[0.98, 0.02], [0.02, 0.98], [0.5, 0.5]]

    Args:
      found: each f32[C, 1 + K]: of all rows, and by class.

    Source: Efron and Morris, "Stein's estimation rule and its competitors", 1973, for w.
    """
    mean, error = found.mean[:, :1], found.error[:, :1]
    known = jnp.isfinite(found.error[:, 1:])
    square = jnp.where(known, found.error[:, 1:], 0.0) ** 2
    apart = jnp.where(known, found.mean[:, 1:] - mean, jnp.nan)
    apart = jnp.where(known, apart - jnp.nanmedian(apart, 0, keepdims=True), 0.0)
    number = jnp.maximum(jnp.sum(known, 1, keepdims=True), 1)
    between = jnp.maximum(jnp.sum(apart**2 - square, 1, keepdims=True) / number, 0.0)
    weight = between / jnp.maximum(between + square, 1e-30)
    return Pooled(found.count[:, 1:], mean + weight * apart, jnp.sqrt(error**2 + weight * square))


def shares(
    found: Pooled,
    start: jax.Array,
    *,
    floor: float,
    margin: float = 0.0,
    strength: float | jax.Array = 1.0,
) -> jax.Array:
    """How often to draw each alternative in each class, f32[C, K], given its utilities.

        p_ck = floor p0_c + (1 - floor) p0_c h_ck^a / sum_j p0_j h_jk^a
        h_ck = min(1, 2 P(s_c > l), 2 P(s_ck > l)) ,   l = margin max(0, max_j s_j)

    with s_ck of `by_class`, s_c its mean over classes, and P from the mean's Gaussian. An
    alternative must help overall and in the class: what helps one class alone costs the others
    accuracy that a look one step ahead does not show. The mean over classes, and not over rows,
    because a class in which the alternative is drawn no more still counts. Alternatives that help,
    help more, or are unknown are drawn alike, so a pipeline without harm stays unchanged. With a
    margin, an alternative that helps much less than the best counts as harmful, too.

    >>> means = jnp.array([[0.3, 0.3, 0.3], [0.3, 0.3, 0.3], [0.2, -0.6, 1.0]])  # of two classes
    >>> stats = Pooled(jnp.full((3, 3), 9.0), means, jnp.full((3, 3), 0.05))
    >>> found = shares(stats, jnp.array([0.4, 0.1, 0.5]), floor=0.1)
    >>> [[round(float(p), 2) for p in row] for row in found]
    [[0.76, 0.4], [0.19, 0.1], [0.05, 0.5]]

    Args:
      found: each f32[C, 1 + K]: of all rows, and by class.
      start: p0, f32[C], the shares at the start; they sum to one.
      floor: in [0, 1].
      margin: in [0, 1).
      strength: a >= 0.
    """
    own = by_class(found)
    overall, error = own.mean.mean(1, keepdims=True), found.error[:, :1]
    known = jnp.isfinite(error[:, 0]) & (start > 0)
    least = margin * jnp.max(jnp.where(known, overall[:, 0], 0.0), initial=0.0)

    def helps(mean, error):
        return jnp.minimum(2 * ndtr((mean - least) / jnp.maximum(error, 1e-30)), 1.0)

    helpful = jnp.minimum(helps(overall, error), helps(own.mean, own.error))
    kept = start[:, None] * jnp.maximum(helpful, 1e-6) ** strength
    return floor * start[:, None] + (1 - floor) * kept / jnp.sum(kept, 0, keepdims=True)


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

    Metrics: "share/NAME", the mean over classes, and "utility/NAME" of every alternative. A utility
    is <label, scores> over the batch's root mean square. The mean over an alternative's rows, or
    those of one class, in one step is one observation, because they share one validation gradient.

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

    def now(pools):
        return shares(
            pooled.pooled(pools), start,
            floor=options.floor, margin=options.margin, strength=options.strength,
        )  # fmt: skip

    def augmented(state, streams):
        key = pipeline_key(state)
        if streams.candidates.trace is not None:  # a pipeline upstream drew with this key
            key = jax.random.fold_in(key, streams.candidates.trace.operation.shape[1])
        of_class = streams.candidates.labels.argmax(-1)
        log_p = jnp.log(now(state.extra.pools)).T[of_class]
        drawn, cell = alternatives.draw(key, streams.candidates, log_p)
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
        share = now(state.extra.pools).mean(1)
        utility = pooled.pooled(pools).mean[:, 0]
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
