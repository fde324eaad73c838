"""SAFLEX's default rule: how likely is each given label to be right, and which is, if it is not?

    p'_i = softmax(log p_i + lookahead S_i) ,   y_i, w_i = posterior(q_i, mean p'_i, C)

To first order scores are the change of log p after a step that lowers the validation loss, so p' is
what the network would believe after it. How many labels are wrong is learned from the trusted
samples (`core.posterior`), and which classes are given in the place of which, C, from what is
remembered of the others (`core.transition`). Where no label is wrong it is the plain upstream
pipeline, bit for bit. Of rows that upstream mixing made, what is known of their parents is mixed as
their labels are (`core.parents`). How it compares with the paper's rule: docs/results.md.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core import memory, parents, posterior, transition
from saflex_jax.core.memory import Memory, TopMemory
from saflex_jax.core.posterior import Agreement
from saflex_jax.core.targets import prior_targets
from saflex_jax.core.transition import Pairs
from saflex_jax.core.tree import on_all
from saflex_jax.rules.visits import VisitMean
from saflex_jax.types import Batch, RunInfo


class Beliefs(NamedTuple):
    """What the rule keeps between steps; None where it needs nothing.

    Attributes:
      memory: mean over visits of what is believed after a step, f32[N, K].
      agreement: with given labels, for the share of wrong ones.
      pairs: believed and given labels, for the classes that are confused.
    """

    memory: Memory | TopMemory | None
    agreement: Agreement | None
    pairs: Pairs | None


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """Labels as their posterior; a `refinement.ScoreRule`.

    Attributes:
      run: what the run knows. With it samples are remembered over their visits, and the run's
        trusted samples, which train like the others, stay as they are and say how many labels are
        wrong. Without trusted samples the validation samples say it, which is fair only where
        these are as hard as the candidates: held out of training against it, without upstream
        augmentation for it.
      noise_rate: eta, the share of wrong labels; None = estimate it as training goes on.
      lookahead: >= 0, length of the step after which p' is believed: 1 is all of "cg"'s, a Newton
        step on the validation loss; along "identity" it is a learning rate. None = M / (M + D) of M
        trusted samples and D inputs of the parameters that scores see (of a head, its features and
        the bias): the fewer samples say where to go, the less far it is believed.
      sharpness: > 0, power of beliefs before Bayes' rule, see `core.posterior.posterior_targets`.
      agreement_decay: in [0, 1), how slowly the estimates of eta and C forget.
      by_class: learn which classes are confused, K x K numbers; needs `run`. False = all wrong
        labels are equally likely.
      memory: how visits are averaged; needs `run`.

    Raises:
      ValueError: a value out of range, or options of a memory without a run.
    """

    run: RunInfo | None = None
    noise_rate: float | None = None
    lookahead: float | None = None
    sharpness: float = 2.0
    agreement_decay: float = 0.99
    by_class: bool = True
    memory: VisitMean = VisitMean()

    def __post_init__(self):
        if self.noise_rate is not None:
            checks.fraction(noise_rate=self.noise_rate)
        if self.lookahead is not None:
            checks.amount(lookahead=self.lookahead)
        checks.positive(sharpness=self.sharpness)
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
        )

    def update(self, arrays, scored, streams, *, reduce):
        """Remembers what is believed of the candidates, and how far it agrees with their labels."""
        candidates = streams.candidates
        kept, agreement, pairs = arrays
        rows = candidates.mask & parents.is_whole(candidates)
        if kept is not None:
            kept = self.memory.add(kept, candidates, self._visit(scored), rows, reduce)
        belief = self._belief(kept, scored, candidates, reduce)
        if agreement is not None:
            agreement = self._agreement(agreement, belief, scored, streams, rows, reduce)
        if pairs is not None:
            pairs = self._pairs(pairs, belief, streams, rows, reduce)
        return Beliefs(kept, agreement, pairs)

    def targets(self, arrays, scored, candidates, *, reduce):
        """`posterior_targets` of what is believed; the prior where nothing can be known."""
        noise = noise_rate = self._noise_rate(arrays, candidates)
        metrics = {"noise_rate": (noise_rate * jnp.ones(()), jnp.ones(()))}
        if scored is None and arrays.memory is None:
            return prior_targets(candidates.labels, candidates.mask), metrics
        if arrays.pairs is not None:
            noise = transition.likelihood(
                arrays.pairs, noise_rate, num_trusted=self._num_known, blocks=self.run.blocks
            )
        targets = posterior.posterior_targets(
            candidates.labels,
            self._belief(arrays.memory, scored, candidates, reduce),
            noise,
            sharpness=self.sharpness,
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
        return self._num_trusted or (0 if self.run is None else self.run.num_val)

    @property
    def _by_class(self) -> bool:
        return self.by_class and self.run is not None

    def _is_trusted(self, index: jax.Array) -> jax.Array:
        assert self.run is not None  # or none is trusted
        return index >= self.run.num_samples - self.run.num_trusted

    def _visit(self, scored) -> jax.Array:
        """p', f32[B, K]: what the network would believe after a step."""
        lookahead = self.lookahead
        if lookahead is None:
            known = self._num_known or len(scored.val_probs)
            lookahead = known / (known + scored.features)
        return jax.nn.softmax(scored.log_probs + lookahead * scored.scores)

    def _belief(
        self, kept: Memory | TopMemory | None, scored, candidates: Batch, reduce
    ) -> jax.Array:
        """What is remembered of the candidates, f32[B, K]; where nothing is, this visit's p'."""
        visit = jnp.zeros_like(candidates.labels) if scored is None else self._visit(scored)
        if kept is None:
            return visit
        recall = partial(memory.recall, kept, num_classes=visit.shape[1])
        belief = parents.mixture(candidates, recall, visit)
        return on_all(belief, reduce)

    def _noise_rate(self, arrays: Beliefs, candidates: Batch) -> float | jax.Array:
        if self.noise_rate is not None:
            return self.noise_rate
        assert arrays.agreement is not None  # `init` made it
        return posterior.estimate_noise_rate(
            arrays.agreement, candidates.labels.shape[1], num_trusted=self._num_known
        )

    def _pairs(self, pairs, belief, streams, rows, reduce) -> Pairs:
        candidates, val = streams.candidates, streams.val
        return transition.add_pairs(
            pairs,
            posterior.sharpened(belief, self.sharpness),
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
