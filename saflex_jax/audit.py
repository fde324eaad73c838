"""Which labels are wrong, and which samples are of no class? Plain arrays in, a table out.

For networks that live elsewhere: takes features (or logits) and labels, returns NumPy arrays.

    heads on all folds but one -> their beliefs about the held-out fold
    -> confusion of classes, by maximum likelihood -> posterior of every label -> heads once more

Heads train with this package's loop, all folds in one program: first with SAFLEX's rule (without it
if no sample is trusted), then on the posterior labels from the first round, whose share of wrong
labels stays if samples are trusted. Several kinds of head train side by side; held-out labels
choose one of them. Whether any label is wrong at all, a ratio of likelihoods says.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saflex_jax import checks, models, parallel, train
from saflex_jax.core import pooled, transition
from saflex_jax.core.losses import masked_mean
from saflex_jax.core.posterior import USUAL, posterior_targets, sharpened
from saflex_jax.data import PartStream, StackedStream, fit_scale
from saflex_jax.data.seeds import generator
from saflex_jax.data.sources import MOST_CLASSES
from saflex_jax.methods import elr
from saflex_jax.rules import Refinement, Scoring
from saflex_jax.rules.posterior import Posterior
from saflex_jax.types import Batch, Method, RunInfo, Streams

# Powers of beliefs that are tried. Without trusted samples the usual one: the likelihood cannot
# tell a belief that is too flat from labels that are confused.
SHARPNESS = 2.0 ** np.arange(-1, 2.01, 0.25)
UNTOLD = np.array([USUAL])
RIDGES = np.array([0.1, 0.3, 1.0, 3.0, 10.0, 30.0])  # tried for typicality
FALSE = 0.07  # share of the samples flagged as outside that may be inside
VAL = 32  # trusted samples of a step, which say how frequent classes are
ROWS = 1024  # that a head is asked about at once
SURE = 3.0  # standard errors of `Audit.evidence`
POWERS = 2.0 ** np.arange(-2, 2.01, 0.5)  # for it: right labels of hard samples need flat beliefs
LEAST_STEPS = 30  # of a head, however few its samples
FURTHEST, HALVINGS = 8.0, 30  # of the logarithm of a factor, and how often it is halved
MEMORY = 2**31  # bytes of all averages f32[N, K] in one program, as long as it has several kinds


@dataclasses.dataclass(frozen=True)
class Head:
    """How to train a kind of head: standardised features -> MLP -> classes, by AdamW.

    >>> Head(widths=(), steps=200).folds
    5

    Attributes:
      widths: of hidden layers; () = a linear head.
      weight_decay: of AdamW. A strong one keeps a head from memorising wrong labels.
      strength: of early-learning regularisation (`methods.elr`), which does so, too; 0 = none.
      learning_rate: at the first step; it falls to 0 by a cosine.
      steps: of each head, at most.
      epochs: passes over a head's samples, at most, where that is 30 steps or more; in more passes
        over few samples it learns wrong labels by heart.
      batch_size: samples per step, at most those that a head has.
      folds: number of heads; each trains on all folds but its own.
    """

    widths: Sequence[int] = (256,)
    weight_decay: float = 3.0
    strength: float = 0.0
    learning_rate: float = 3e-3
    steps: int = 500
    epochs: float = 16.0
    batch_size: int = 256
    folds: int = 5

    def __post_init__(self):
        checks.whole(1, steps=self.steps, batch_size=self.batch_size)
        checks.whole(2, folds=self.folds)
        checks.amount(weight_decay=self.weight_decay, strength=self.strength)
        checks.positive(learning_rate=self.learning_rate, epochs=self.epochs)


# Early-learning regularisation finds more wrong labels by good features; of raw columns it learns
# too little, and trusted labels show it.
HEADS = (Head(strength=3.0), Head())
OPTIONS = ("weight_decay", "strength")  # in which kinds of head may differ


@dataclasses.dataclass(frozen=True, eq=False)
class Audit:
    """The result for N samples of K classes; `columns` makes a table.

    An example is at `from_logits`.

    Attributes:
      given: i[N], labels as given.
      learned: i[N], the label that is most likely right.
      probability: f32[N], probability of the learned label.
      quality: f32[N], probability that the given label is right; look at small values first.
      weight: f32[N], training weights, of mean one over the samples not flagged as outside.
      utility: f32[N] in [-1, 1], 2 quality - 1, and -1 outside; drop samples below zero.
      typicality: f32[N] in (0, 1], share of trusted samples that look at most as typical, a
        conformal p-value; 1 without features or enough trusted samples.
      wrong: bool[N], flagged: the given label is more likely wrong than right.
      outside: bool[N], flagged: unlike all trusted samples, so probably of no class.
      trusted: bool[N], as given.
      labels: f32[N, K], the learned soft labels.
      beliefs: f32[N, K], of heads that did not see the given label, or of your network; `labels`
        follow from them, and a rule may start from them (`rules.started`).
      transition: f32[K, K], C_kj: how often class k is given as j.
      noise_rate: share of wrong labels, trusted samples and those outside left out.
      evidence: that labels are wrong, in standard errors: how much likelier labels as given are if
        some are wrong than if all are right. Up to SURE, train on them as given.
      head: the kind of head whose beliefs these are; None = of your own network.
      groups: name -> utility pooled over its rows, f32[] each (`core.pooled.Pooled`).
    """

    given: np.ndarray
    learned: np.ndarray
    probability: np.ndarray
    quality: np.ndarray
    weight: np.ndarray
    utility: np.ndarray
    typicality: np.ndarray
    wrong: np.ndarray
    outside: np.ndarray
    trusted: np.ndarray
    labels: np.ndarray
    beliefs: np.ndarray
    transition: np.ndarray
    noise_rate: float
    evidence: float
    head: Head | None
    groups: Mapping[str, pooled.Pooled]

    def columns(self) -> dict[str, np.ndarray]:
        """Name -> array [N]: `pandas.DataFrame(audit.columns())` is the table."""
        names = ("given", "learned", "probability", "quality", "weight", "utility", "typicality")
        names += ("wrong", "outside", "trusted")
        return {"row": np.arange(len(self.given))} | {name: getattr(self, name) for name in names}


def audit(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    trusted: np.ndarray | None = None,
    source: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    num_classes: int | None = None,
    head: Head | Sequence[Head] = HEADS,
    seed: int = 0,
) -> Audit:
    """Audits labels from features of any network, with or without trusted samples.

    An example is at `from_logits`; docs/noisy_labels.md has one of this function.

    Args:
      features: f[N, D], finite: from a frozen network, or columns of numbers. They are
        standardised here.
      labels: i[N] in [0, K); of texts, `np.unique(texts, return_inverse=True)[1]`.
      trusted: bool[N], samples whose label is known to be right; None = none.
      source: i[N]; samples of one source (draws of a generator, crops of one image) stay in one
        fold, save trusted ones of fewer than two sources a fold, on which all heads train. None =
        every sample is its own source.
      groups: [N], any values; utility is pooled over the rows of each. None = no groups.
      num_classes: K; None = the largest label plus one.
      head: how to train the heads; of several kinds, which may differ in weight decay and strength,
        the first, unless held-out trusted labels are likelier under another by two standard errors.
        Without trusted samples the one under which held-out labels are most likely.
      seed: of folds, heads and batches.

    Raises:
      ValueError: arrays that disagree in N, features not finite, labels out of range, fewer than
        two classes or two samples per fold; kinds of head that differ in more; features that say
        nothing about the labels.

    Source: this project's (docs/audit.md). Out-of-sample beliefs: Northcutt et al., "Confident
    Learning", JAIR 2021.
    """
    heads = _heads(head)
    x, y, known, size = _checked(features, labels, trusted, source, groups, num_classes)
    fold = _folds(known, source, heads[0].folds, seed)
    typical = typicality(x, known, fold)
    inside = _inside(typical, known)
    x = fit_scale(x[inside])(x)[:]
    prior = np.eye(size, dtype=np.float32)[y]
    beliefs = []
    for kinds in _side_by_side(heads, prior.nbytes):
        beliefs += _held_out(x, prior, known, inside, fold, kinds, seed)
    told = known & (fold >= 0)  # the heads of a trusted sample in no fold know its label
    likely = [_most_likely(probs, y, known, told, inside) for probs in beliefs]
    best = _chosen(likely, told)
    labels, _ = _posterior(beliefs[best], y, known, inside, likely[best])
    (probs,) = _held_out(x, labels, known, inside, fold, heads[best : best + 1], seed, given=False)
    # Without trusted labels to fit beliefs to, heads of few samples find too many wrong at first.
    first = likely[best] if told.any() else None
    return _found(probs, y, known, told, inside, typical, groups, heads[best], first)


def from_logits(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    trusted: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Audit:
    """Audits labels from your network's out-of-sample logits.

    >>> logits = np.array([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]] * 40, "float32")
    >>> result = from_logits(logits, np.array([0, 1, 0] * 39 + [0, 1, 1]))
    >>> np.flatnonzero(result.wrong).tolist()
    [119]

    Args:
      logits: f[N, K], finite: from cross-validation; log-probabilities also do.
      labels, trusted, groups: see `audit`.

    Raises:
      ValueError: as `audit`.
    """
    classes = np.shape(logits)[1] if np.ndim(logits) == 2 else None
    x, y, known, _ = _checked(logits, labels, trusted, None, groups, classes, name="logits")
    probs = np.asarray(jax.nn.softmax(jnp.asarray(x)))
    typical = np.ones(len(y), np.float32)
    return _found(probs, y, known, known, typical > 0, typical, groups, None)


# --- beliefs -------------------------------------------------------------------------------------


def _folds(trusted: np.ndarray, source: np.ndarray | None, folds: int, seed: int) -> np.ndarray:
    """The fold of each sample, i[N], the same for all of a source.

    Trusted samples too few to spare are in none, -1; other samples of their sources are in one.
    """
    owner = np.arange(len(trusted))
    if source is not None:
        owner = np.unique(source, return_inverse=True)[1]
    known, others = np.unique(owner[trusted]), np.unique(owner[~trusted])
    if len(others) < 2 * folds:
        raise ValueError(
            f"there must be at least {2 * folds} samples that are not trusted, of different "
            f"sources, for {folds} folds; given {len(others)}"
        )
    spared = len(known) >= 2 * folds
    # Every fold has its share of the sources that have trusted samples.
    strata = (np.setdiff1d(others, known), known) if spared else (others,)
    of_owner = np.full(len(trusted), -1)
    for number, owners in enumerate(strata):
        order = generator("audit folds", seed, number).permutation(len(owners))
        of_owner[owners[order]] = np.arange(len(owners)) % folds
    return np.where(trusted & (not spared), -1, of_owner[owner])


def _side_by_side(heads: Sequence[Head], size: int) -> list[Sequence[Head]]:
    """The kinds of head in groups that one program trains; each keeps two averages of `size`."""
    most = max(1, MEMORY // (2 * size * heads[0].folds))
    return [heads[first : first + most] for first in range(0, len(heads), most)]


def _held_out(
    x: np.ndarray, labels: np.ndarray, trusted: np.ndarray, inside: np.ndarray, fold: np.ndarray,
    heads: Sequence[Head], seed: int, *, given: bool = True,
) -> list[np.ndarray]:  # fmt: skip
    """What the head that did not see a sample believes of it, f32[N, K] for each kind of head.

    Of trusted samples that are in no fold, what all heads believe on average.

    Args:
      x, labels, trusted, fold, heads, seed: of the samples; labels f32[N, K].
      inside: bool[N], those that train.
      given: whether these are the given labels, for a rule to doubt.
    """
    order = np.argsort(trusted, kind="stable")  # a run's last samples are its trusted ones
    x, labels, fold, inside = x[order], labels[order], fold[order], inside[order]
    others = int((~trusted).sum())
    number, size = labels.shape
    told = given and others < number

    def pool(rows):
        index = np.arange(len(labels[rows]), dtype=np.int32)
        return Batch(x[rows], labels[rows], index >= 0, index)

    run = RunInfo(number, size, num_trusted=number - others if told else 0)
    pools = Streams(pool(slice(None)), pool(slice(others, None)) if told else None)
    folds = range(heads[0].folds)
    parts = [np.flatnonzero((fold != k) & inside) for k in folds]
    vals = [np.flatnonzero(fold[others:] != k) for k in folds]
    # Folds differ in size, and the members of a sweep have one shape.
    heads = [_of_size(head, min(len(rows) for rows in parts)) for head in heads]
    head = heads[0]
    val_batch_size = max(1, min(VAL, *(len(rows) - 1 for rows in vals))) if told else None
    members = [*folds] * len(heads)  # all kinds see the same batches
    seeds = [int(generator("audit head", seed, k).integers(2**31)) for k in members]
    stream = StackedStream([
        PartStream(
            Streams(parts[k], vals[k] if told else None),
            batch_size=head.batch_size, val_batch_size=val_batch_size, seed=own,
        )
        for k, own in zip(members, seeds)
    ])  # fmt: skip
    # A rule must not start from no belief. Two programs: a branch would copy its memory each step.
    phases = (
        [(False, max(1, head.steps // 4)), (True, head.steps)] if told else [(False, head.steps)]
    )
    method = _method(run, head, doubts=False)
    init = jax.jit(method.init)
    state = parallel.stack_states([init(jax.random.key(own), x[:1]) for own in seeds])
    for doubts, until in phases:
        if doubts:
            method = _method(run, head, doubts)
            state = state._replace(extra=_with_rule(state.extra, method, x[:1], len(seeds)))
        runner = _sweep_runner(run, heads, doubts).hold(pools)
        try:
            result = train.fit(
                runner, state, stream, num_steps=until, log_every=until, progress=False
            )
        except train.Diverged as error:
            raise ValueError(f"head must not diverge; given {heads}: {error}") from error
        state = result.completed()  # heads trained by half are no audit
    beliefs = []
    for first in range(0, len(members), len(folds)):
        probs = np.zeros((number, size), np.float32)
        for k in folds:
            rows = np.flatnonzero((fold == k) | (fold == -1))
            own = parallel.member(state, first + k)
            probs[rows] += train.probabilities(method, own, x[rows], batch_size=ROWS)
        probs /= probs.sum(1, keepdims=True)
        beliefs.append(probs[np.argsort(order)])
    return beliefs


def _of_size(head: Head, size: int) -> Head:
    """The head with the steps and the batches that it has of so many samples."""
    batch_size = min(head.batch_size, size)
    passes = max(math.ceil(head.epochs * size / batch_size), LEAST_STEPS)
    return dataclasses.replace(head, steps=min(head.steps, passes), batch_size=batch_size)


def _with_rule(
    extra: elr.PastAndRule, method: Method, inputs: np.ndarray, members: int
) -> elr.PastAndRule:
    """The members' averages beside fresh arrays of the method's rule, which start alike."""

    @jax.jit
    def fresh(key):
        arrays = method.init(key, inputs).extra.rule
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (members, *a.shape)), arrays)

    return extra._replace(rule=fresh(jax.random.key(0)))


def _sweep_runner(run: RunInfo, heads: Sequence[Head], doubts: bool) -> parallel.Runner:
    """One program for all folds of all kinds of head."""
    options = {
        name: np.repeat([np.float32(getattr(head, name)) for head in heads], heads[0].folds)
        for name in OPTIONS
    }

    def step(state, streams, *, reduce, options):
        method = _method(run, dataclasses.replace(heads[0], **options), doubts)
        return method.step(state, streams, reduce=reduce)

    devices = jax.devices()[: math.gcd(len(heads) * heads[0].folds, jax.device_count())]
    return parallel.sweep_runner(step, options=options, devices=devices)


def _method(run: RunInfo, head: Head, doubts: bool) -> Method:
    """ELR; where it `doubts`, on the targets of SAFLEX's rule.

    The rule does not look a step ahead, since samples that do not train are judged.
    """
    network = models.Classifier(models.MLP(tuple(head.widths)), run.num_classes)
    schedule = optax.cosine_decay_schedule(head.learning_rate, head.steps)
    tx = optax.adamw(schedule, weight_decay=head.weight_decay)
    posterior = Posterior(run, lookahead=0.0, sharpness=USUAL)
    rule = Refinement(Scoring("identity"), posterior) if doubts else None
    options = elr.Options(strength=head.strength, enough=0.0)
    return elr.make(models.from_linen(network), tx, options, rule=rule, run=run)


# --- what follows of beliefs ---------------------------------------------------------------------


def _found(probs, y, trusted, told, inside, typical, groups, head, first=None) -> Audit:
    """The audit by beliefs; of a second round, with what the `first` one found likely.

    Second heads know a little of the labels that they did not see: others' posterior labels are
    from heads that saw them. So the first round says how many are wrong.
    """
    if not (inside & ~trusted).any():
        raise ValueError("there must be samples to judge; all are trusted, or unlike trusted ones")
    likely = _most_likely(probs, y, trusted, told, inside)
    first = likely if first is None else first
    likely = likely._replace(noise_rate=first.noise_rate)
    labels, weights = _posterior(probs, y, trusted, inside, likely)
    rows = np.arange(len(y))
    quality, learned = labels[rows, y], labels.argmax(1)
    utility = np.where(inside, 2 * quality - 1, -1.0).astype(np.float32)
    return Audit(
        given=y,
        learned=learned,
        probability=labels[rows, learned],
        quality=quality,
        weight=weights,
        utility=utility,
        typicality=typical,
        wrong=(quality < 0.5) & ~trusted,
        outside=~inside,
        trusted=trusted,
        labels=labels,
        beliefs=np.asarray(sharpened(jnp.asarray(probs), float(likely.power))),
        transition=np.asarray(first.confused),
        noise_rate=float(first.noise_rate),
        evidence=_evidence(probs, y, trusted, told, inside),
        head=head,
        groups={} if groups is None else _by_group(utility, np.asarray(groups)),
    )


class _Likely(NamedTuple):
    """The power of beliefs under which labels are most likely, and what goes with it.

    Attributes:
      value: mean log-likelihood of the labels that beliefs did not see; a trusted one is as likely
        as it is believed.
      logs: f32[N], of each label.
      confused: C, f32[K, K], by maximum likelihood.
      noise_rate: share of wrong labels among those that may be wrong.
      power: of beliefs.
    """

    value: jax.Array
    logs: jax.Array
    confused: jax.Array
    noise_rate: jax.Array
    power: jax.Array


def _most_likely(
    probs: np.ndarray, y: np.ndarray, trusted: np.ndarray, told: np.ndarray, inside: np.ndarray,
    *, powers: np.ndarray | None = None, wrong: bool = True,
) -> _Likely:  # fmt: skip
    """Of the powers that are tried, if labels may be `wrong` or if none is.

    `told` are the trusted samples that beliefs did not see.
    """
    if powers is None:
        powers = SHARPNESS if told.any() else UNTOLD
    arrays = tuple(map(jnp.asarray, (y, trusted, told, inside)))
    likely = [_likely(jnp.asarray(probs), power, *arrays, wrong=wrong) for power in powers]
    return max(likely, key=operator.attrgetter("value"))


@partial(jax.jit, static_argnames="wrong")
def _likely(probs, power, y, trusted, told, inside, *, wrong) -> _Likely:
    """Of one power."""
    beliefs, counted = sharpened(probs, power), inside & ~trusted
    confused = jnp.eye(probs.shape[1])
    if wrong:
        confused = transition.most_likely(beliefs, y, counted)
    chance = jnp.where(trusted, _given(beliefs, y), jnp.sum(_odds(beliefs, confused, y), 1))
    logs = jnp.log(jnp.maximum(chance, 1e-6))
    noise_rate = 1 - masked_mean(_given(_posterior_labels(beliefs, confused, y), y), counted)
    return _Likely(masked_mean(logs, counted | told), logs, confused, noise_rate, power)


def _evidence(
    probs: np.ndarray, y: np.ndarray, trusted: np.ndarray, told: np.ndarray, inside: np.ndarray
) -> float:
    """`Audit.evidence`.

        sum_i g_i / sqrt(n var(g) + 1)    g_i = log p(label i | some wrong) - log p(label i | none)

    each with the best of POWERS. The one keeps a gain of few nats from being sure, however alike
    the g_i are.

    Source: Vuong, "Likelihood Ratio Tests for Model Selection and Non-Nested Hypotheses",
    Econometrica 1989.
    """
    most_likely = partial(_most_likely, probs, y, trusted, told, inside, powers=POWERS)
    some, none = most_likely(wrong=True), most_likely(wrong=False)
    gains = np.asarray(some.logs - none.logs)[told | (inside & ~trusted)]
    return float(gains.sum() / np.sqrt(len(gains) * gains.var() + 1))


def _chosen(likely: Sequence[_Likely], told: np.ndarray) -> int:
    """The kind of head to use: the first, unless trusted labels surely say otherwise.

    They are right. Labels as given are likeliest under a head that learned which ones go wrong, if
    features tell it; so these choose where there are no others.

    Source: the rule of one standard error (here two), Breiman et al., "Classification and
    Regression Trees", 1984.
    """
    if not told.any():
        return int(np.argmax([own.value for own in likely]))
    gains = np.array([np.asarray(own.logs - likely[0].logs)[told] for own in likely])
    best = int(gains.mean(1).argmax())
    return best if gains[best].mean() > 2 * gains[best].std() / np.sqrt(told.sum()) else 0


def _posterior(
    probs: np.ndarray, y: np.ndarray, trusted: np.ndarray, inside: np.ndarray, likely: _Likely
) -> tuple[np.ndarray, np.ndarray]:
    """(learned labels f32[N, K], weights f32[N]) of what is believed.

    Raises:
      ValueError: beliefs that say nothing about the labels.
    """
    agrees = probs[np.arange(len(y)), y][inside].mean()
    chance = float(np.sum((np.bincount(y[inside]) / inside.sum()) ** 2))
    if agrees <= chance:
        raise ValueError(
            "labels must be told from features; what did not see a label gives it a probability of "
            f"{agrees:.3f}, no better than chance, {chance:.3f}"
        )
    labels, weights = _learned(probs, y, trusted, inside, likely)
    return np.asarray(labels), np.asarray(weights)


@jax.jit
def _learned(probs, y, trusted, inside, likely) -> tuple[jax.Array, jax.Array]:
    """`_posterior`."""
    prior = jax.nn.one_hot(y, probs.shape[1])
    labels = _posterior_labels(sharpened(probs, likely.power), likely.confused, y)
    labels = _with_noise(labels, y, inside & ~trusted, likely.noise_rate)
    targets = posterior_targets(
        prior, probs, likely.confused, sharpness=1.0, trusted=trusted, mask=inside
    )
    return jnp.where(trusted[:, None], prior, labels), targets.weights


def _given(labels: jax.Array, y: jax.Array) -> jax.Array:
    """The entries of the given labels, f32[N]."""
    return jnp.take_along_axis(labels, y[:, None], 1)[:, 0]


def _odds(beliefs: jax.Array, confused: jax.Array, y: jax.Array) -> jax.Array:
    """b_ik C_ky, f32[N, K]."""
    return beliefs * confused[:, y].T


def _posterior_labels(beliefs: jax.Array, confused: jax.Array, y: jax.Array) -> jax.Array:
    """b_ik C_ky / sum_l b_il C_ly, f32[N, K]."""
    odds = _odds(beliefs, confused, y)
    total = jnp.sum(odds, 1, keepdims=True)
    # A label that is never given so, and surely not right: then the belief says which is.
    possible = total > jnp.finfo(total.dtype).tiny
    return jnp.where(possible, odds / jnp.where(possible, total, 1.0), beliefs)


def _with_noise(
    labels: jax.Array, y: jax.Array, counted: jax.Array, noise_rate: jax.Array
) -> jax.Array:
    """Labels, the odds of all given ones times one factor, so that `noise_rate` of them is wrong.

    The factor is 1 for labels from which `noise_rate` was found; it is sought by halving.
    """

    right = _given(labels, y)

    def halved(_, ends):
        low, high = ends
        middle = (low + high) / 2
        odds = jnp.exp(middle) * right
        noisy = 1 - masked_mean(odds / (odds + 1 - right), counted) > noise_rate
        return jnp.where(noisy, middle, low), jnp.where(noisy, high, middle)

    low, high = jax.lax.fori_loop(0, HALVINGS, halved, (-FURTHEST, FURTHEST))
    given = jax.nn.one_hot(y, labels.shape[1]) > 0
    odds = jnp.where(given, jnp.exp((low + high) / 2) * labels, labels)
    return odds / jnp.sum(odds, 1, keepdims=True)


def _inside(typical: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """Samples that may be like the trusted ones, bool[N].

    At most a share FALSE of the others, on average, is like them after all.

    Source: Benjamini and Hochberg, "Controlling the False Discovery Rate", JRSS B 1995.
    """
    p = np.sort(typical[~trusted])
    below = p <= FALSE * np.arange(1, len(p) + 1) / len(p)
    return trusted | (typical > (p[below][-1] if below.any() else 0.0))


def typicality(x: np.ndarray, trusted: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Share of trusted samples that look at most as typical as each sample, f32[N] in (0, 1].

        p_i = (1 + #{trusted j: s_j <= s_i}) / (M + 1) ,   s_i = <w, x_i>
        w = argmin mean_trusted (1 - <w, x>)^2 + mean_others (1 + <w, x>)^2 + r |w|^2

    w is fitted on the folds without sample i, r is the one of RIDGES with the least error there. A
    sample unlike all trusted ones has a small p; one like them has a uniform p. All p are 1 if too
    few samples are trusted.

    >>> x, fold = np.float32([[0.0]] * 60 + [[9.0]] * 20), np.arange(80) % 4
    >>> p = typicality(x, trusted=np.arange(80) < 40, fold=fold)
    >>> bool(p[60:].max() < p[:60].min())
    True

    Args:
      x: f[N, D], standardised.
      trusted: bool[N], M of them.
      fold: i[N], the fold of each sample; -1 = in none.

    Source: p as in Bates et al., "Testing for outliers with conformal p-values", Annals of
    Statistics 2023, of a score that separates the two: Lee and Liu, "Learning with Positive and
    Unlabeled Examples Using Weighted Logistic Regression", ICML 2003, with squares.
    """
    if not trusted.any() or (fold[trusted] < 0).any():
        return np.ones(len(x), np.float32)
    sign = np.where(trusted, 1.0, -1.0).astype(np.float32)
    weight = np.where(trusted, 1 / trusted.sum(), 1 / (~trusted).sum()).astype(np.float32)
    places = [np.flatnonzero(fold == k) for k in range(fold.max() + 1)]
    parts = [((x[rows] * weight[rows, None]).T @ x[rows], (weight * sign)[rows] @ x[rows])
             for rows in places]  # fmt: skip
    square, moment = (sum(part) for part in zip(*parts))
    scores = np.zeros((len(RIDGES), len(x)), np.float32)
    for rows, (own_square, own_moment) in zip(places, parts):
        values, vectors = np.linalg.eigh(square - own_square)
        along = vectors.T @ (moment - own_moment)
        solved = vectors @ (along[:, None] / (np.maximum(values, 0)[:, None] + RIDGES))
        scores[:, rows] = (x[rows] @ solved).T
    s = scores[np.argmin((weight * (scores - sign) ** 2).sum(1))]
    below = np.searchsorted(np.sort(s[trusted]), s, side="right")
    return ((1 + below) / (trusted.sum() + 1)).astype(np.float32)


def _by_group(utility: np.ndarray, groups: np.ndarray) -> dict[str, pooled.Pooled]:
    names, places = np.unique(groups, return_inverse=True)
    add = jax.jit(pooled.add_utilities)
    sums = add(pooled.no_pools(len(names)), jnp.asarray(utility), jnp.asarray(places))
    found = jax.tree.map(np.asarray, jax.jit(pooled.pooled)(sums))
    return {
        str(name): pooled.Pooled(*(x[place, 0] for x in found)) for place, name in enumerate(names)
    }


# --- checks --------------------------------------------------------------------------------------


def _heads(head: Head | Sequence[Head]) -> tuple[Head, ...]:
    """The kinds of head to try."""
    heads = (head,) if isinstance(head, Head) else tuple(head or ())
    if not all(isinstance(h, Head) for h in heads) or len(set(map(_form, heads))) != 1:
        raise ValueError(
            f"head must be one Head, or several that differ in {' and '.join(OPTIONS)} alone; "
            f"given {head}"
        )
    return heads


def _form(head: Head) -> Head:
    """What kinds of head have in common."""
    return dataclasses.replace(head, widths=tuple(head.widths), weight_decay=0.0, strength=0.0)


def _checked(features, labels, trusted, source, groups, num_classes, *, name="features"):
    """(features f32[N, D] standardised, labels, trusted bool[N], K)."""
    x, y = np.asarray(features), np.asarray(labels)
    if x.ndim != 2 or not np.issubdtype(x.dtype, np.floating) or x.size == 0:
        raise ValueError(f"{name} must be floats [N, D]; given {x.dtype}{list(x.shape)}")
    checks.finite(**{name: x})
    checks.rows(len(x), labels=y, trusted=trusted, source=source, groups=groups)
    checks.integers(MOST_CLASSES, labels=y)
    size = int(y.max(initial=0)) + 1 if num_classes is None else num_classes
    checks.whole(2, num_classes=size)
    checks.integers(size, labels=y)
    known = np.zeros(len(y), bool) if trusted is None else np.asarray(trusted)
    if known.dtype != bool:
        raise ValueError(f"trusted must be bool [{len(y)}]; given {known.dtype}")
    if name == "features":
        x = fit_scale(x)(x)[:]
    return x, y.astype(np.int64), known, size
