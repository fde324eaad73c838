"""SAFLEX: weights and soft labels for every upstream sample, from the validation gradient.

    direction -> scores -> (memory) -> targets -> weighted inner step

Two rules make targets of scores. "simplex" is the paper's, the best point of the simplex.
"posterior", the default, takes the scores for what they are to first order, the change of log p
after a step that lowers the validation loss:

    p'_i = softmax(log p_i + lookahead S_i) ,   y_i, w_i = posterior(q_i, mean p'_i, eta)

and learns the share eta of wrong labels from the trusted samples (`core.posterior`). Where no
label is wrong it is the plain upstream pipeline. Of rows that upstream mixing made, what is known
of their parents is mixed as their labels are (`core.parents`). How both compare: docs/results.md.

Source: Ding et al., "SAFLEX: Self-Adaptive Augmentation via Feature Label EXtrapolation",
ICLR 2024.
The paper's rule is `rule="simplex", direction="identity", predicate=None, tolerance=0,
memory_decay=None`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core import linear_solve, memory, parents, posterior, scores, targets
from saflex_jax.core.losses import CandidateLoss, weighted_soft_cross_entropy
from saflex_jax.core.memory import Memory
from saflex_jax.core.posterior import Agreement
from saflex_jax.core.steps import total
from saflex_jax.core.tree import restrict, select, under
from saflex_jax.methods.base import needs_val, supervised
from saflex_jax.types import LinearSolve, Method, Model, Params, PathPredicate, Refiner


class Kept(NamedTuple):
    """What the rule keeps between steps; None where it needs nothing.

    Attributes:
      memory: of scores, or of what is believed after a step.
      gradient: of the validation loss, like the selected parameters.
      agreement: of the network with given labels, for the share of wrong ones.
    """

    memory: Memory | None
    gradient: Params | None
    agreement: Agreement | None


RULES = ("posterior", "simplex")
DIRECTIONS = ("identity", "adam", "neumann", "cg")


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    **options,
) -> Method:
    """SAFLEX as a method of the loop; `options` are those of `refiner`."""
    return supervised(model, tx, refiner(**options), loss=loss)


def refiner(
    *,
    rule: str = "posterior",
    direction: str = "cg",
    iterations: int = 10,
    damping: float = 0.1,
    neumann_scale: float = 0.1,
    predicate: PathPredicate | None = under("head"),
    mode: scores.Mode = "jvp",
    chunk: int | None = None,
    compute_dtype: str | None = None,
    lookahead: float = 1.0,
    noise_rate: float | None = None,
    prior_strength: float = 3.0,
    temperature: float = 0.3,
    tolerance: float = 0.25,
    scale: targets.Scale = "rms",
    learn: targets.Learn = "both",
    anchor: targets.Anchor = "linear",
    memory_decay: float | None = None,
    memory_dtype: str = "float32",
    num_samples: int = 0,
    num_classes: int = 0,
    num_trusted: int = 0,
    num_val: int = 0,
    start: int = 0,
    every: int = 1,
    val_every: int = 1,
    val_decay: float = 0.0,
) -> Refiner:
    """The SAFLEX rule.

    Args:
      rule: "posterior" or "simplex", see the top of this file.
      direction: "identity" (the paper's greedy step), "adam" (the optimiser's preconditioner),
        "neumann" or "cg" (implicit differentiation with the Gauss-Newton matrix).
      iterations: of Neumann or CG.
      damping: added to the Gauss-Newton matrix, Neumann and CG. On the problems of docs/cost.md .1
        agrees with retraining better than .01.
      neumann_scale: step of the Neumann series.
      predicate: the parameters that scores see; None = all. The default, the head, costs one more
        forward pass (the validation samples') and products with features.
      mode, chunk: see `core.scores.label_scores`.
      compute_dtype: see `core.scores.score`.
      lookahead: >= 0, length of the step after which p' is believed: 1 is all of "cg"'s, a Newton
        step on the validation loss; along "identity" it is a learning rate. Of "posterior".
      noise_rate: eta, the share of wrong labels; None = estimated as training goes on. Of
        "posterior".
      prior_strength, temperature, tolerance, scale, learn, anchor: of "simplex", see
        `core.targets.solve_targets`.
      memory_decay: averages over a source sample's visits (`core.memory`), keyed by `Batch.index`:
        its p', from rows that are whole (`core.parents`), or, for "simplex", its scores; None = no
        memory. Needs num_samples and num_classes.
      memory_dtype: "float32" or "bfloat16".
      num_samples, num_classes: size of the memory.
      num_trusted: the last so many source samples are trusted ones that train, too: they stay as
        they are, and eta is learned from them. Needs num_samples. 0 = there are none; then eta is
        learned from the validation samples, which is fair only where these are as hard as the
        candidates: held out of training against it, without upstream augmentation for it.
      num_val: how many validation samples there are, for the error of an eta that is learned from
        them (`posterior.noise_rate`); 0 = unknown, then every visit counts as another sample.
      start: first step on which targets are learned; the prior before it.
      every: scores are computed every so many steps; on the others the memory's are used, or,
        without a memory, the prior. The candidates' forward pass is made on all steps: it is the
        training step's own (not where that has another: BatchNorm, dropout, clean samples).
      val_every: every so many-th scoring takes a fresh validation gradient, the others the last.
      val_decay: in [0, 1); validation gradients are averaged, first plainly and then exponentially;
        0 = the last one alone.

    Raises:
      ValueError: an unknown option, or a value out of range.
    """
    checks.choice(RULES, rule=rule)
    checks.choice(DIRECTIONS, direction=direction)
    checks.amount(lookahead=lookahead)
    if noise_rate is not None:
        checks.fraction(noise_rate=noise_rate)
    targets.check(prior_strength, temperature, tolerance, scale, learn, anchor)
    checks.whole(num_trusted=num_trusted)
    checks.whole(num_val=num_val)
    if num_trusted > num_samples:
        raise ValueError(
            f"num_trusted must be at most num_samples = {num_samples}; given {num_trusted}"
        )
    scores.check(mode, compute_dtype)
    checks.whole(start=start)
    checks.whole(1, every=every)
    checks.whole(1, val_every=val_every)
    checks.decay(val_decay=val_decay)
    checks.choice(memory.DTYPES, memory_dtype=memory_dtype)
    remembers, keeps_gradient = memory_decay is not None, val_every > 1 or val_decay > 0
    estimates = rule == "posterior" and noise_rate is None
    on_val = estimates and not num_trusted
    size = dict(num_samples=num_samples, num_classes=num_classes, dtype=memory_dtype)
    if remembers:
        checks.decay(memory_decay=memory_decay)
        memory.check(**size)

    def init(params):
        return Kept(
            memory.init(**size) if remembers else None,
            jax.tree.map(jnp.zeros_like, select(params, predicate)) if keeps_gradient else None,
            posterior.no_agreement() if estimates else None,
        )

    def solver(state) -> LinearSolve:
        if direction == "identity":
            return linear_solve.identity_solve()
        if direction == "adam":
            diagonal = linear_solve.adam_inverse_diagonal(state.opt_state)
            return linear_solve.preconditioned_solve(
                restrict(diagonal, select(state.params, predicate))
            )
        if direction == "neumann":
            return linear_solve.neumann_solve(
                steps=iterations, scale=neumann_scale, damping=damping
            )
        return linear_solve.cg_solve(maxiter=iterations, damping=damping)

    def is_trusted(index):
        return index >= num_samples - num_trusted

    def of_visit(label_scores, log_probs, candidates, reduce):
        """What a scoring says of a sample; a memory averages it."""
        if rule == "posterior":
            return jax.nn.softmax(log_probs + lookahead * label_scores)
        if not remembers:
            return label_scores  # which `solve_targets` scales
        # A raw score shrinks as training goes on: no average of it.
        return label_scores / targets.score_scale(label_scores, candidates.mask, reduce=reduce)

    def remembered(kept, visit, candidates):
        """The evidence that targets are made of: what the memory says, else this visit."""
        if rule == "posterior":
            return parents.mixture(candidates, lambda index: memory.recall(kept, index), visit)
        return memory.recall(kept, candidates.index)

    def make_targets(evidence, arrays, candidates, reduce):
        if rule == "posterior":
            return posterior.posterior_targets(
                candidates.labels,
                evidence,
                wrong_share(arrays, candidates),
                trusted=parents.of_all(candidates, is_trusted) if num_trusted else None,
                mask=candidates.mask,
                reduce=reduce,
            )
        return targets.solve_targets(
            evidence,
            candidates.labels,
            prior_strength=prior_strength,
            temperature=temperature,
            tolerance=tolerance,
            scale=scale,
            learn=learn,
            anchor=anchor,
            mask=candidates.mask,
            reduce=reduce,
        )

    def wrong_share(arrays, candidates):
        if noise_rate is not None:
            return noise_rate
        number = num_trusted or num_val
        classes = candidates.labels.shape[1]
        return posterior.noise_rate(arrays.agreement, classes, num_trusted=number)

    def apply(arrays, state, logits_fn, streams, *, reduce):
        candidates, val = streams.candidates, streams.val
        needs_val("saflex", val)
        network = scores.in_dtype(logits_fn, compute_dtype)
        along = scores.scorer(
            network,
            state.params,
            candidates.inputs,
            mask=candidates.mask,
            predicate=predicate,
            solve=solver(state),
            mode=mode,
            chunk=chunk,
            reduce=reduce,
        )
        nothing = jnp.zeros(()), jnp.zeros(())  # a metric that no step contributed to
        turn = (state.step - start) // every  # scorings so far

        def fresh(kept):
            val_loss, gradient = scores.validation_gradient(
                network,
                state.params,
                val.inputs,
                val.labels,
                mask=val.mask,
                predicate=predicate,
                reduce=reduce,
            )
            if val_decay > 0:
                rate = jnp.maximum(1 - val_decay, 1 / (turn // val_every + 1))
                gradient = jax.tree.map(
                    lambda g, k: (k + rate * (g - k)).astype(k.dtype), gradient, kept
                )
            reference = ()
            if on_val:  # the pass is the gradient's own
                probs = jax.nn.softmax(network(state.params, val.inputs))
                reference = posterior.agreement(probs, val.labels), val.mask
            return gradient, (val_loss, jnp.ones(())), reference

        def stale(kept):
            reference = (jnp.zeros(len(val.mask)), jnp.zeros_like(val.mask)) if on_val else ()
            return kept, nothing, reference

        def agreed(kept, log_probs, evidence, reference):
            rows = candidates.mask & parents.is_whole(candidates)
            if num_trusted:
                values = posterior.agreement(evidence, candidates.labels)
                trusted = is_trusted(candidates.index)
                reference, others = (values, rows & trusted), (values, rows & ~trusted)
            else:  # of the validation samples nothing is remembered: both as the network is now
                others = posterior.agreement(jnp.exp(log_probs), candidates.labels), rows
            return posterior.add_agreement(kept, reference, others, reduce=reduce)

        def scored(arrays):
            if val_every == 1:
                found = fresh(arrays.gradient if keeps_gradient else None)
            else:
                found = jax.lax.cond(turn % val_every == 0, fresh, stale, arrays.gradient)
            gradient, val_loss, reference = jax.lax.stop_gradient(found)
            label_scores, log_probs, info = jax.lax.stop_gradient(along(gradient))
            if keeps_gradient:
                arrays = arrays._replace(gradient=gradient)
            evidence = of_visit(label_scores, log_probs, candidates, reduce)
            if remembers:
                rows = candidates.mask
                if rule == "posterior":
                    rows &= parents.is_whole(candidates)
                kept, _ = memory.update(
                    arrays.memory,
                    candidates.index,
                    evidence,
                    rows,
                    decay=memory_decay,
                    reduce=reduce,
                )
                arrays = arrays._replace(memory=kept)
                evidence = remembered(kept, evidence, candidates)
            if estimates:
                kept = agreed(arrays.agreement, log_probs, evidence, reference)
                arrays = arrays._replace(agreement=kept)
            learned = make_targets(evidence, arrays, candidates, reduce)
            return learned, arrays, val_loss, (info.residual, jnp.ones(()))

        def unscored(arrays):
            learned = targets.prior_targets(candidates.labels, candidates.mask)
            if remembers:
                evidence = remembered(arrays.memory, jnp.zeros_like(candidates.labels), candidates)
                learned = jax.lax.cond(
                    state.step >= start,
                    lambda: make_targets(evidence, arrays, candidates, reduce),
                    lambda: learned,
                )
            return learned, arrays, nothing, nothing

        if start == 0 and every == 1:
            learned, arrays, val_loss, residual = scored(arrays)
        else:
            due = (state.step >= start) & ((state.step - start) % every == 0)
            learned, arrays, val_loss, residual = jax.lax.cond(due, scored, unscored, arrays)

        moved = jnp.argmax(learned.labels, -1) != jnp.argmax(candidates.labels, -1)
        metrics = {
            "val_loss": val_loss,
            "kept": total(learned.weights > 0, candidates.mask, reduce),
            "relabelled": total(moved, candidates.mask, reduce),
        }
        if rule == "posterior":
            share = wrong_share(arrays, candidates) * jnp.ones(())
            metrics["noise_rate"] = share, jnp.ones(())
        # Of the other directions, reading the residual would cost a product with the curvature.
        if direction in ("neumann", "cg"):
            metrics["solve_residual"] = residual
        return learned, arrays, metrics

    return Refiner(init, apply)
