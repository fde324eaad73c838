"""What a step costs on a pod, by the real TPU compiler and without a TPU.

    python -m benchmarks.pods [--json] [--out FILE] [--slice NAME ...] [--model NAME ...]
                              [--variant NAME ...]

The package "libtpu" holds the compiler (`pip install "saflex_jax[pods]"`); it compiles for slices
of chips that are not here. For each of them, and for each variant of `benchmarks.step_cost`: what
one chip computes, moves and keeps, which collectives a step runs and how often, and a roofline
estimate of its time. A compilation of ResNet-18 takes minutes of a CPU: what stands in FILE already
is not compiled again.

Counting. XLA counts a loop's body once; here its operations are multiplied by its trips, as
collectives are.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.extend as jex
import numpy as np

from benchmarks import reporting, step_cost, timing
from benchmarks.accelerator_training import in_compute_dtype
from saflex_jax import checks, models
from saflex_jax.core.tree import is_little
from saflex_jax.parallel import runners
from saflex_jax.rules import Posterior, Refinement, Scoring, VisitMean
from saflex_jax.types import Method, RunInfo, Streams

ROWS = 128  # candidates on a chip
SLICES = ("v5e:4x4", "v5e:16x16", "v5p:2x2x4", "v6e:4x4")
NAMES = ("plain", "saflex", "saflex_head", "saflex_full", "l2rw", "sla_rotation", "automix")
# Images of 224x224, 1,000 classes, 1,281,167 samples: computed in bf16, the parameters shared among
# the chips, the memory of 8 beliefs a sample.
IMAGENET = RunInfo(1_281_167, 1000)
LARGE = {
    "resnet50_224": (partial(models.ResNet50, stem="imagenet"), 32),
    "vit_b16_224": (partial(models.ViT, 16, 768, 12, 12, 3072), 32),
}  # name -> (network, candidates on a chip)
MODELS = (*step_cost.MODELS, *LARGE)
CHIP_COUNTS = tuple(8 * 2**n for n in range(10))


# --- the chips


class Chip(NamedTuple):
    """A chip by its published figures."""

    flops: float  # bf16, a second
    memory: float  # bytes
    memory_speed: float  # bytes a second
    link_speed: float  # bytes a second out of a chip, all links: half of the bidirectional figure
    axes: int  # of the torus
    closes: int  # a side of so many chips, or a multiple, is a ring
    largest: int  # chips in a slice


# docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e, read on 2026-11-27.
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 2, 16, 256),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 3, 4, 6144),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 2, 16, 256),
}
HOP = 1e-6  # seconds to a neighbour: jax-ml.github.io/scaling-book, "about 1 us"


def shape_of(name: str) -> tuple[Chip, list[int]]:
    """The chip of a slice "v5e:4x4", and the sides of its torus."""
    kind, _, sides = name.partition(":")
    checks.choice(tuple(CHIPS), kind=kind)
    return CHIPS[kind], [int(side) for side in sides.split("x")]


def sides_of(chip: Chip, chips: int) -> list[int]:
    """Sides of a nearly cubic torus of a power of two."""
    exponent = int(math.log2(chips))
    return [2 ** ((exponent + axis) // chip.axes) for axis in range(chip.axes)]


# --- collectives

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
_WINDOWS = "windowed_dot_general"  # in the names of loops in which the compiler splits a product
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


class Collective(NamedTuple):
    """One of a compiled program.

    Attributes:
      kind: "all-reduce", "all-gather", ...
      bytes: of its result, on one chip.
      times: how often a step runs it.
      in_loop: whether it stands in a loop of the program.
    """

    kind: str
    bytes: int
    times: int
    in_loop: bool


def collectives(program: str) -> list[Collective]:
    """All of a compiled program's text, loops multiplied out.

    A collective that is split into a beginning and an end counts once, by its channel. Loops in
    which the compiler splits a product, to gather or to sum its parts meanwhile, are not the
    program's: `in_loop` is False there.

    Raises:
      ValueError: a loop around a collective whose trips the text does not tell.
    """
    bodies = _computations(program)
    runs, found = _runs(bodies), {}
    for name, lines in bodies.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({_KINDS})(-start)?\(", line)
            if match is None:
                continue
            times, in_loop = runs(name)
            if times is None:
                raise ValueError(f"the trips of the loop around a {match[2]} must be in the text")
            results = match[1]
            if match[2] == "collective-permute" and match[3]:
                results = results.split(", ")[0]  # what comes stands beside it
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else line
            found.setdefault(key, Collective(match[2], _size(results), times, in_loop))
    return list(found.values())


def again_in_windows(program: str) -> float:
    """Operations of products that the compiler splits, beyond the first trip of each loop."""
    bodies = _computations(program)
    runs = _runs(bodies, only=_WINDOWS)
    return sum(
        (runs(name)[0] - 1) * _products(lines)
        for name, lines in bodies.items()
        if runs(name)[0] not in (None, 1)
    )


def _runs(bodies: dict[str, list[str]], only: str = ""):
    """computation -> (how often a step runs it or None, whether it is in a loop of the program)."""
    callers = {}  # computation -> (the one that calls it, how often, whether the program says so)
    for name, lines in bodies.items():
        for line in lines:
            loop = re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line)
            if loop:
                trips = _trips(line, bodies[loop[1]], bodies[loop[2]]) if only in loop[2] else 1
                callers.setdefault(loop[2], (name, trips, _WINDOWS not in loop[2]))
            elif "while(" not in line:
                for called in re.findall(r"(?:calls|to_apply|_computation)=%?([\w.-]+)", line):
                    callers.setdefault(called, (name, 1, False))

    def runs(name):
        if name not in callers:
            return 1, False
        caller, trips, of_program = callers[name]
        above, in_loop = runs(caller)
        times = None if None in (above, trips) else above * trips
        return times, in_loop or (of_program and trips != 1)

    return runs


_CONVOLUTION = re.compile(
    r" convolution\(%([\w.-]+), %([\w.-]+)\)(?:, window=\{(.*?)\})?"
    r",.* dim_labels=(\w+)_(\w+)->(\w+)"
)


def _products(lines: list[str]) -> float:
    """Operations of the products in a computation, which on a TPU are convolutions."""
    shapes, total = {}, 0.0
    for line in lines:
        made = re.match(r"\s*(?:ROOT )?%([\w.-]+) = [a-z]+[0-9]*\[([0-9,]*)\]", line)
        if made is None:
            continue
        shapes[made[1]] = [int(side) for side in made[2].split(",") if side]
        if found := _CONVOLUTION.search(line):
            sides = shapes[found[1]], shapes[found[2]], shapes[made[1]]
            given, kernel, result = (
                dict(zip(found[4 + i], sides[i], strict=True)) for i in range(3)
            )
            number = 2 * result["b"] * result["f"] * kernel["i"]
            for label in (label for label in result if label.isdigit()):
                pad = _of_window(found[3], "pad", label, 0)
                dilate = _of_window(found[3], "rhs_dilate", label, 1)
                number *= sum(  # pairs of places that meet no padding
                    0 <= i + dilate * k - pad < given[label]
                    for i in range(result[label])
                    for k in range(kernel[label])
                )
            total += number
    return total


def _of_window(window: str | None, field: str, label: str, default: int) -> int:
    """The field's (first) number for a side of "size=2x3 pad=1_1x0_0"."""
    found = re.search(rf"(?:^| ){field}=(\S+)", window or "")
    return int(found[1].split("x")[int(label)].split("_")[0]) if found else default


def _computations(program: str) -> dict[str, list[str]]:
    bodies, current = {}, []
    for line in program.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line)
        if head and not line.startswith(" "):
            current = bodies.setdefault(head[1], [])
        current.append(line)
    return bodies


def _trips(line: str, condition: list[str], body: list[str]) -> int | None:
    """How often a loop runs: as the compiler says, or up to the number that its end compares."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    ends = [m[1] for text in condition if (m := re.search(r"[su]32\[\].* constant\((\d+)\)", text))]
    return -(-int(ends[0]) // _stride(condition, body)) if len(ends) == 1 else None


def _stride(condition: list[str], body: list[str]) -> int:
    """What a loop adds to its counter; the compiler may unroll it."""
    place = re.search(r"get-tuple-element\(.*index=(\d+)", "\n".join(condition))
    results = re.search(r"ROOT .* tuple\((.*?)\)", "\n".join(body))
    if place is None or results is None:
        return 1
    counter = re.escape(results[1].split(", ")[int(place[1])].split("%")[-1])
    for line in body:
        if added := re.search(rf"%{counter} = .* add\(%\S+, %([\w.-]+)\)", line):
            value = re.search(rf"%{re.escape(added[1])} = .* constant\((\d+)\)", "\n".join(body))
            return int(value[1]) if value else 1
    return 1


def _size(shapes: str) -> int:
    """Bytes of "f32[2,3]{1,0}" or of a tuple of such."""
    total = 0
    for dtype, sides in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", shapes):
        if dtype in _BYTES:
            total += _BYTES[dtype] * math.prod(int(side) for side in sides.split(",") if side)
    return total


# --- a compiled step


class Program(NamedTuple):
    """A step compiled for a slice; all numbers are of one chip and one step."""

    flops: float
    bytes: float  # that XLA counts as read and written, in whichever memory
    temp_bytes: int
    state_bytes: int  # arguments
    collectives: list[Collective]
    code_bytes: int = 0  # 0 = not asked for


def devices_of(name: str) -> list:
    """The abstract devices of a slice.

    Raises:
      ImportError: no libtpu.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # ask no metadata server for a real one
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ImportError('this needs libtpu: pip install "saflex_jax[pods]"') from error
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def setup(name: str, variant: str, chips: int) -> tuple[Method, Streams]:
    """The method, and the shapes of a batch on so many chips."""
    if name in LARGE:
        network, rows = LARGE[name]
        model = step_cost.Model(network, (224, 224, 3), rows * chips, IMAGENET.num_classes)
        rule = Refinement(Scoring(step_cost.CG), Posterior(IMAGENET, memory=VisitMean(top=8)))
        of_variant = step_cost.Variant(lambda _: rule if variant == "saflex" else None)
        method = step_cost.make_method(
            model, of_variant, wrap=partial(in_compute_dtype, dtype="bfloat16")
        )
    else:
        model = step_cost.MODELS[name]._replace(batch=ROWS * chips)
        method = step_cost.make_method(model, step_cost.VARIANTS[variant])

    def sized(batch, rows):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)

    few = step_cost.data(model._replace(batch=4))
    sizes = model.batch, int(step_cost.R * model.batch)
    return method, Streams(*map(sized, few[:2], sizes))


def compiled(method: Method, streams: Streams, devices: list, *, shard_params=False) -> Program:
    """The method's step on these devices; `streams` are the shapes of a batch on all of them."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), streams)
    state = jax.eval_shape(method.init, jax.random.key(0), one.candidates.inputs)
    step = runners.jitted(method.step, state, devices, shard_params=shard_params)
    traced = step.trace(state, streams, None)
    executable = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, cost = executable.memory_analysis(), executable.cost_analysis()
    found = collectives(executable.as_text())
    # Where its products are summed over chips a solver's work is shared by them.
    shares = len(devices) if any(one.in_loop for one in found) else 1
    again = sum(_again(body, trips) for body, trips in step_cost.loops(traced.jaxpr.jaxpr))
    return Program(
        cost["flops"] + again / shares + again_in_windows(executable.as_text()),
        cost["bytes accessed"],
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        found,
        memory.generated_code_size_in_bytes,
    )


def _again(body, trips: int | None) -> float:
    """Operations of a loop beyond its first trip, on all rows."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in body.in_avals]
    alone = jax.jit(jex.core.jaxpr_as_fun(body)).lower(*shapes)
    trips = step_cost.ITERATIONS if trips is None else trips
    return (trips - 1) * alone.compile(step_cost.QUICKLY).cost_analysis()["flops"]


# --- the estimate


def seconds(chip: Chip, sides: list[int], flops, moved, found: list[Collective]) -> dict:
    """Terms of a step's time; an estimate from above, in which nothing waits in the shadow.

    step = max(compute, memory) + links + latency
    """
    chips = math.prod(sides)
    hops = sum(side - 1 if side % chip.closes else side // 2 for side in sides)
    links = latency = 0.0
    for one in found:
        both_ways = 2 if one.kind == "all-reduce" else 1
        if one.kind == "collective-permute":  # to one neighbour, by one of the links
            links += one.times * one.bytes / (chip.link_speed / (2 * chip.axes))
            latency += one.times * HOP
            continue
        links += both_ways * one.times * one.bytes * (1 - 1 / chips) / chip.link_speed
        latency += both_ways * one.times * hops * HOP
    terms = {
        "compute": flops / chip.flops,
        "memory": moved / chip.memory_speed,
        "links": links,
        "latency": latency,
    }
    whole = max(terms["compute"], terms["memory"]) + links + latency
    return terms | {"step": whole}


def row(name: str, program: Program, plain: Program | None) -> dict:
    """A variant's numbers, for JSON."""
    chip, sides = shape_of(name)
    in_loops = [one for one in program.collectives if one.in_loop]
    kept = program.temp_bytes + program.state_bytes + program.code_bytes
    found = {
        "flops": program.flops,
        "flops_ratio": plain and program.flops / plain.flops,
        "bytes": program.bytes,
        "temp_bytes": program.temp_bytes,
        "state_bytes": program.state_bytes,
        "code_bytes": program.code_bytes,
        "fits": float(kept / chip.memory),
        "collectives": len(program.collectives),
        "above_plain": plain and len(program.collectives) - len(plain.collectives),
        "in_loops": len(in_loops),
        "run_in_a_step": sum(one.times for one in program.collectives),
        "collective_bytes": sum(one.times * one.bytes for one in program.collectives),
    }
    times = seconds(chip, sides, program.flops, program.bytes, program.collectives)
    return found | {f"{term}_s": value for term, value in times.items()}


# --- scaling


def head_size(model: step_cost.Model) -> int:
    """Parameters of the head."""
    method = step_cost.make_method(model, step_cost.VARIANTS["plain"])
    inputs = jax.ShapeDtypeStruct((1, *model.shape), np.float32)
    params = jax.eval_shape(method.init, jax.random.key(0), inputs).params
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params["head"]))


def added(model: step_cost.Model, head: int, gathered: float, chips: int):
    """(operations, collectives) of SAFLEX's default beyond the forward passes.

    Args:
      model: K classes.
      head: parameters of the head.
      gathered: numbers that a chip gives where they are gathered.
      chips: in the slice.
    """
    val, products = int(step_cost.R * ROWS), step_cost.ITERATIONS + 1
    remembered = Collective("all-reduce", 4 * chips * ROWS * model.classes, 1, False)
    # A product with the curvature reads the features twice, scores and gradient once.
    work = 2 * head * (2 * products * ROWS + ROWS + val)
    if is_little(chips * gathered, rows=chips * (ROWS + val), size=head):
        features = Collective("all-gather", 4 * chips * gathered, 1, False)
        return chips * work, [features, remembered]
    sums = Collective("all-reduce", 4 * head, products + 1, True)  # and the validation gradient
    return work, [sums, remembered, *[Collective("all-reduce", 4, 1, False)] * 4]


FORWARD = 1 + step_cost.R * step_cost.F  # plain steps: one, and the validation samples' pass


def read_by_saflex(points: dict[str, tuple[Program, Program]]) -> tuple[float, float]:
    """Bytes that SAFLEX reads and writes beyond FORWARD plain steps: (fixed, for each chip).

    The memory's update sees the rows of all chips, however the direction is solved for.

    Args:
      points: slice -> (plain, SAFLEX), of two sizes or more; of one all is taken as fixed.
    """
    sizes = [math.prod(shape_of(name)[1]) for name in points]
    more = [saflex.bytes - FORWARD * plain.bytes for plain, saflex in points.values()]
    least, most = int(np.argmin(sizes)), int(np.argmax(sizes))
    if sizes[least] == sizes[most]:
        return more[least], 0.0
    growth = (more[most] - more[least]) / (sizes[most] - sizes[least])
    return more[least] - growth * sizes[least], growth


def scaling(
    plain: Program, saflex: Program, model: step_cost.Model, name: str, read: tuple[float, float]
) -> dict:
    """chips -> estimated seconds of the plain step and of SAFLEX's, ROWS candidates on each chip.

    From what both do on a slice where features are gathered, from `added` and `read_by_saflex`.
    """
    chip, sides = shape_of(name)
    head, compiled_for, table = head_size(model), math.prod(sides), {}
    given = next(one for one in saflex.collectives if one.kind == "all-gather")
    for chips in (count for count in CHIP_COUNTS if count <= chip.largest):
        sides = sides_of(chip, chips)
        work, more = added(model, head, given.bytes / 4 / compiled_for, chips)
        base = seconds(chip, sides, plain.flops, plain.bytes, plain.collectives)
        flops = FORWARD * plain.flops + work
        moved = FORWARD * plain.bytes + read[0] + chips * read[1]
        found = seconds(chip, sides, flops, moved, [*plain.collectives, *more])
        table[str(chips)] = {
            "gathered": float(not any(one.in_loop for one in more)),
            "plain_s": base["step"],
            "saflex_s": found["step"],
            "ratio": found["step"] / base["step"],
            **{f"saflex_{term}_s": found[term] for term in list(found)[:-1]},
        }
    for numbers in table.values():
        for step in ("plain", "saflex"):
            numbers[f"{step}_efficiency"] = table["8"][f"{step}_s"] / numbers[f"{step}_s"]
    return table


# --- the command


class Pods(reporting.Benchmark):
    """The benchmark: slices, models, variants."""

    packages = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy")
    rounds, series = None, ()

    @staticmethod
    def add_options(parser):
        """--slice, --model, --variant."""
        parser.add_argument("--slice", nargs="+", default=SLICES, help="such as v5e:4x4")
        parser.add_argument("--model", nargs="+", default=("resnet18",), choices=MODELS)
        parser.add_argument("--variant", nargs="+", default=NAMES, choices=step_cost.VARIANTS)

    def __init__(self, options):
        self.out, self.failed = options.out, {}
        self.programs = _read(self.out)
        for name in options.slice:
            shape_of(name)
        self.wanted = [
            (name, model, variant)
            for name in options.slice
            for model in options.model
            for variant in options.variant
            if _has(model, variant)
        ]

    @property
    def length(self):
        return len(self.wanted)

    def measure(self, bar):
        """Compiles what is not in FILE yet, and writes each to it."""
        for key in self.wanted:
            bar.set_description(" ".join(key))
            if key not in self.programs:
                try:
                    self.programs[key] = _compile(*key)
                except Exception as error:  # the others go on
                    self.failed[" ".join(key)] = timing.reason(error)
                if self.out is not None:
                    self.write(self.report(), self.out)
            bar.update()

    def report(self):
        """Rows, scaling, programs."""
        points, rows, curves = {}, {}, {}
        for (name, model, variant), program in self.programs.items():
            points.setdefault((name, model), {})[variant] = program
        for (name, model), programs in points.items():
            plain = programs.get("plain")
            rows[f"{name} {model}"] = {v: row(name, p, plain) for v, p in programs.items()}
        for model in set(step_cost.MODELS) & {model for _, model in points}:
            both = {
                name: (programs["plain"], programs["saflex"])
                for (name, own), programs in points.items()
                if own == model and {"plain", "saflex"} <= set(programs)
            }
            for name, (plain, saflex) in both.items():
                if not any(one.in_loop for one in saflex.collectives):
                    title = f"{name.partition(':')[0]} {model}"
                    read = read_by_saflex(both)
                    curves[title] = scaling(plain, saflex, step_cost.MODELS[model], name, read)
        programs = {" ".join(key): program._asdict() for key, program in self.programs.items()}
        return {
            "slices": rows,
            "scaling": curves,
            "programs": programs,
            "why_null": self.failed,
            "machine": {"rows_on_a_chip": ROWS},
        }

    @staticmethod
    def table(report):
        """Without the programs."""
        shown = {key: report[key] for key in ("slices", "scaling", "why_null")}
        return reporting.tables(shown)


def _has(model: str, variant: str) -> bool:
    if model in LARGE:
        return variant in ("plain", "saflex")
    return len(step_cost.MODELS[model].shape) == 3 or not step_cost.VARIANTS[variant].images


def _compile(name: str, model: str, variant: str) -> Program:
    devices = devices_of(name)
    method, streams = setup(model, variant, len(devices))
    return compiled(method, streams, devices, shard_params=model in LARGE)


def _read(file: pathlib.Path | None) -> dict[tuple[str, ...], Program]:
    """What a report in this file was made of."""
    if file is None or not file.exists():
        return {}
    programs = json.loads(file.read_text())["programs"]
    return {
        tuple(key.split()): Program(
            **fields | {"collectives": [Collective(*one) for one in fields["collectives"]]}
        )
        for key, fields in programs.items()
    }


main = partial(reporting.command, Pods)

if __name__ == "__main__":
    sys.exit(main())
