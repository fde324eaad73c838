"""SAFLEX's default rule: is a given label right and, if not, which one is?

    p'_i = softmax(log p_i + lookahead S_i) ,   y_i, w_i = posterior(q_i, mean p'_i, C)

To first order, scores are the change of log p after a step that lowers the validation loss, so p'
is what the network would believe after that step. Trusted samples tell how many labels are wrong
(`core.posterior`), remembered beliefs tell which classes are confused, C (`core.transition`). If no
label is wrong, the rule is the plain upstream pipeline, bit for bit. For mixed rows, beliefs about
the parents are mixed as the labels are (`core.parents`). Comparison with the paper's rule:
docs/results.md.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core import calibration, memory, parents, posterior, transition
from saflex_jax.core.memory import Memory, TopMemory
from saflex_jax.core.posterior import Agreement
from saflex_jax.core.targets import prior_targets
from saflex_jax.core.transition import Pairs
from saflex_jax.core.tree import gather, on_all
from saflex_jax.rules.visits import VisitMean
from saflex_jax.types import Batch, PyTree, RunInfo

# 500 batches of 256 visit each of 12,000 samples about so often. From 4 to 32 it made no difference
# on development.
VISITS = 12


class Beliefs(NamedTuple):
    """What the rule keeps between steps; None for parts that it does not need.

    Attributes:
      memory: mean beliefs after a step over each sample's visits, f32[N, K].
      agreement: probability of given labels, for the share of wrong ones; or that share, f32[],
        where `started` told it.
      pairs: believed and given labels, for the classes that are confused.
      fits: of the powers of beliefs, f32[5], see `core.calibration`.
    """

    memory: Memory | TopMemory | None
    agreement: Agreement | jax.Array | None
    pairs: Pairs | None
    fits: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """Labels as their posterior; a `refinement.ScoreRule`.

    With a run, beliefs are averaged over each sample's visits. The run's trusted samples train like
    the others, keep their labels, and tell how many labels are wrong. Without trusted samples the
    validation samples tell it, which is fair only if they are as hard as the candidates: being held
    out makes them harder, being unaugmented easier.

    >>> rule = Posterior(RunInfo(num_samples=1000, num_classes=10), noise_rate=0.3)
    >>> rule.by_class
    True

    Attributes:
      run: what is known about the run; None = no memory and no trusted samples.
      noise_rate: eta, the share of wrong labels; None = estimate it during training, unless
        `started` tells it.
      lookahead: >= 0, length of the step before p'. With "cg", 1 is a full Newton step on the
        validation loss; along "identity" it is a learning rate. None = M / (M + D) with M trusted
        samples and D inputs of the scored parameters (for a head, its features and the bias): fewer
        trusted samples, a shorter step. Where the run does not know M, it is the number of the
        step's validation samples, over all devices and without padding.
      sharpness: in (0, 8], power of beliefs before Bayes' rule, see
        `core.posterior.posterior_targets`. None = where trusted samples train, learn it from the
        given labels, from 2 on (`core.calibration`); else 2.
      agreement_decay: in [0, 1), of the estimates of eta, C and the power.
      by_class: learn which classes are confused, K x K numbers; needs `run`. False = all wrong
        labels are equally likely.
      memory: how visits are averaged; needs `run`.

    Raises:
      ValueError: a value out of range, or options of a memory without a run.
    """

    run: RunInfo | None = None
    noise_rate: float | None = None
    lookahead: float | None = None
    sharpness: float | None = None
    agreement_decay: float = 0.99
    by_class: bool = True
    memory: VisitMean = VisitMean()

    def __post_init__(self):
        if self.noise_rate is not None:
            checks.fraction(noise_rate=self.noise_rate)
        if self.lookahead is not None:
            checks.amount(lookahead=self.lookahead)
        if self.sharpness is not None:
            checks.at_most(posterior.SHARPEST, sharpness=self.sharpness)
        checks.decay(agreement_decay=self.agreement_decay)
        run = self.run
        if run is None and self.memory != VisitMean():
            raise ValueError(f"memory needs run, for the number of samples; given {self.memory}")
        if run is not None:
            checks.whole(1, num_samples=run.num_samples)
            checks.whole(2, num_classes=run.num_classes)
            checks.whole(num_trusted=run.num_trusted, num_val=run.num_val)
            if run.num_trusted > run.num_samples:
                raise ValueError(
                    f"num_trusted must be at most num_samples = {run.num_samples}; "
                    f"given {run.num_trusted}"
                )

    def init(self):
        """See `ScoreRule`."""
        run = self.run
        return Beliefs(
            self.memory.init(run),
            posterior.no_agreement() if self.noise_rate is None else None,
            transition.no_pairs(run.num_classes // run.blocks) if self._by_class else None,
            calibration.no_fits() if self._learns_sharpness else None,
        )

    def update(self, arrays, scored, streams, *, reduce):
        """Remembers beliefs about the candidates, and how far they agree with the given labels."""
        candidates = streams.candidates
        kept, agreement, pairs, fits = arrays
        rows = candidates.mask & parents.is_whole(candidates)
        if kept is not None:
            kept = self.memory.add(kept, candidates, self._visit(scored, reduce), rows, reduce)
        belief = self._belief(kept, scored, candidates, reduce)
        if isinstance(agreement, Agreement):
            agreement = self._agreement(agreement, belief, scored, streams, rows, reduce)
        if pairs is not None:
            pairs = self._pairs(pairs, belief, self._power(arrays), streams, rows, reduce)
        learned = Beliefs(kept, agreement, pairs, fits)
        if fits is None:
            return learned
        fits = calibration.add_fits(
            fits,
            belief,
            candidates.labels,
            rows & ~self._is_trusted(candidates.index),
            self._noise(learned, self._noise_rate(learned, candidates)),
            decay=self.agreement_decay,
            reduce=reduce,
        )
        return learned._replace(fits=fits)

    def targets(self, arrays, scored, candidates, *, reduce):
        """`posterior_targets` of the beliefs; the prior while nothing is known."""
        noise_rate, power = self._noise_rate(arrays, candidates), self._power(arrays)
        metrics = {"noise_rate": (noise_rate * jnp.ones(()), jnp.ones(()))}
        if arrays.fits is not None:
            metrics["sharpness"] = power, jnp.ones(())
        if scored is None and arrays.memory is None:
            return prior_targets(candidates.labels, candidates.mask), metrics
        targets = posterior.posterior_targets(
            candidates.labels,
            self._belief(arrays.memory, scored, candidates, reduce),
            self._noise(arrays, noise_rate),
            sharpness=power,
            trusted=parents.of_all(candidates, self._is_trusted) if self._num_trusted else None,
            mask=candidates.mask,
            reduce=reduce,
        )
        return targets, metrics

    @property
    def _num_trusted(self) -> int:
        return 0 if self.run is None else self.run.num_trusted

    @property
    def _num_known(self) -> int:
        """Samples whose label is known to be right, whether they train or not; 0 = unknown."""
        if self.run is None:
            return 0
        return self.run.num_trusted // self.run.views or self.run.num_val

    @property
    def _learns_sharpness(self) -> bool:
        return self.sharpness is None and self._num_trusted > 0

    @property
    def _by_class(self) -> bool:
        return self.by_class and self.run is not None

    def _is_trusted(self, index: jax.Array) -> jax.Array:
        assert self.run is not None  # or none is trusted
        return index >= self.run.num_samples - self.run.num_trusted

    def _visit(self, scored, reduce) -> jax.Array:
        """p', f32[B, K]: what the network would believe after a step."""
        lookahead = self.lookahead
        if lookahead is None:
            known = self._num_known or jnp.sum(
                gather(scored.val_mask, reduce), dtype=scored.scores.dtype
            )
            lookahead = known / (known + scored.features)
        # Scores that nothing reads are not made.
        if checks.concrete(lookahead) and lookahead == 0:
            return jax.nn.softmax(scored.log_probs)
        return jax.nn.softmax(scored.log_probs + lookahead * scored.scores)

    def _belief(
        self, kept: Memory | TopMemory | None, scored, candidates: Batch, reduce
    ) -> jax.Array:
        """What is remembered of the candidates, f32[B, K]; where nothing is, this visit's p'."""
        visit = jnp.zeros_like(candidates.labels) if scored is None else self._visit(scored, reduce)
        if kept is None:
            return visit
        recall = partial(memory.recall, kept, num_classes=visit.shape[1])
        belief = parents.mixture(candidates, recall, visit)
        return on_all(belief, reduce)

    def _noise_rate(self, arrays: Beliefs, candidates: Batch) -> float | jax.Array:
        if self.noise_rate is not None:
            return self.noise_rate
        assert arrays.agreement is not None  # `init` made it
        if not isinstance(arrays.agreement, Agreement):
            return arrays.agreement
        return posterior.estimate_noise_rate(
            arrays.agreement, candidates.labels.shape[1], num_trusted=self._num_known
        )

    def _noise(self, arrays: Beliefs, noise_rate: float | jax.Array) -> float | jax.Array:
        """How far given labels speak for classes: C, or the one share."""
        if arrays.pairs is None:
            return noise_rate
        assert self.run is not None  # or there are no pairs
        return transition.likelihood(
            arrays.pairs, noise_rate, num_trusted=self._num_known, blocks=self.run.blocks
        )

    def _power(self, arrays: Beliefs) -> float | jax.Array:
        """Of beliefs: as given, or as learned so far."""
        if arrays.fits is None:
            return posterior.USUAL if self.sharpness is None else self.sharpness
        assert self.run is not None  # or no sample is trusted
        return calibration.best_power(
            arrays.fits,
            self.run.num_classes // self.run.blocks,
            num_trusted=self._num_known,
        )

    def _pairs(self, pairs, belief, power, streams, rows, reduce) -> Pairs:
        candidates, val = streams.candidates, streams.val
        return transition.add_pairs(
            pairs,
            posterior.sharpened(belief, power),
            candidates.labels,
            rows & ~self._is_trusted(candidates.index),
            val.labels,
            val.mask,
            mask=candidates.mask,
            decay=self.agreement_decay,
            reduce=reduce,
        )

    def _agreement(self, agreement, belief, scored, streams, rows, reduce) -> Agreement:
        candidates, val = streams.candidates, streams.val
        if self._num_trusted:
            values = posterior.agreement(belief, candidates.labels)
            trusted = self._is_trusted(candidates.index)
            reference, others = (values, rows & trusted), (values, rows & ~trusted)
        else:  # nothing is remembered of validation samples: both by the network as it is now
            values = posterior.agreement(scored.val_probs, val.labels)
            reference = values, val.mask & scored.fresh
            others = posterior.agreement(jnp.exp(scored.log_probs), candidates.labels), rows
        return posterior.add_agreement(
            agreement, reference, others, decay=self.agreement_decay, reduce=reduce
        )


def started(
    extra: PyTree, beliefs: jax.Array, *, noise_rate: float | None = None, visits: int = VISITS
) -> PyTree:
    """The arrays of a run whose rule starts from what others believe, such as an audit.

    Its memory is as after `visits` visits at which the network believed so. Beliefs of heads that
    did not see a sample's label (`Audit.beliefs`) keep a network from learning it before the rule
    knows better.

    >>> from saflex_jax.rules import Refinement, Scoring
    >>> rule = Refinement(Scoring(), Posterior(RunInfo(num_samples=2, num_classes=2)))
    >>> arrays = started(rule.init(jnp.zeros(3)), jnp.array([[0.75, 0.25], [0.5, 0.5]]))
    >>> arrays.rule.memory.mean[:2].tolist()
    [[0.75, 0.25], [0.5, 0.5]]

    Args:
      extra: `TrainState.extra` of a method with this rule, of before the first step.
      beliefs: f32[N, K], rows with sum one, of all samples in the order of `Batch.index`.
      noise_rate: eta, which the rule then does not estimate; None = it does.
      visits: >= 1; so many of a sample's own visits weigh as much.

    Raises:
      ValueError: arrays without a `Posterior`, or of one without a memory of all classes; beliefs
        of another shape, or no probabilities; a share outside [0, 1], or told twice.
    """
    own = [x for x in jax.tree.leaves(extra, is_leaf=_is_beliefs) if _is_beliefs(x)]
    if len(own) != 1 or own[0].memory is None:
        raise ValueError(
            "extra must be arrays of a method whose rule is Posterior, with a run and a memory; "
            f"given {jax.tree.structure(extra)}"
        )
    (arrays,) = own
    checks.simplex(beliefs=beliefs)
    changed = arrays._replace(memory=memory.started(arrays.memory, beliefs, visits=visits))
    if noise_rate is not None:
        checks.fraction(noise_rate=noise_rate)
        if arrays.agreement is None:
            raise ValueError(f"noise_rate must be None, for the rule has one; given {noise_rate}")
        changed = changed._replace(agreement=jnp.float32(noise_rate))
    return jax.tree.map(lambda x: changed if _is_beliefs(x) else x, extra, is_leaf=_is_beliefs)


def _is_beliefs(x: PyTree) -> bool:
    return isinstance(x, Beliefs)
