"""What a training step costs: operations, seconds and memory, as a ratio to the plain step.

    python -m benchmarks.step_cost [--json] [--out FILE] [--model NAME ...] [--rounds=5]
                                   [--figure FILE.png]

Where no model is named, classes, batch and width are varied as well.

The rules and methods of the package on six models, next to the least that each algorithm must do
(`floor`). "saflex" is the default with its memory; "saflex_..." make targets by the paper's closed
form and differ in how scores are made. A step is compiled once, ahead; operations, memory and time
are those of that executable, on one device, the state donated. Data are noise, their labels so soft
that no model can fit them: gradients neither vanish nor explode, however many steps are timed.

Counting. XLA's cost analysis counts a loop's body once, however often it runs, and a branch as its
dearest. Here bodies are multiplied by their trips (`operations`), and a method that does not do
the same at every step is counted with the step's number as a constant, over a whole period.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import reporting, timing
from saflex_jax import models
from saflex_jax.core.tree import identity
from saflex_jax.methods import METHODS, adautomix, automix, flyp, sla
from saflex_jax.rules import Posterior, Refinement, Schedule, Scoring, Simplex, VisitMean
from saflex_jax.rules.implicit import Implicit
from saflex_jax.rules.l2rw import learning_to_reweight
from saflex_jax.rules.meta_weight_net import MetaWeightNet
from saflex_jax.types import Method, PyTree, Rule, RunInfo, Streams

F = 1 / 3  # of a plain step: a forward pass; a backward pass and a JVP are two
R = 1 / 4  # validation samples for each candidate
POOL = 50_000  # source samples: rows of a score memory, and of learned targets
EVERY, ITERATIONS = 4, 10
STEPS = 4 * EVERY  # timed together, as the loop dispatches them; on slow models EVERY
SECONDS = 0.3  # of one variant in one round


# --- the models


class Model(NamedTuple):
    """A network and the data that it is trained on."""

    backbone: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a sample
    batch: int = 32  # B, candidates in a step
    classes: int = 10  # K
    slow: bool = False  # seconds a step on a CPU: fewer rounds, and some variants only counted
    text: flyp.Text | None = None  # of pairs of image and caption, on which flyp trains

    @property
    def base(self) -> str:
        """The variant that the others are compared to."""
        return "plain" if self.text is None else "flyp"


IMAGE, CNN = (32, 32, 3), partial(models.SmallCNN, (16, 32, 64, 64))
MODELS = {
    "mlp": Model(models.MLP, (30,), batch=256),
    "small_cnn": Model(CNN, IMAGE),
    # Trained on batch statistics and scored on running ones: two forward passes, not one.
    "small_cnn_batch_norm": Model(partial(CNN, norm="batch"), IMAGE),
    "resnet18": Model(models.ResNet18, IMAGE, slow=True),
    "vit_s": Model(models.ViT, IMAGE, slow=True),
    # Two towers of 2.7 and 1.9 M parameters; captions of 16 tokens.
    "clip": Model(
        partial(models.ImageTower, 32, 4, width=192, depth=6, heads=3, mlp_width=768), IMAGE,
        text=flyp.Text(depth=4, vocab_size=512, context=16, width=192, heads=3), slow=True,
    ),
}  # fmt: skip


def data(model: Model) -> Streams:
    """Noise with soft labels: R validation samples for each candidate."""

    def batch(size):
        rng = np.random.default_rng(0)
        draw = rng.normal if model.text is None else rng.uniform  # the latter as images are
        noise = draw(size=(size, *model.shape)).astype(np.float32)
        batch = timing.labelled(noise, model.classes)
        return batch._replace(labels=0.5 * batch.labels + np.float32(0.5 / model.classes))

    return Streams(batch(model.batch), batch(int(R * model.batch)))


def run_info(model: Model) -> RunInfo:
    """A pool with uniform prior labels."""
    labels = np.full((POOL, model.classes), 1 / model.classes, np.float32)
    captions = None
    if model.text is not None:
        shape = (model.classes, 2, model.text.context)
        captions = np.random.default_rng(0).integers(model.text.vocab_size, size=shape)
        captions[..., -1] = model.text.vocab_size - 1  # ends a caption
    return RunInfo(POOL, model.classes, num_steps=1000, labels=lambda: labels, captions=captions)


# --- the variants


class Variant(NamedTuple):
    """A rule in a method.

    With h the share that the training of the head has in a plain step, the matrix products of a
    step take at least floor[0] + floor[1] h plain steps; None where that depends on the model.
    """

    rule: Callable[[Model], Rule | None] = lambda model: None
    floor: tuple[float, float] | None = None
    period: int = 1  # steps after which it does the same again
    iterations: int | None = None  # trips, at most, of a loop whose end depends on the data
    timed: str = "all"  # on "quick" models, on "all", or on "none", where it is only counted
    method: str = "supervised"
    options: Any = None  # of the method
    images: bool = False  # for models of images alone


def scored(direction: str, predicate="head", *, every=1, decay=None, **options):
    """model -> refinement by the paper's closed form."""

    def rule(model):
        by = Simplex(run=run_info(model), memory=VisitMean(decay))
        return Refinement(Scoring(direction, predicate, **options), by, Schedule(every=every))

    return rule


def default(model: Model) -> Rule:
    """SAFLEX as it is without options."""
    return Refinement(Scoring(CG), Posterior(run_info(model)))


CG = f"cg({ITERATIONS}, damping=0.1)"
# Floors: the plain step, which has the candidates' forward pass in it already, and
#   the validation gradient: R, all parameters; R F + R h / 3, the head's;
#   the scores: a JVP, 2 F; the other side of a finite difference, F; a product, h / 3, the head's;
#   a product of CG with the curvature: a JVP and a backward pass, 4 F; 2 h / 3, the head's;
#   what is done every m-th step: divided by m; in another precision, or in chunks: F more, the
#   candidates' forward pass being no longer the training step's own.
# Only matrix products are in it. The inputs need no gradient and have no tangent, so that where the
# first layer weighs much, what goes through all layers takes a little less.
FULL, PLUS_PASS = (1 + R + 2 * F, 0), (1 + R + 3 * F, 0)
# A product and its transpose each iteration, and for the residual; the first iterate is zero.
SOLVES = 2 * (ITERATIONS + 1)
HEAD, HEAD_CG = (1 + R * F, (R + 1) / 3), (1 + R * F, (R + 1 + SOLVES) / 3)
VARIANTS = {
    "plain": Variant(floor=(1, 0)),
    "saflex": Variant(default, HEAD_CG, iterations=ITERATIONS),
    "saflex_full": Variant(scored("identity", ""), FULL),
    "saflex_finite_difference":
        Variant(scored("identity", "", mode="finite_difference"), (1 + R + F, 0)),
    "saflex_head": Variant(scored("identity"), HEAD),
    "saflex_head_every4":
        Variant(scored("identity", val_every=EVERY),
                (1 + R * F / EVERY, (R / EVERY + 1) / 3), period=EVERY),
    "saflex_head_cg": Variant(scored(CG), HEAD_CG, iterations=ITERATIONS),
    "saflex_head_cg_memory": Variant(scored(CG, decay=0.9), HEAD_CG, iterations=ITERATIONS),
    # Gradients of convolutions in a branch or loop are some 20 times slower on a CPU
    # (docs/sharp_edges.md).
    "saflex_full_scores_every4":
        Variant(scored("identity", "", every=EVERY, decay=0.9),
                (1 + (R + 2 * F) / EVERY, 0), period=EVERY, timed="quick"),
    "saflex_full_bf16":
        Variant(scored("identity", "", compute_dtype="bfloat16"), PLUS_PASS, timed="quick"),
    "saflex_full_chunked": Variant(scored("identity", "", chunk=8), PLUS_PASS, timed="quick"),
    "saflex_full_cg":
        Variant(scored(CG, ""), (FULL[0] + SOLVES * 2 * F, 0), iterations=ITERATIONS, timed="none"),
    "l2rw": Variant(lambda model: learning_to_reweight(), FULL, timed="quick"),
    # A backward pass for the look-ahead beside the validation gradient and the JVP.
    "meta_weight_net": Variant(lambda model: MetaWeightNet(), (1 + R + 4 * F, 0), timed="quick"),
    "implicit":
        Variant(lambda model: Implicit(run_info(model)), HEAD_CG, iterations=ITERATIONS,
                timed="quick"),
    # All four views of every candidate.
    "sla_rotation":
        Variant(floor=(4, 0), method="sla", options=sla.Options("sla"), timed="quick", images=True),
    # The network twice, forward and back; its average on mixed images, forward and back to the
    # images, and on the candidates up to the feature map.
    "automix":
        Variant(method="automix", options=automix.Options(), timed="quick", images=True),
    # The same with the average's logits of the candidates, and the network a third time.
    "adautomix":
        Variant(floor=(3 + 3 * F, 0), method="adautomix", options=adautomix.Options(),
                timed="quick", images=True),
    # Both towers, on pairs.
    "flyp": Variant(method="flyp", options=flyp.Options()),
    "saflex_flyp_head": Variant(scored("identity"), method="flyp", options=flyp.Options()),
    "saflex_flyp_full": Variant(scored("identity", ""), method="flyp", options=flyp.Options()),
}  # fmt: skip


def make_method(model: Model, variant: Variant, *, wrap=identity) -> Method:
    """The variant on the model, trained by SGD with momentum; `wrap` changes the network."""
    spec, tx = METHODS[variant.method], optax.sgd(0.1, momentum=0.9)
    options = variant.options
    if model.text is not None:
        options = dataclasses.replace(options, text=model.text)
    network = spec.network(model.backbone(), model.classes, options)
    given = {"rule": variant.rule(model), "options": options, "run": run_info(model)}
    given = {name: value for name, value in given.items() if name in spec.takes}
    return spec.make(wrap(models.from_linen(network)), tx, **given)


# --- counting


def loops(jaxpr) -> Iterator[tuple[jex.core.ClosedJaxpr, int | None]]:
    """(body, trips or None where they depend on the data) of loops that are in no other loop.

    Raises:
      ValueError: a loop in a branch: nobody knows how often it runs.
    """
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            yield params["jaxpr"], params["length"]
        elif name == "while":
            yield params["body_jaxpr"], None
        elif name == "custom_linear_solve":  # its other programs are for derivatives
            yield from loops(params["jaxprs"].solve.jaxpr)
        elif name == "cond" and any(list(loops(branch.jaxpr)) for branch in params["branches"]):
            raise ValueError("a loop to be counted must not be in a branch; given one")
        else:
            inner = (getattr(value, "jaxpr", value) for value in params.values())
            yield from (loop for part in inner if hasattr(part, "eqns") for loop in loops(part))


# Machine code that nobody times: same operations, same buffers, two thirds of the time to compile.
QUICKLY = {"xla_backend_optimization_level": 0}


def operations(
    traced: jax.stages.Traced, compiled: jax.stages.Compiled, iterations: int | None = None
) -> float:
    """Floating-point operations of one call: XLA's count, each loop's body times its trips.

        count(c) = once(c) + sum over loops in c of trips * count(body) - once(body)

    A body is counted as a program of its own.

    Args:
      traced, compiled: the same function, for a CPU.
      iterations: trips of a loop whose length is not known at compile time.

    Raises:
      ValueError: a branch (XLA counts the dearest), or a loop of unknown length without iterations.
    """
    if " conditional(" in compiled.as_text():
        raise ValueError("the step must hold no branch to be counted; given a conditional")

    def extra(jaxpr):  # what the loops in a program do beyond their first trips
        more = 0.0
        for body, trips in loops(jaxpr):
            trips = iterations if trips is None else trips
            if trips is None:
                raise ValueError("iterations must be given for a loop of unknown length")
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in body.in_avals]
            alone = jax.jit(jex.core.jaxpr_as_fun(body)).lower(*shapes).compile(QUICKLY)
            once = alone.cost_analysis()["flops"]
            more += trips * (once + extra(body.jaxpr)) - once
        return more

    return compiled.cost_analysis()["flops"] + extra(traced.jaxpr.jaxpr)


class Step(NamedTuple):
    """A compiled step."""

    run: Callable[[PyTree, Streams], tuple[PyTree, dict]]  # donates its state
    new_state: Callable[[], PyTree]
    flops: float  # mean over a period
    temp_bytes: int  # beyond arguments and results


def compile_step(method: Method, streams: Streams, variant: Variant, *, fast: bool = True) -> Step:
    """Compiles and counts; without `fast` machine code that is not to be timed."""
    init = partial(method.init, jax.random.key(0), streams.candidates.inputs[:1])
    state = jax.eval_shape(init)

    def traced(number=None):
        def step(state, streams):
            if number is not None:
                state = state._replace(step=np.int32(number))
            new, metrics = method.step(state, streams, reduce=identity)
            return new if number is None else new._replace(step=()), metrics

        return jax.jit(step, donate_argnums=0).trace(state, streams)

    whole = traced()
    executable = whole.lower().compile({} if fast else QUICKLY)
    if variant.period == 1:
        flops = operations(whole, executable, variant.iterations)
    else:
        steps = [traced(number) for number in range(variant.period, 2 * variant.period)]
        flops = np.mean([operations(step, step.lower().compile(QUICKLY)) for step in steps])
    return Step(executable, init, float(flops), executable.memory_analysis().temp_size_in_bytes)


# --- measuring


def slow_rounds(rounds: int) -> int:
    """Of slow models fewer, about half."""
    return max(rounds // 2, 1)


class Point:
    """One model, what is found of its variants, and the series that times them."""

    def __init__(self, title: str, model: Model, rounds: int, names=tuple(VARIANTS), timed=True):
        def is_timed(variant):
            return variant.timed == "all" or (variant.timed == "quick" and not model.slow)

        def fits(name):
            variant, pairs = VARIANTS[name], model.text is not None
            return (len(model.shape) == 3 or not variant.images) and pairs == (
                variant.method == "flyp"
            )

        self.model, self.steps = model, {}
        self.variants = {name: VARIANTS[name] for name in names if fits(name)}
        self.timed = [name for name, v in self.variants.items() if timed and is_timed(v)]
        self.steps_in_job = EVERY if model.slow else STEPS
        rounds, seconds = (slow_rounds(rounds), 0.0) if model.slow else (rounds, SECONDS)
        self.series = timing.Series(title, self.timed, self.setups, rounds, seconds)

    def setups(self) -> dict[str, timing.Setup]:
        """Compiles and counts all variants; what makes the jobs of those that are timed."""
        jax.clear_caches()  # programs of all models are more memory maps than a process may hold
        streams = jax.device_put(data(self.model))
        for name, variant in self.variants.items():
            try:
                method = make_method(self.model, variant)
                self.steps[name] = compile_step(method, streams, variant, fast=name in self.timed)
            except Exception as error:  # the others go on
                self.series.failed[name] = timing.reason(error)
        return {name: partial(self.job, name, streams) for name in self.timed}

    def job(self, name: str, streams: Streams) -> timing.Job:
        """Some steps of a variant; a whole number of periods."""
        step = self.steps[name]
        state = jax.tree.map(jnp.copy, step.new_state())  # what is donated is nobody else's
        batches = itertools.repeat(streams)
        return timing.steps_of(step.run, state, batches, steps=self.steps_in_job)

    def head_flops(self) -> float:
        """What training the head takes: forward, gradients of its kernel and of its inputs."""
        params = jax.eval_shape(self.steps[self.model.base].new_state).params
        kernels = sum(x.size for x in jax.tree.leaves(params["head"]) if x.ndim == 2)
        return 3 * 2 * self.model.batch * kernels

    def row(self, name: str) -> dict[str, float | None]:
        """A variant's numbers, None where there is none."""
        step, plain = self.steps.get(name), self.steps.get(self.model.base)
        floor = VARIANTS[name].floor
        head = plain and self.head_flops()
        extra = step.flops - plain.flops if step and plain else None
        seconds = [value / self.steps_in_job for value in self.series.times(name)]
        ratios = self.series.ratios(name, self.model.base)
        return {
            "flops": step and step.flops,
            "seconds": timing.median(seconds),
            "spread": timing.spread(seconds),
            "temp_bytes": step and step.temp_bytes,
            "floor": floor[0] + floor[1] * head / plain.flops if floor and plain else None,
            "flops_ratio": step.flops / plain.flops if step and plain else None,
            "seconds_ratio": timing.median(ratios),
            "seconds_ratio_spread": timing.spread(ratios),
            "extra_flops": extra,
            "extra_in_head_costs": reporting.ratio(extra, head),
        }

    def rows(self) -> dict[str, dict]:
        """variant -> its numbers."""
        return {name: self.row(name) for name in self.variants}

    def why_null(self) -> dict[str, str]:
        """variant -> why it has no seconds, or no numbers at all."""
        counted = [n for n in self.variants if n in self.steps and n not in self.timed]
        floorless = [f"{n} floor" for n, variant in self.variants.items() if variant.floor is None]
        return (
            dict.fromkeys(self.variants.keys() - self.steps.keys(), "interrupted")
            | dict.fromkeys(counted if self.timed else (), "seconds: counted only")
            | dict.fromkeys(floorless, "depends on the model")
            | self.series.why_null()
        )


SCALED = ("plain", "saflex_full", "saflex_head", "saflex_head_cg")


def scaling_points(rounds: int) -> dict[tuple[str, str, str], Point]:
    """(what is varied, model, value) -> point; slow models are only counted."""
    points = {}

    def vary(what, name, value, **changes):
        model, title = MODELS[name]._replace(**changes), f"{name}, {what} {value}"
        point = Point(title, model, rounds, SCALED, timed=not model.slow)
        points[what, name, str(value)] = point

    for name, k in itertools.product(("mlp", "small_cnn", "resnet18"), (10, 100, 1000, 21_000)):
        vary("classes", name, k, classes=k)
    for b in (16, 32, 64, 128, 256):
        vary("batch", "small_cnn", b, batch=b)
    for w in (16, 32, 64):
        vary("width", "resnet18", w, backbone=partial(models.ResNet18, width=w))
    return points


def shared_forward(rows: Mapping[str, dict]) -> bool | None:
    """Whether all-parameter scores run no forward pass of their own, to 2 % of their floor."""
    full = rows.get("saflex_full")
    if full is None or full["flops_ratio"] is None:
        return None
    return full["flops_ratio"] <= 1.02 * full["floor"]


class StepCost(reporting.Benchmark):
    """The benchmark: models, and what is varied of them."""

    packages = ("jax", "jaxlib", "flax", "optax", "numpy")

    @staticmethod
    def add_options(parser):
        """--model."""
        parser.add_argument("--model", nargs="+", choices=tuple(MODELS), help="default: all")

    def __init__(self, options):
        if jax.default_backend() != "cpu":  # elsewhere products are library calls, not counted
            raise ValueError(f"JAX_PLATFORMS must be cpu to count; given {jax.default_backend()}")
        names, self.rounds = options.model or MODELS, options.rounds
        self.points = {name: Point(name, MODELS[name], self.rounds) for name in names}
        self.scaling = {} if options.model else scaling_points(self.rounds)
        self.series = [p.series for p in (*self.points.values(), *self.scaling.values())]

    def report(self):
        """Rows, scaling, reasons."""
        report = {name: point.rows() for name, point in self.points.items()}
        why_null = {at: point.why_null() for at, point in self.scaling.items()}
        return report | {
            "shared_forward": {name: shared_forward(report[name]) for name in self.points},
            "scaling": reporting.nested({at: p.rows() for at, p in self.scaling.items()}),
            "why_null": {name: point.why_null() for name, point in self.points.items()}
            | {"scaling": reporting.nested(why_null)},
            "machine": {"rounds_on_slow_models": slow_rounds(self.rounds), "seed": 0},
        }

    @staticmethod
    def draw(report, file):
        """Ratios to the plain step: bars of operations, dots of time, floors as ticks."""
        from experiments import style

        names, longest = list(report["shared_forward"]), 3.2
        dot = {"color": style.ALL, "marker": "o", "ms": 5, "mec": style.PAPER, "ls": ""}
        tick = {"color": style.INK, "marker": "|", "ms": 10, "mew": 1.5, "ls": ""}
        with style.look():
            figure = style.figure(4.2, "What does a step cost, in plain steps of the same network?")
            axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
            for axis, name in zip(axes, names):
                rows = report[name]
                lengths, seconds, floors = (
                    {variant: row[key] for variant, row in rows.items()}
                    for key in ("flops_ratio", "seconds_ratio", "floor")
                )
                places = range(len(rows))
                cut = [min(length or np.nan, longest) for length in lengths.values()]
                axis.barh(places, cut, color=style.HELD_OUT, height=0.7)
                axis.plot([floor or np.nan for floor in floors.values()], places, **tick)
                axis.plot([min(s or np.nan, longest) for s in seconds.values()], places, **dot)
                for place, length in enumerate(lengths.values()):
                    text = (
                        ""
                        if length is None
                        else f"{length:.2f}"
                        if length < 10
                        else f"{length:.1f}"
                    )
                    axis.text(1.25, place, text, va="center", ha="right", fontsize=style.SMALL,
                              transform=axis.get_yaxis_transform())  # fmt: skip
                axis.axvline(1, color=style.INK, lw=0.8, zorder=0)
                axis.set_title(textwrap.fill(name.replace("_", " "), 10))
                axis.set(xlim=(0, 1.05 * longest), ylim=(len(rows) - 0.4, -0.6))
                axis.set_xlabel("plain steps")
                axis.tick_params(axis="y", length=0)
            axes[0].set_yticks(places, list(rows))
            bar = {"color": style.HELD_OUT, "marker": "s", "ls": ""}
            style.key(figure, {
                "operations (bar and number; cut at the edge)": bar,
                "the floor, counted by hand": tick,
                "time (cut at the edge)": dot,
            })  # fmt: skip
            style.save(figure, file)


main = partial(reporting.command, StepCost)

if __name__ == "__main__":
    sys.exit(main())
