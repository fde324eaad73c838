"""Shared aliases, array bundles and call signatures of the package; no logic.

Shapes: B samples in a batch, K classes, M validation samples, N source samples.
Every bundle is a NamedTuple of arrays, hence a pytree that jit, pmap and Orbax understand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

Array = jax.Array | np.ndarray  # on a device, or on the host
T = TypeVar("T")
PyTree = Any
Params = PyTree
ModelState = PyTree  # non-trained variables, e.g. BatchNorm's running statistics; {} when none

# (params, inputs) -> logits f32[B, K]. Evaluation mode: deterministic, rows independent.
LogitsFn = Callable[[Params, PyTree], jax.Array]
# (params, model_state, inputs, key) -> (logits f32[B, K], new model_state). Training mode.
TrainFn = Callable[[Params, ModelState, PyTree, jax.Array], tuple[jax.Array, ModelState]]
# Mean over the data-parallel axis: the identity under jit (arrays are global there), on several
# devices `core.tree.Everywhere`; `core.tree.Mean("data")` under pmap.
Reduce = Callable[[PyTree], PyTree]
# path of a parameter, joined by "/", e.g. "head/kernel" -> whether it is selected
PathPredicate = Callable[[str], bool]
# name -> (sum f32[], count f32[]); the loop divides, so that averages are exact
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Trace(NamedTuple):
    """Which operations made each row: one column per applied operation.

    >>> trace = Trace(np.array([[0]]), np.array([[0.5]]), np.array([[3]]))
    >>> trace.magnitude.shape
    (1, 1)

    Attributes:
      operation: i32[B, L], index into `augment.OPERATIONS`.
      magnitude: f32[B, L], in the operation's own units (see its docstring).
      partner: i32[B, L], source sample of the second parent; the row's own sample without one.
    """

    operation: Array
    magnitude: Array
    partner: Array


class Batch(NamedTuple):
    """Samples with their prior labels.

    >>> batch = Batch(np.zeros((2, 8)), np.eye(2), np.ones(2, bool), np.arange(2))
    >>> batch.labels.shape
    (2, 2)

    Attributes:
      inputs: pytree of arrays with leading axis B.
      labels: f32[B, K], the prior: the upstream pipeline's labels, rows in the simplex.
      mask: bool[B], False on padding rows.
      index: i32[B], source sample of each row (its index in the data set).
      trace: what upstream augmentation did to each row; None before any.
    """

    inputs: PyTree
    labels: Any  # jax.Array in a step, numpy.ndarray where batches are made
    mask: Any
    index: Any
    trace: Trace | None = None


class Streams(NamedTuple, Generic[T]):
    """What one step reads: augmented candidates, validation samples and, optionally, clean samples.

    >>> batch = Batch(np.zeros((2, 8)), np.eye(2), np.ones(2, bool), np.arange(2))
    >>> Streams(candidates=batch, val=batch).clean is None
    True

    Attributes:
      candidates: the upstream pipeline's samples; their weights and labels are learned.
      val: trusted samples whose loss directs the learning; None for methods that need none.
      clean: samples trained on unchanged (weight one, prior label), besides the candidates.
    """

    candidates: T
    val: T | None = None
    clean: T | None = None


class Targets(NamedTuple):
    """What the inner step trains on.

    >>> Targets(weights=np.ones(2), labels=np.eye(2), utility=np.zeros(2)).weights.tolist()
    [1.0, 1.0]

    Attributes:
      weights: f32[B], >= 0, global mean one over unmasked rows unless all are zero (or a method
        says otherwise).
      labels: f32[B, K], rows in the simplex.
      utility: f32[B], negative = harmful, in the rule's units: <labels, scores> in the score's
        scale.
    """

    weights: jax.Array
    labels: jax.Array
    utility: jax.Array


class SolveInfo(NamedTuple):
    """How well a linear system was solved.

    >>> SolveInfo(residual=None).residual is None
    True

    Attributes:
      residual: ||A x - b|| / ||b||, f32[]; None if no system was solved.
    """

    residual: jax.Array | None


class LinearSolve(Protocol):
    """Approximate solver of A x = b on pytrees: (matvec, rhs) -> (x, SolveInfo).

    >>> from saflex_jax import identity_solve
    >>> x, info = identity_solve(scale=0.5)(lambda v: 2 * v, np.array([4.0]))
    >>> x.tolist()
    [2.0]
    """

    def __call__(
        self, matvec: Callable[[PyTree], PyTree], rhs: PyTree
    ) -> tuple[PyTree, SolveInfo]: ...


class TrainState(NamedTuple):
    """Everything a training step reads and writes; arrays only.

    Attributes:
      step: i32[], number of steps taken.
      params: trained parameters.
      model_state: non-trained variables of the model.
      opt_state: optax state.
      key: typed PRNG key, constant; step t uses fold_in(key, t).
      extra: arrays that the method owns (score memory, meta-parameters, EMA networks); () if none.

    A part of the state with one row per source sample is a NamedTuple whose class sets
    `by_rows = True`. Its leaves share their leading axis, and a runner may split the rows among the
    devices. All other arrays are the same on every device.

    >>> import optax
    >>> from saflex_jax.core.steps import init_state
    >>> state = init_state(jax.random.key(0), {"w": np.zeros(2)}, {}, optax.sgd(0.1))
    >>> int(state.step), state.extra
    (0, ())
    """

    step: jax.Array
    params: Params
    model_state: ModelState
    opt_state: PyTree
    key: jax.Array
    extra: PyTree = ()


class Model(NamedTuple):
    """A network as pure functions; made by the adapters in `saflex_jax.models`.

    >>> from saflex_jax.models import MLP, from_linen
    >>> model = from_linen(MLP((2,)))
    >>> params, model_state = model.init(jax.random.key(0), np.zeros((1, 8), np.float32))
    >>> model.logits(params, model_state, np.zeros((5, 8), np.float32)).shape
    (5, 2)

    Attributes:
      init: (key, inputs) -> (params, model_state).
      train: TrainFn; BatchNorm uses and updates batch statistics.
      logits: (params, model_state, inputs) -> f32[B, K]; BatchNorm uses running statistics.

    For methods with several heads, train and logits give a dict of outputs (`models.Heads`) instead
    of f32[B, K].
    """

    init: Callable[[jax.Array, PyTree], tuple[Params, ModelState]]
    train: TrainFn
    logits: Callable[[Params, ModelState, PyTree], jax.Array]


class Rule(Protocol):
    """What to train on: turns candidates into targets and keeps arrays of its own between steps.

    The rules of `saflex_jax.rules` go into any method that takes a rule.

    >>> from saflex_jax.rules import AsGiven
    >>> rule: Rule = AsGiven()
    >>> rule.init(params={})
    ()
    """

    def init(self, params: Params) -> PyTree:
        """The rule's arrays before the first step, for instance a score memory; () for none.

        Args:
          params: the network's parameters.
        """
        ...

    def apply(
        self, arrays: PyTree, state: TrainState, logits_fn: LogitsFn, streams: Streams, *,
        reduce: Reduce,
    ) -> tuple[Targets, PyTree, Metrics]:  # fmt: skip
        """Targets of the candidates, the arrays after this step, and metrics to log.

        Args:
          arrays: what `init` or the last step returned.
          state: TrainState.
          logits_fn: (params, inputs) -> f32[B, K], evaluation mode.
          streams: candidates of B rows and, for rules that need them, validation samples.
          reduce: mean over the data-parallel axis.
        """
        ...


class RunInfo(NamedTuple):
    """What is known about a run before its first step.

    >>> RunInfo(num_samples=1000, num_classes=10).num_trusted
    0

    Attributes:
      num_samples: N; `Batch.index` of the candidates lies in [0, N).
      num_classes: K.
      num_trusted: number of trusted samples that also train; they come last among the N.
      num_val: M, number of validation samples; 0 = unknown.
      num_steps: number of steps; 0 = unknown.
      steps_per_epoch: N / batch size; 0 = unknown.
      counts: f[K], training samples of each class (the sum of their prior labels).
      labels: () -> the prior labels f32[N, K] of all source samples, on the host.
      upstream: text of the pipeline that made the candidates (`augment.parse`).
      axis_name: mapped axis of the step, for batch statistics under pmap; None under jit.
      blocks: labels are k * blocks + m with m always right (SLA's views).
      views: rows that each sample makes, labelled alike (SLA's); N and num_trusted count rows.
      captions: [K, T, ...], T captions of each class, as a text tower reads them.
    """

    num_samples: int
    num_classes: int
    num_trusted: int = 0
    num_val: int = 0
    num_steps: int = 0
    steps_per_epoch: float = 0.0
    counts: np.ndarray | None = None
    labels: Callable[[], np.ndarray] | None = None
    upstream: str = "identity"
    axis_name: str | None = None
    blocks: int = 1
    views: int = 1
    captions: np.ndarray | None = None


class Method(NamedTuple):
    """A training method: what `saflex_jax.methods.<name>.make` returns and the loop runs.

    >>> import optax
    >>> from saflex_jax.methods import saflex
    >>> from saflex_jax.models import MLP, from_linen
    >>> method = saflex.make(from_linen(MLP((2,))), optax.sgd(0.1))
    >>> int(method.init(jax.random.key(0), np.zeros((1, 8), np.float32)).step)
    0

    Attributes:
      init: (key, inputs) -> TrainState; `inputs` is one batch that fixes the shapes.
      step: (state, streams, *, reduce) -> (state, metrics), pure; runners compile it.
      predict: (state, inputs) -> logits f32[B, K], evaluation mode.
      targets: (state, streams) -> Targets of this batch without taking a step, to inspect a method;
        None when the method learns none.
    """

    init: Callable[[jax.Array, PyTree], TrainState]
    step: Callable[..., tuple[TrainState, Metrics]]
    predict: Callable[[TrainState, PyTree], jax.Array]
    targets: Callable[[TrainState, Streams], Targets] | None = None
