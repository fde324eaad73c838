"""What a training step costs: operations, seconds and memory, as a ratio to the plain step.

    python -m benchmarks.step_cost [--json] [--out FILE] [--model NAME ...] [--rounds=5]
                                   [--[no-]scaling] [--[no-]parts] [--figure FILE.png]

The methods of the package on five models, next to the least that its algorithm must do (`floor`).
A step is compiled once, ahead; operations, memory and time are those of that executable, run as
`jit_runner` runs it: on one device, the state donated. Data are noise, their labels so soft that no
model can fit them: gradients neither vanish nor explode, however many steps are timed.

Counting. XLA's cost analysis counts a loop's body once, however often it runs, and a branch as its
dearest. Here bodies are multiplied by their trips (`operations`), and a method that does not do
the same at every step is counted with the step's number as a constant, over a whole period.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from benchmarks import timing
from saflex_jax import models, types
from saflex_jax.core.losses import weighted_cross_entropy
from saflex_jax.core.tree import identity, under
from saflex_jax.methods import METHODS, NETWORKS, automix
from saflex_jax.types import Batch, Method, PyTree, Streams

F = 1 / 3  # of a plain step: a forward pass; a backward pass and a JVP are two
R = 1 / 4  # validation samples for each candidate
POOL = 50_000  # source samples: rows of a score memory, and of learned targets
EVERY, ITERATIONS, CHUNK, VIEWS = 4, 10, 8, 4
STEPS = 4  # timed together, as the loop dispatches them; on slow models as few as a period has
SECONDS = 0.3  # of one variant in one round
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


# --- the models


class Model(NamedTuple):
    """A network and the data that it is trained on.

    Attributes:
      backbone: makes it.
      shape: of a sample.
      last_stage: paths of its last stage, a quarter of the network or its last layer.
      batch: B, candidates in a step.
      classes: K.
      slow: a step takes seconds on a CPU: fewer rounds, and some variants are only counted.
    """

    backbone: Callable[[], nn.Module]
    shape: tuple[int, ...]
    last_stage: tuple[str, ...]
    batch: int = 32
    classes: int = 10
    slow: bool = False


IMAGE = (32, 32, 3)
MODELS = {
    "mlp": Model(models.MLP, (30,), ("Dense_1",), batch=256),
    "small_cnn": Model(partial(models.SmallCNN, (16, 32, 64, 64)), IMAGE, ("Conv_3", "Norm_3")),
    # Trained on batch statistics and scored on running ones: two forward passes, not one.
    "small_cnn_batch_norm": Model(
        partial(models.SmallCNN, (16, 32, 64, 64), norm="batch"), IMAGE, ("Conv_3", "Norm_3")
    ),
    "resnet18": Model(
        models.ResNet18,
        IMAGE,
        tuple([f"Conv_{n}" for n in range(14, 19)] + [f"Norm_{n}" for n in range(15, 20)]),
        slow=True,
    ),
    "vit_s": Model(models.ViT, IMAGE, ("block_9", "block_10", "block_11", "norm"), slow=True),
}


def data(model: Model) -> Streams:
    """Noise with soft labels: R validation samples for each candidate."""
    rng = np.random.default_rng(0)

    def batch(size):
        labels = np.full((size, model.classes), 0.5 / model.classes, np.float32)
        labels[np.arange(size), rng.integers(model.classes, size=size)] += 0.5
        inputs = rng.normal(size=(size, *model.shape)).astype(np.float32)
        return Batch(inputs, labels, np.ones(size, bool), np.arange(size, dtype=np.int32))

    return Streams(batch(model.batch), batch(int(R * model.batch)))


# --- the variants


class Variant(NamedTuple):
    """A method with its options.

    Attributes:
      method: name in METHODS.
      options: of the method, for a model.
      floor: h -> plain steps that its matrix products take at least, the training of the head being
        h of a plain step (so that one product with the head's kernel is h / 3); None where it
        depends on the model.
      period: steps after which it does the same again.
      iterations: trips, at most, of a loop whose end depends on the data.
      dear: only counted on slow models.
      timed: False = only counted on every model.
      images: for models of images alone.
    """

    method: str
    options: Callable[[Model], dict] = lambda model: {}
    floor: Callable[[float], float] | None = None
    period: int = 1
    iterations: int | None = None
    dear: bool = False
    timed: bool = True
    images: bool = False


def _options(**given) -> Callable[[Model], dict]:
    return lambda model: given


def _last_stage(model: Model) -> dict:
    names = [f"backbone/{name}" for name in model.last_stage]
    return {"direction": "identity", "predicate": under("head", *names)}


def _memory(model: Model) -> dict:
    return {"memory_decay": 0.9, "num_samples": POOL, "num_classes": model.classes}


def _pool(model: Model) -> dict:
    return {"prior": np.full((POOL, model.classes), 1 / model.classes, np.float32)}


FULL = {"direction": "identity", "predicate": None}
HEAD = {"direction": "identity"}  # the default predicate
CG = {"direction": "cg", "iterations": ITERATIONS}
# A product and its transpose each iteration, and for the residual; the first iterate is zero.
SOLVES = 2 * (ITERATIONS + 1)

# What is added to the plain step, which has the candidates' forward pass in it already. Only matrix
# products are in it. The inputs need no gradient and have no tangent, so that where the first layer
# weighs much, what goes through all layers takes a little less than this.
#   the validation gradient: R, all parameters; R F + R h / 3, the head's;
#   the scores: a JVP, 2 F; the other side of a finite difference, F; a product, h / 3, the head's;
#   a product of CG with the curvature: a JVP and a backward pass, 4 F; 2 h / 3, the head's;
#   what is done every m-th step: divided by m; in another precision, or in chunks: F more, the
#   candidates' forward pass being no longer the training step's own.
VARIANTS = {
    "plain": Variant("erm", floor=lambda h: 1),
    "saflex_full": Variant("saflex", _options(**FULL), lambda h: 1 + R + 2 * F),
    "saflex_finite_difference": Variant(
        "saflex", _options(**FULL, mode="finite_difference"), lambda h: 1 + R + F
    ),
    "saflex_last_stage": Variant("saflex", _last_stage),
    "saflex_head": Variant("saflex", _options(**HEAD), lambda h: 1 + R * F + (R + 1) * h / 3),
    "saflex_head_every4": Variant(
        "saflex",
        _options(**HEAD, val_every=EVERY),
        lambda h: 1 + (R * F + R * h / 3) / EVERY + h / 3,
        period=EVERY,
    ),
    "saflex_head_cg": Variant(
        "saflex",
        _options(**CG),
        lambda h: 1 + R * F + (R + 1 + SOLVES) * h / 3,
        iterations=ITERATIONS,
    ),
    "saflex_head_cg_memory": Variant(
        "saflex",
        lambda model: CG | _memory(model),
        lambda h: 1 + R * F + (R + 1 + SOLVES) * h / 3,
        iterations=ITERATIONS,
    ),
    "saflex_full_scores_every4": Variant(
        "saflex",
        lambda model: FULL | _memory(model) | {"every": EVERY},
        lambda h: 1 + (R + 2 * F) / EVERY,
        period=EVERY,
        dear=True,  # of convolutions in a branch, see below
    ),
    "saflex_full_bf16": Variant(
        "saflex",
        _options(**FULL, compute_dtype="bfloat16"),
        lambda h: 1 + R + 3 * F,
        dear=True,
    ),
    "saflex_full_chunked": Variant(
        "saflex", _options(**FULL, chunk=CHUNK), lambda h: 1 + R + 3 * F, dear=True
    ),
    # Gradients of convolutions in a loop or branch are some 20 times slower on a CPU
    # (docs/sharp_edges.md).
    "saflex_full_cg": Variant(
        "saflex",
        _options(**CG, predicate=None),
        lambda h: 1 + R + 2 * F + SOLVES * 2 * F,
        iterations=ITERATIONS,
        timed=False,
    ),
    "l2rw": Variant("l2rw", floor=lambda h: 1 + R + 2 * F, dear=True),
    # A backward pass for the look-ahead beside the validation gradient and the JVP.
    "meta_weight_net": Variant("meta_weight_net", floor=lambda h: 1 + R + 4 * F, dear=True),
    "implicit": Variant(
        "implicit",
        _pool,
        lambda h: 1 + R * F + (R + 1 + SOLVES) * h / 3,
        iterations=ITERATIONS,
        dear=True,
    ),
    # All views of every candidate.
    "sla_rotation": Variant("sla", _options(mode="sla"), lambda h: VIEWS, dear=True, images=True),
    # The network twice, forward and back; its average on mixed images, forward and back to the
    # images, and on the candidates up to the feature map.
    "automix": Variant("automix", _options(num_steps=1000), dear=True, images=True),
    # The same with the average's logits of the candidates, and the network a third time.
    "adautomix": Variant(
        "automix",
        _options(num_steps=1000, **automix.ADAUTOMIX),
        lambda h: 3 + 3 * F,
        dear=True,
        images=True,
    ),
}


def make_network(model: Model, method: str = "erm") -> types.Model:
    """The classifier, or the network that a method needs."""
    network = NETWORKS.get(method, models.Classifier)
    return models.from_linen(network(model.backbone(), model.classes))


def make_method(model: Model, variant: Variant) -> Method:
    """The variant on the model, trained by SGD with momentum."""
    network, tx = make_network(model, variant.method), optax.sgd(0.1, momentum=0.9)
    return METHODS[variant.method](network, tx, **variant.options(model))


# --- the parts of a step, alone: what explains a ratio of times that is not that of operations

# Network (params, batch) -> logits, params, streams -> the part's results. In a branch: one that is
# always taken, which the compiler does not know.
PARTS = {
    "forward": lambda net, params, of: net(params, of.candidates),
    "gradient": lambda net, params, of: _gradient(net, params, of.candidates),
    "jvp": lambda net, params, of: jax.jvp(lambda p: net(p, of.candidates), (params,), (params,)),
    "validation_forward": lambda net, params, of: net(params, of.val),
    "validation_gradient": lambda net, params, of: _gradient(net, params, of.val),
}
BRANCHED = ("validation_forward", "validation_gradient")


def _gradient(net, params, batch):
    return jax.grad(lambda p: jnp.mean(weighted_cross_entropy(net(p, batch), batch.labels)))(params)


def part_job(model: Model, name: str, streams: Streams, *, branch: bool) -> timing.Job:
    """Runs one part of the step, and waits for it."""
    network = make_network(model)
    params, model_state = jax.jit(network.init)(jax.random.key(0), streams.candidates.inputs[:1])

    def alone(params, streams):
        net = lambda params, batch: network.logits(params, model_state, batch.inputs)
        return PARTS[name](net, params, streams)

    def run(params, streams):
        if not branch:
            return alone(params, streams)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(alone, params, streams))
        taken = streams.candidates.mask[0]
        return jax.lax.cond(taken, alone, lambda params, streams: nothing, params, streams)

    compiled = jax.jit(run)
    return lambda: jax.block_until_ready(compiled(params, streams))


# --- counting


def operations(compiled: jax.stages.Compiled, iterations: int | None = None) -> float:
    """Floating-point operations of one call: XLA's count, each loop's body times its trips.

        count(c) = once(c) + sum over loops in c of trips * count(body) - once(body)

    Args:
      compiled: for a CPU.
      iterations: trips of a loop whose length is not known at compile time.

    Raises:
      ValueError: a branch (XLA counts the dearest), or a loop of unknown length without iterations.
    """
    # JAX shows the count of whole modules only; a body is counted as the entry of one.
    from jax._src.lib import _jax, xla_client

    text = re.sub(r"^HloModule.*", "HloModule step", compiled.as_text())
    if " conditional(" in text:
        raise ValueError("the step must hold no branch to be counted; given a conditional")
    entry = re.search(r"^ENTRY %([\w.-]+) ", text, re.M)[1]
    text = text.replace("\nENTRY ", "\n")
    code = {m[1]: m[0] for m in re.finditer(r"^%([\w.-]+) \(.*?^}", text, re.M | re.S)}
    client = jax.devices("cpu")[0].client

    def once(name):
        module = text.replace(f"\n%{name} (", f"\nENTRY %{name} (")
        module = xla_client.hlo.hlo_module_from_text(module)
        return _jax.hlo_module_cost_analysis(client, module)["flops"]

    def trips(loop):
        known = re.search(r'"known_trip_count":{"n":"(\d+)"}', loop)
        if known is None and iterations is None:
            raise ValueError("iterations must be given for a loop of unknown length; given None")
        return iterations if known is None else int(known[1])

    def extra(name):  # what the loops in a computation do beyond their first trips
        more = sum(map(extra, re.findall(r" call\(.*to_apply=%([\w.-]+)", code[name])))
        for loop in re.findall(r" while\(.*", code[name]):
            body = re.search(r"body=%([\w.-]+)", loop)[1]
            more += trips(loop) * (once(body) + extra(body)) - once(body)
        return more

    return once(entry) + extra(entry)


class Step(NamedTuple):
    """A compiled step.

    Attributes:
      run: (state, streams) -> (state, metrics); the state is donated. None once it is measured.
      new_state: makes one.
      flops: of a step, the mean over a period.
      temp_bytes: beyond arguments and results.
    """

    run: Callable[[PyTree, Streams], tuple[PyTree, dict]] | None
    new_state: Callable[[], PyTree]
    flops: float
    temp_bytes: int


# Machine code that nobody times: same operations, same buffers, two thirds of the time to compile.
QUICKLY = {"xla_backend_optimization_level": 0}


def compile_step(method: Method, streams: Streams, variant: Variant, *, fast: bool = True) -> Step:
    """Compiles and counts; without `fast` machine code that is not to be timed."""
    init = partial(method.init, jax.random.key(0), streams.candidates.inputs[:1])
    state = jax.eval_shape(init)

    def lowered(number):
        def step(state, streams):
            if number is not None:
                state = state._replace(step=np.int32(number))
            new, metrics = method.step(state, streams, reduce=identity)
            return new if number is None else new._replace(step=()), metrics

        return jax.jit(step, donate_argnums=0).lower(state, streams)

    executable = lowered(None).compile({} if fast else QUICKLY)
    if variant.period == 1:
        flops = operations(executable, variant.iterations)
    else:
        steps = [lowered(number) for number in range(variant.period, 2 * variant.period)]
        programs = {step.as_text(): step for step in steps}  # the same one is compiled once
        counts = {
            text: operations(step.compile(QUICKLY), variant.iterations)
            for text, step in programs.items()
        }
        flops = float(np.mean([counts[step.as_text()] for step in steps]))
    temp_bytes = executable.memory_analysis().temp_size_in_bytes
    return Step(executable, init, flops, temp_bytes)


# --- measuring


class Point(NamedTuple):
    """One model and its variants, with what is found of them; filled in place.

    Attributes:
      model: see `Model`.
      variants: their names; "plain" is one.
      timed: False = counted only.
      parts: whether those of a step are timed, too.
      steps: name -> what was compiled.
      run: seconds of one step and reasons for what is missing.
    """

    model: Model
    variants: tuple[str, ...]
    timed: bool
    parts: bool
    steps: dict[str, Step]
    run: timing.Run


def point(
    model: Model,
    variants: tuple[str, ...] = tuple(VARIANTS),
    timed: bool = True,
    parts: bool = False,
) -> Point:
    """A point of which nothing is known yet; without what needs images where there are none."""
    images = len(model.shape) == 3
    variants = tuple(name for name in variants if images or not VARIANTS[name].images)
    return Point(model, variants, timed, parts, {}, timing.Run({}, {}))


def timed(at: Point) -> list[str]:
    """The variants of a point that are timed."""
    if not at.timed:
        return []
    cheap = lambda variant: variant.timed and not (at.model.slow and variant.dear)
    return [name for name in at.variants if cheap(VARIANTS[name])]


def part_setups(at: Point, streams: Streams | None = None) -> dict[str, Callable]:
    """Name -> what makes the job, for the parts that are timed."""
    if not at.parts:
        return {}
    made = {name: partial(part_job, at.model, name, streams, branch=False) for name in PARTS}
    if at.model.slow:
        return made
    return made | {
        f"{name}_in_branch": partial(part_job, at.model, name, streams, branch=True)
        for name in BRANCHED
    }


def slow_rounds(rounds: int) -> int:
    """Of slow models fewer, about half."""
    return max(rounds // 2, 1)


def rounds_of(model: Model, rounds: int) -> int:
    """Rounds in which this model's steps are timed."""
    return slow_rounds(rounds) if model.slow else rounds


def job(step: Step, streams: Streams, steps: int) -> timing.Job:
    """Runs this many steps, one after the other, and waits for the last."""
    # Copied: what is donated must be nobody else's.
    state = jax.tree.map(jnp.copy, step.new_state())

    def run():
        nonlocal state
        for _ in range(steps):
            state, metrics = step.run(state, streams)
        if not np.isfinite(metrics["loss"][0]):
            raise FloatingPointError("the loss is not finite")

    return run


def steps_in_job(model: Model, variant: Variant) -> int:
    """A whole number of periods."""
    return variant.period if model.slow else STEPS * variant.period


def measure(at: Point, *, rounds: int, bar: tqdm.tqdm) -> None:
    """Compiles, counts and times the variants of a point."""
    streams = jax.device_put(data(at.model))
    for name in at.variants:
        bar.set_postfix_str(f"compiles {name}")
        try:
            method = make_method(at.model, VARIANTS[name])
            fast = name in timed(at)
            at.steps[name] = compile_step(method, streams, VARIANTS[name], fast=fast)
        except Exception as error:  # the others go on
            at.run.failed[name] = f"{type(error).__name__}: {error}"
        bar.update()
    setups = {
        name: partial(job, at.steps[name], streams, steps_in_job(at.model, VARIANTS[name]))
        for name in timed(at)
        if name in at.steps
    }
    setups |= part_setups(at, streams)
    seconds = 0.0 if at.model.slow else SECONDS
    rounds = rounds_of(at.model, rounds)
    timing.interleaved(setups, at.run, rounds=rounds, seconds=seconds, bar=bar)
    # The programs of all models together are more memory maps than a process may hold.
    at.steps.update({name: step._replace(run=None) for name, step in at.steps.items()})
    jax.clear_caches()


def length(at: Point, rounds: int) -> int:
    """By how much `measure` advances the bar."""
    jobs = len(timed(at)) + len(part_setups(at))
    return len(at.variants) + jobs * (rounds_of(at.model, rounds) + 1)


# --- reporting


def head_flops(at: Point) -> float:
    """What training the head takes: forward, and the gradients of its kernel and of its inputs."""
    params = jax.eval_shape(at.steps["plain"].new_state).params
    features, classes = params["head"]["kernel"].shape
    return 3 * 2 * at.model.batch * features * classes


def step_seconds(at: Point, name: str) -> list[float]:
    """Of one step of a variant, a number a round."""
    count = steps_in_job(at.model, VARIANTS[name])
    return [value / count for value in at.run.seconds.get(name, [])]


def to_plain(at: Point, times: list[float]) -> list[float]:
    """Ratios, round by round: a slow moment of the machine is in both members of a pair."""
    return [a / b for a, b in zip(times, step_seconds(at, "plain"))]


def parts(at: Point) -> dict[str, float | None]:
    """part -> its seconds alone, in plain steps."""
    found = {name: to_plain(at, at.run.seconds.get(name, [])) for name in part_setups(at)}
    return {name: float(np.median(ratios)) if ratios else None for name, ratios in found.items()}


def rows(at: Point) -> dict[str, dict]:
    """variant -> its numbers, None where there is none."""
    plain = at.steps.get("plain")
    head = None if plain is None else head_flops(at)

    def row(name):
        step, floor, times = at.steps.get(name), VARIANTS[name].floor, step_seconds(at, name)
        ratios = to_plain(at, times)
        counted = step is not None and plain is not None
        extra = step.flops - plain.flops if counted else None
        return {
            "flops": None if step is None else step.flops,
            "seconds": float(np.median(times)) if times else None,
            "spread": timing.spread(times) if times else None,
            "temp_bytes": None if step is None else step.temp_bytes,
            "floor": floor(head / plain.flops) if floor and plain is not None else None,
            "flops_ratio": step.flops / plain.flops if counted else None,
            "seconds_ratio": float(np.median(ratios)) if ratios else None,
            "seconds_ratio_spread": timing.spread(ratios) if ratios else None,
            "extra_flops": extra,
            "extra_in_head_costs": extra / head if counted else None,
        }

    return {name: row(name) for name in at.variants}


def missing(at: Point) -> dict[str, str]:
    """variant -> why it has no seconds, or no numbers at all."""
    why = {}
    for name in at.variants:
        if name not in at.steps:
            why[name] = "interrupted before it was measured"
        elif at.timed and name not in timed(at):
            why[name] = "seconds: counted only"
        elif at.timed and not at.run.seconds.get(name):
            why[name] = "seconds: interrupted before it was timed"
        if VARIANTS[name].floor is None:
            why[f"{name} floor"] = "depends on the share that the last stage has in the model"
    return why | at.run.failed


def shared_forward(found: Mapping[str, dict]) -> bool | None:
    """Whether all-parameter scores run no forward pass of their own, to 2 % of their floor."""
    full = found["saflex_full"]
    return None if full["flops_ratio"] is None else full["flops_ratio"] <= 1.02 * full["floor"]


SCALED = ("plain", "saflex_full", "saflex_head", "saflex_head_cg")


def scaling_points() -> dict[str, dict[str, dict[str, Point]]]:
    """What is varied -> model -> value -> point."""
    of = partial(point, variants=SCALED)
    classes = {
        name: {
            str(k): of(MODELS[name]._replace(classes=k), timed=not MODELS[name].slow)
            for k in (10, 100, 1000, 21_000)
        }
        for name in ("mlp", "small_cnn", "resnet18")
    }
    cnn, resnet = MODELS["small_cnn"], MODELS["resnet18"]
    batch = {str(b): of(cnn._replace(batch=b)) for b in (16, 32, 64, 128, 256)}
    width = {
        str(w): of(resnet._replace(backbone=partial(models.ResNet18, width=w)), timed=False)
        for w in (16, 32, 64)
    }
    return {"classes": classes, "batch": {"small_cnn": batch}, "width": {"resnet18": width}}


def leaves(points: Mapping) -> Iterator[Point]:
    """Every point of nested dicts."""
    for value in points.values():
        if isinstance(value, Point):
            yield value
        else:
            yield from leaves(value)


def mapped(function: Callable[[Point], object], points: Mapping) -> dict:
    """The function of every point of nested dicts."""
    return {
        key: function(value) if isinstance(value, Point) else mapped(function, value)
        for key, value in points.items()
    }


def report(points: dict[str, Point], scaling: dict, *, rounds: int) -> dict:
    """The JSON."""
    made = mapped(rows, points)
    made["shared_forward"] = {name: shared_forward(made[name]) for name in points}
    made["parts"] = mapped(parts, points)
    made["scaling"] = mapped(rows, scaling)
    made["why_null"] = mapped(missing, points) | {"scaling": mapped(missing, scaling)}
    made["machine"] = timing.machine(PACKAGES) | {
        "rounds": rounds,
        "rounds_on_slow_models": slow_rounds(rounds),
        "seed": 0,
    }
    return made


# --- for people


def _show(value: float | None, digits: int) -> str:
    return "null" if value is None else f"{value:,.{digits}f}"


def _table(found: Mapping[str, dict]) -> list[str]:
    heads = ("GFLOP", "ratio", "floor", "seconds", "ratio", "IQR", "MiB")
    lines = [f"  {'':26}" + "".join(f"{head:>10}" for head in heads)]
    for name, row in found.items():
        cells = (
            (row["flops"] and row["flops"] / 1e9, 3),
            (row["flops_ratio"], 3),
            (row["floor"], 3),
            (row["seconds"], 4),
            (row["seconds_ratio"], 3),
            (row["seconds_ratio_spread"], 3),
            (row["temp_bytes"] and row["temp_bytes"] / 2**20, 0),
        )
        lines.append(f"  {name:26}" + "".join(f"{_show(*cell):>10}" for cell in cells))
    return lines


def table(made: dict) -> str:
    """The report for people."""
    lines = timing.header(made["machine"])
    for name, shared in made["shared_forward"].items():
        model = MODELS[name]
        lines += [
            "",
            f"{name}, batch {model.batch}; one forward pass for scores and step: {shared}",
        ]
        lines += _table(made[name])
        alone = [f"{part} {_show(ratio, 3)}" for part, ratio in made["parts"][name].items()]
        if alone:
            lines.append(f"  seconds of the parts alone, in plain steps: {', '.join(alone)}")
    for kind, by_model in made["scaling"].items():
        for name, values in by_model.items():
            lines += ["", f"{kind} of {name}: what is added, in GFLOP (in trainings of the head)"]
            lines.append(f"  {'':10}" + "".join(f"{v:>26}" for v in SCALED[1:]))
            for value, found in values.items():
                cells = [
                    f"{_show(row['extra_flops'] and row['extra_flops'] / 1e9, 3)} "
                    f"({_show(row['extra_in_head_costs'], 2)})"
                    for row in (found[v] for v in SCALED[1:])
                ]
                lines.append(f"  {value:10}" + "".join(f"{cell:>26}" for cell in cells))
    for name in made["shared_forward"]:
        lines += [f"null: {name} {v}: {why}" for v, why in made["why_null"][name].items()]
    return "\n".join(lines)


# --- the figure

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"  # told apart by the colour-blind
SHOWN = 3.2  # plain steps; a longer bar is cut and its number written


def _bars(axis, found: Mapping[str, dict]) -> None:
    """Ratios to the plain step, of operations and of time, with the floors as ticks."""
    for offset, key, colour, text, label in (
        (-0.2, "flops_ratio", BLUE, "white", "operations"),
        (0.2, "seconds_ratio", ORANGE, "black", "time"),
    ):
        places = np.arange(len(found)) + offset
        values = [row[key] or 0.0 for row in found.values()]
        axis.barh(places, np.minimum(values, SHOWN), height=0.38, color=colour, label=label)
        for place, value in zip(places, values):
            if value > SHOWN:
                inside = dict(ha="right", va="center", fontsize=7.5, color=text)
                axis.text(SHOWN - 0.05, place, f"{value:.1f} \u2192", **inside)
    floors = {n: row["floor"] for n, row in enumerate(found.values()) if row["floor"] is not None}
    shown = {n: floor for n, floor in floors.items() if floor <= SHOWN}
    ticks = dict(marker="|", s=130, color="black", linewidths=1.8, zorder=3, label="floor")
    axis.scatter(shown.values(), shown.keys(), **ticks)
    axis.axvline(1, color="grey", linewidth=0.8, zorder=0)
    axis.set(xlim=(0, SHOWN), ylim=(len(found) - 0.5, -0.5), xlabel="plain steps")


def _growth(axis, values: Mapping[str, dict]) -> None:
    """Operations added to the plain step, and those of training the head, over the classes."""
    classes = [int(value) for value in values]
    lines = zip(SCALED[1:], (BLUE, ORANGE, GREEN), "os^")
    for name, colour, marker in lines:
        added = [found[name]["extra_flops"] or np.nan for found in values.values()]
        axis.loglog(classes, added, color=colour, marker=marker, label=f"{name} adds")
    full = [found["saflex_full"] for found in values.values()]
    head = [(row["extra_flops"] or np.nan) / (row["extra_in_head_costs"] or np.nan) for row in full]
    axis.loglog(classes, head, "k--", label="training the head, in every step")
    axis.set(xlabel="classes", ylabel="operations")


def draw(made: dict, file: str) -> None:
    """Draws a report: a panel of bars for each model, and one over the classes where varied."""
    from matplotlib.figure import Figure

    names = list(made["shared_forward"])
    grown = made["scaling"].get("classes", {})
    heights = [5.4, 3.4] if grown else [5.4]
    width = 2.2 + 3.2 * max(len(names), len(grown))
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    bars = upper.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(bars, names):
        _bars(axis, made[name])
        axis.set_title(name)
    bars[0].set_yticks(range(len(VARIANTS)), list(VARIANTS))
    upper.legend(*bars[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    if grown:
        panels = lower[0].subplots(1, len(grown), squeeze=False)[0]
        for axis, (name, values) in zip(panels, grown.items()):
            _growth(axis, values)
            axis.set_title(f"{name}: added to a step")
        lower[0].legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit status: 0, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), help="default: all")
    parser.add_argument(
        "--scaling",
        action=argparse.BooleanOptionalAction,
        help="vary classes, batch and width; default: where no model is named",
    )
    parser.add_argument(
        "--parts",
        action=argparse.BooleanOptionalAction,
        help="time the parts of a step alone; default: where no model is named",
    )
    parser.add_argument("--figure", help="draw the report to this PNG file")
    points, scaling, found = {}, {}, {}

    def start(options):
        if jax.default_backend() != "cpu":  # elsewhere products are library calls, not counted
            raise ValueError(f"JAX_PLATFORMS must be cpu to count; given {jax.default_backend()}")
        wanted = lambda option: not options.model if option is None else option
        parts = wanted(options.parts)
        points.update({name: point(MODELS[name], parts=parts) for name in options.model or MODELS})
        if wanted(options.scaling):
            scaling.update(scaling_points())
        work = list(leaves(points)) + list(leaves(scaling))

        def run(bar):
            for at in work:
                measure(at, rounds=options.rounds, bar=bar)

        return sum(length(at, options.rounds) for at in work), run

    def made(options):
        found["report"] = report(points, scaling, rounds=options.rounds)
        found["figure"] = options.figure
        return found["report"]

    status = timing.command(parser, argv, start=start, report=made, table=table)
    if found["figure"]:  # last: what was measured is printed and written, whatever happens here
        draw(found["report"], found["figure"])
    return status


if __name__ == "__main__":
    sys.exit(main())
