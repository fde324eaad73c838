"""What reweighting every sample costs here and elsewhere, in plain training steps.

    python -m benchmarks.peers [--json] [--out FILE] [--rounds=5] [--figure FILE] [--model NAME]

One training step that weighs (or relabels) each of 32 candidates, 32x32x3, by the effect of a step
on it on the loss of 8 validation samples: by this project, by JAX and PyTorch as they come, and by
libraries for it, all in one run and in turn. Each is a ratio to the plain step of its own
framework, on the CPU, with as many threads: JAX compiled by jit, PyTorch eager (no torch.compile).
All keep the memory that they free (`timing.keep_memory`).
The networks are the same, weight for weight. What each entry does is in `ENTRIES`; what is missing
or fails is null, with the reason.

Peers are PyTorch's steps, libraries, and what a JAX user would write with double backward or
implicit differentiation as they come.

Needs `pip install -e ".[bench]"`. betty-ml 0.1.1 is not in it: its requirements (`torch>=1.6.*`)
are refused by pip 24.1 and later; with an older one: `pip install --no-deps betty-ml==0.1.1`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from benchmarks import timing
from saflex_jax import checks, models, parallel
from saflex_jax.core import curvature, hypergrad, linear_solve, targets
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.tree import under
from saflex_jax.methods import METHODS
from saflex_jax.methods.base import prior_refiner, supervised
from saflex_jax.types import Batch, Method, Model, PyTree, Streams, Targets

CANDIDATES, VAL, SIDE, CLASSES = 32, 8, 32, 10
RATE, MOMENTUM, SEED = 0.01, 0.9, 0
ITERATIONS = 10  # of conjugate gradients
HIDDEN, META_RATE = 100, 1e-3  # of Meta-Weight-Net
SECONDS = 1.0  # of one job in one round
LAYOUT_CALLS = 3  # to tell which memory layout is faster
LOOPS = "conjugate gradients around the whole network: minutes a step on a residual one on a CPU"
PACKAGES = ("saflex_jax", "jax", "jaxlib", "flax", "numpy", "torch", "torchopt", "betty-ml",
            "optimistix", "lineax")  # fmt: skip


class Network(NamedTuple):
    """A backbone that both frameworks have.

    Attributes:
      backbone: the Linen module.
      residual: how its layers are joined: in basic blocks, or one after the other.
    """

    backbone: nn.Module
    residual: bool


NETWORKS = {
    "small_cnn": Network(models.SmallCNN((32, 64)), residual=False),
    "resnet": Network(models.ResNet18(width=32), residual=True),
}


class Work(NamedTuple):
    """What every entry is given.

    Attributes:
      network: Network.
      model: the classifier on it.
      params: its parameters, NumPy arrays.
      streams: NumPy arrays, 32 candidates and 8 validation samples.
    """

    network: Network
    model: Model
    params: PyTree
    streams: Streams


def batch(size: int, seed: int) -> Batch:
    """Noise with labels drawn at random."""
    rng = np.random.default_rng(seed)
    labels = np.eye(CLASSES, dtype=np.float32)[rng.integers(CLASSES, size=size)]
    inputs = rng.normal(size=(size, SIDE, SIDE, 3)).astype(np.float32)
    return Batch(inputs, labels, np.ones(size, bool), np.arange(size, dtype=np.int32))


def make_work(network: Network) -> Work:
    """The same for every entry."""
    model = models.from_linen(models.Classifier(network.backbone, CLASSES))
    streams = Streams(batch(CANDIDATES, SEED), batch(VAL, SEED + 1))
    params, _ = jax.jit(model.init)(jax.random.key(SEED), streams.candidates.inputs)
    return Work(network, model, jax.tree.map(np.asarray, params), streams)


# --- JAX: a method, or a refiner that asks for one hypergradient

# (inner loss, outer loss, params) -> d outer loss / d weights, f32[B]
Hypergradient = Callable[[hypergrad.Loss, hypergrad.Loss, PyTree], jax.Array]


def jax_jobs(work: Work, *, make: Callable[..., Method], **options) -> dict[str, timing.Job]:
    """One step of a method; gives the loss."""
    method = make(work.model, optax.sgd(RATE, MOMENTUM), **options)
    runner = parallel.jit_runner(method.step, devices=jax.devices("cpu")[:1])
    init = jax.jit(method.init)
    state = runner.put_state(init(jax.random.key(SEED), work.streams.candidates.inputs))
    streams = runner.put_batch(work.streams)

    def job():
        nonlocal state
        state, metrics = runner.step(state, streams)
        jax.block_until_ready(state)
        return metrics["loss"][0]

    return {"nhwc": job}


def named(name: str) -> Callable[..., dict[str, timing.Job]]:
    """Jobs of one of the project's methods."""
    return lambda work, **options: jax_jobs(work, make=METHODS[name], **options)


def by_hypergradient(hypergradient: Hypergradient) -> Callable[..., Method]:
    """The method whose weights are max(- d L_val / d weights, 0), scaled to mean one."""

    def apply(arrays, state, logits_fn, streams, *, reduce):
        def loss(samples, params, weights=None):
            logits = logits_fn(params, samples.inputs)
            return masked_mean(weighted_cross_entropy(logits, samples.labels, weights))

        candidates = streams.candidates
        slopes = hypergradient(
            partial(loss, candidates),
            lambda params, weights: loss(streams.val, params),
            state.params,
        )
        weights = targets.rescale(jnp.maximum(-slopes, 0.0), candidates.mask, reduce=reduce)
        return Targets(weights, candidates.labels, -slopes), arrays, {}

    refiner = prior_refiner()._replace(apply=apply)
    return lambda model, tx: supervised(model, tx, refiner)


def unrolled(inner, outer, params):
    """Through one gradient step from weights zero: a backward pass through a backward pass."""

    def after(weights):
        slopes = jax.grad(inner)(params, weights)
        return outer(jax.tree.map(lambda p, g: p - RATE * g, params, slopes), weights)

    return jax.grad(after)(jnp.zeros(CANDIDATES))


def implicit(inner, outer, params, *, damping: float = 1e-2):
    """Conjugate gradients on the Hessian in all parameters."""
    solve = linear_solve.cg_solve(maxiter=ITERATIONS, damping=damping)
    ones = jnp.ones(CANDIDATES)
    return hypergrad.implicit_hypergradient(inner, outer, params, ones, solve=solve)[1]


def lineax_damping(params: PyTree) -> float:
    """Over twice what `lineax.CG` takes for singular: curvature below 200 N eps of f32.

    The ten in front is for the Hessian's negative curvature, below -2 on the small CNN.
    """
    size = sum(p.size for p in jax.tree.leaves(params))
    return 10 + 400 * size * float(jnp.finfo(jnp.float32).eps)


def implicit_optimistix(inner, outer, params):
    """The implicit function theorem through `optimistix.minimise`."""
    import lineax
    import optimistix

    damping = lineax_damping(params)
    solver = optimistix.GradientDescent(RATE, rtol=0.0, atol=0.0)
    # Without tolerances the linear solver's result is its last iterate, not an error.
    adjoint = optimistix.ImplicitAdjoint(lineax.CG(rtol=0.0, atol=0.0, max_steps=ITERATIONS))

    def damped(moved, weights):
        away = jax.tree.map(jnp.subtract, moved, params)
        return inner(moved, weights) + 0.5 * damping * curvature.dot(away, away)

    def after(weights):
        found = optimistix.minimise(
            damped,
            solver,
            params,
            weights,
            max_steps=1,
            throw=False,
            adjoint=adjoint,
            tags=frozenset({lineax.positive_semidefinite_tag}),
        )
        return outer(found.value, weights)

    return jax.grad(after)(jnp.ones(CANDIDATES))


# --- PyTorch: factories of one step, each from a `Torch` of its own


def torch_network(work: Work):
    """The same network, with the same weights, as a torch module on f32[B, C, H, W].

    Every convolution but the first that widens also halves the image. Where Flax pads (0, 1) and
    PyTorch (1, 1), on the small CNN's even sides, they agree on mirrored images and kernels.
    """
    import torch
    from torch.nn import functional as F

    backbone, head = work.params["backbone"], work.params["head"]
    number = lambda name: -1 if name == "stem" else int(name.partition("_")[2])
    convolutions = sorted((n for n in backbone if not n.startswith("Norm")), key=number)

    def parameter(array):
        return torch.nn.Parameter(torch.from_numpy(np.array(array)))

    def layer(place, name):
        kernel, norm = backbone[name]["kernel"], backbone[f"Norm_{place}"]["GroupNorm_0"]
        size, _, narrow, wide = kernel.shape
        stride = 1 if place == 0 or narrow == wide else 2
        if not work.network.residual:
            kernel = kernel[::-1, ::-1]
        convolution = torch.nn.Conv2d(narrow, wide, size, stride, size // 2, bias=False)
        convolution.weight = parameter(kernel.transpose(3, 2, 0, 1))
        group_norm = torch.nn.GroupNorm(min(8, wide), wide, eps=1e-6)
        group_norm.weight, group_norm.bias = parameter(norm["scale"]), parameter(norm["bias"])
        return torch.nn.Sequential(convolution, group_norm)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(layer(*item) for item in enumerate(convolutions))
            self.head = torch.nn.Linear(*head["kernel"].shape)
            self.head.weight, self.head.bias = parameter(head["kernel"].T), parameter(head["bias"])

        def forward(self, x):
            layers = iter(self.layers)
            x = F.relu(next(layers)(x))
            for first in layers:
                y = F.relu(first(x))
                if work.network.residual:
                    y = next(layers)(y)
                    y = F.relu(y + (x if x.shape == y.shape else next(layers)(x)))
                x = y
            return self.head(x.mean((2, 3)))

    return Net()


def torch_images(work: Work, inputs: np.ndarray) -> np.ndarray:
    """f32[B, H, W, C] -> the network's f32[B, C, H, W]; see `torch_network`."""
    images = inputs if work.network.residual else inputs[:, ::-1, ::-1]
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


class Torch:
    """The work in PyTorch: network, samples and optimiser in one memory layout."""

    def __init__(self, work: Work, layout: str):
        import torch

        self.torch = torch
        torch.set_num_threads(threads())
        order = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}[layout]
        self.net = torch_network(work).to(memory_format=order)
        self.params = dict(self.net.named_parameters())

        def samples(found):
            images = torch.from_numpy(torch_images(work, found.inputs))
            return images.to(memory_format=order), torch.from_numpy(found.labels)

        self.candidates, self.val = samples(work.streams.candidates), samples(work.streams.val)
        self.tx = torch.optim.SGD(self.net.parameters(), RATE, MOMENTUM)

    def _losses(self, samples, params):
        inputs, labels = samples
        if params is None:
            logits = self.net(inputs)
        else:
            logits = self.torch.func.functional_call(self.net, params, (inputs,))
        return self.torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def losses(self, params=None):
        """f32[B], of the candidates; at the network's own parameters or at others."""
        return self._losses(self.candidates, params)

    def val_loss(self, params=None):
        """f32[]."""
        return self._losses(self.val, params).mean()

    def moved(self, slopes):
        """The parameters after a gradient step."""
        return {name: p - RATE * g for (name, p), g in zip(self.params.items(), slopes)}

    def weigh(self, utility):
        """max(utility, 0), scaled to mean one."""
        positive = utility.detach().clamp(min=0)
        return positive / positive.mean().clamp(min=1e-30)

    def step(self, losses, weights):
        """The optimiser's step on the weighted losses; returns the weights."""
        self.tx.zero_grad()
        (weights * losses).mean().backward()
        self.tx.step()
        return weights


def torch_jobs(work: Work, *, make: Callable[[Torch], timing.Job]) -> dict[str, timing.Job]:
    """The step in both memory layouts; gives the weights."""
    return {layout: make(Torch(work, layout)) for layout in ("nchw", "nhwc")}


def torch_plain(t: Torch) -> timing.Job:
    """The plain step."""
    return lambda: t.step(t.losses(), t.torch.ones(CANDIDATES))


def torch_autograd_l2rw(t: Torch) -> timing.Job:
    """Learning to reweight by `create_graph=True`."""
    grad = t.torch.autograd.grad
    params = list(t.params.values())

    def job():
        weights = t.torch.zeros(CANDIDATES, requires_grad=True)
        losses = t.losses()
        slopes = grad((weights * losses).mean(), params, create_graph=True)
        (slope,) = grad(t.val_loss(t.moved(slopes)), weights, retain_graph=True)
        return t.step(losses, t.weigh(-slope))

    return job


def torch_func_l2rw(t: Torch) -> timing.Job:
    """Learning to reweight by `torch.func.grad` of a function with `torch.func.grad` in it."""
    grad = t.torch.func.grad
    params = {name: p.detach() for name, p in t.params.items()}

    def after(weights):
        slopes = grad(lambda params: (weights * t.losses(params)).mean())(params)
        return t.val_loss(t.moved(slopes.values()))

    return lambda: t.step(t.losses(), t.weigh(-grad(after)(t.torch.zeros(CANDIDATES))))


def torch_func_jvp(t: Torch) -> timing.Job:
    """The project's formula: one forward-mode product along the validation gradient."""

    def job():
        slopes = t.torch.autograd.grad(t.val_loss(), list(t.params.values()))
        direction = dict(zip(t.params, slopes))
        losses, utility = t.torch.func.jvp(t.losses, (t.params,), (direction,))
        return t.step(losses, t.weigh(utility))

    return job


def torchopt_l2rw(t: Torch) -> timing.Job:
    """Learning to reweight through `torchopt.MetaSGD`, as in TorchOpt's own example."""
    import torchopt

    inner = torchopt.MetaSGD(t.net, lr=RATE)

    def job():
        kept = torchopt.extract_state_dict(t.net), torchopt.extract_state_dict(inner)
        weights = t.torch.zeros(CANDIDATES, requires_grad=True)
        losses = t.losses()
        inner.step((weights * losses).mean())
        (slope,) = t.torch.autograd.grad(t.val_loss(), weights, retain_graph=True)
        for owner, state in zip((t.net, inner), kept):
            torchopt.recover_state_dict(owner, state)
        return t.step(losses, t.weigh(-slope))

    return job


def weight_network(torch):
    """Meta-Weight-Net's: a loss -> a weight in (0, 1)."""
    layers = torch.nn
    return layers.Sequential(
        layers.Linear(1, HIDDEN), layers.ReLU(), layers.Linear(HIDDEN, 1), layers.Sigmoid()
    )


def torch_meta_weight_net(t: Torch) -> timing.Job:
    """Meta-Weight-Net by `create_graph=True`."""
    torch, params = t.torch, list(t.params.values())
    torch.manual_seed(SEED)
    net = weight_network(torch)
    meta_tx = torch.optim.Adam(net.parameters(), META_RATE)

    def job():
        losses = t.losses()
        seen = losses.detach()[:, None]
        slopes = torch.autograd.grad((net(seen)[:, 0] * losses).mean(), params, create_graph=True)
        after = t.val_loss(t.moved(slopes))
        grads = torch.autograd.grad(after, list(net.parameters()), retain_graph=True)
        for parameter, gradient in zip(net.parameters(), grads):
            parameter.grad = gradient
        meta_tx.step()
        with torch.no_grad():
            weights = net(seen)[:, 0]
        return t.step(losses, weights)

    return job


def betty_meta_weight_net(t: Torch) -> timing.Job:
    """Meta-Weight-Net as two `ImplicitProblem`s, as in Betty's own example."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.logging.logger_base import get_logger
    from betty.problems import ImplicitProblem

    get_logger().setLevel("WARNING")
    torch, cross_entropy = t.torch, t.torch.nn.functional.cross_entropy
    torch.manual_seed(SEED)

    class Outer(ImplicitProblem):
        def training_step(self, samples):
            inputs, labels = samples
            return cross_entropy(self.inner(inputs), labels)

    class Inner(ImplicitProblem):
        def training_step(self, samples):
            inputs, labels = samples
            losses = cross_entropy(self.forward(inputs), labels, reduction="none")
            weights = self.outer(losses.detach()[:, None])[:, 0]
            self.weights = weights.detach()
            return (weights * losses).mean()

    net = weight_network(torch)
    meta_tx = torch.optim.Adam(net.parameters(), META_RATE)
    config = Config(type="darts", unroll_steps=1)
    outer = Outer(
        "outer",
        Config(type="darts", retain_graph=True),
        net,
        meta_tx,
        train_data_loader=[t.val],
        device="cpu",
    )
    inner = Inner("inner", config, t.net, t.tx, train_data_loader=[t.candidates], device="cpu")
    engine = Engine(
        [outer, inner],
        EngineConfig(),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    engine.train()

    def job():
        engine.train_step()
        return inner.weights

    return job


# --- the entries


class Entry(NamedTuple):
    """One way to do the work.

    Attributes:
      framework: whose plain step it is compared with.
      own: whether it is this project's answer, not a peer.
      jobs: Work -> {memory layout: a job that takes a step and gives its loss or its weights}.
      does: what it does.
      loops: whether it differentiates the whole network in a compiled loop; XLA's CPU backend is
        some 20 times slower at convolutions' gradients there, so residual networks leave it out.
    """

    framework: str
    own: bool
    jobs: Callable[[Work], dict[str, timing.Job]]
    does: str
    loops: bool = False


def of_project(does: str, name: str, **options) -> Entry:
    """One of the project's methods."""
    return Entry("jax", True, partial(named(name), **options), does)


def of_jax(does: str, hypergradient: Hypergradient, *, loops: bool = False) -> Entry:
    """A hypergradient as a JAX user would write it."""
    return Entry("jax", False, partial(jax_jobs, make=by_hypergradient(hypergradient)), does, loops)


def of_torch(does: str, make: Callable[[Torch], timing.Job]) -> Entry:
    """A step in PyTorch."""
    return Entry("torch", False, partial(torch_jobs, make=make), does)


PLAIN = {
    "jax": Entry("jax", True, named("erm"), "methods.erm; jit"),
    "torch": of_torch("eager; SGD in place", torch_plain),
}
GREEDY = {"direction": "identity"}
ENTRIES = {
    "saflex_full": of_project("weights and labels, greedy direction in all parameters: validation "
                              "gradient and one forward-mode product", "saflex",
                              **GREEDY, predicate=None),
    "saflex_head": of_project("weights and labels, greedy direction in the head", "saflex",
                              **GREEDY, predicate=under("head")),
    "saflex_head_cg": of_project("weights and labels, 10 conjugate-gradient iterations in the head "
                                 "(the default)", "saflex"),
    "l2rw": of_project("learning to reweight by one forward-mode product", "l2rw"),
    "meta_weight_net": of_project("Meta-Weight-Net by one forward-mode product",
                                  "meta_weight_net"),
    "jax_unrolled": of_jax("what a JAX user would write: learning to reweight by double backward, "
                           "jax.grad through one gradient step; jit", unrolled),
    "jax_implicit": of_jax("what a JAX user would write: implicit differentiation, 10 "
                           "conjugate-gradient iterations with the Hessian in all parameters; jit",
                           implicit, loops=True),
    "torch_func_jvp": of_torch("this project's formula: torch.func.jvp of the losses along the "
                               "validation gradient; the step trains on the same forward pass",
                               torch_func_jvp),
    "torch_func_l2rw": of_torch("learning to reweight by torch.func.grad in torch.func.grad, and a "
                                "training step", torch_func_l2rw),
    "torch_autograd_l2rw": of_torch("learning to reweight by create_graph=True; the step trains on "
                                    "the same forward pass", torch_autograd_l2rw),
    "torchopt": of_torch("learning to reweight through torchopt.MetaSGD, states by reference; the "
                         "step trains on the same forward pass", torchopt_l2rw),
    "torch_meta_weight_net": of_torch("Meta-Weight-Net by create_graph=True; the step trains on "
                                      "the same forward pass", torch_meta_weight_net),
    "betty": of_torch("Meta-Weight-Net by its default, DARTS' finite differences (two more forward "
                      "passes); weights from before the meta step, and it leaves the parameters "
                      "displaced by the difference", betty_meta_weight_net),
    "optimistix": of_jax("optimistix.minimise with ImplicitAdjoint: one gradient evaluation at the "
                         "current parameters stands for the inner solve (1 step of "
                         "GradientDescent), then 10 of lineax.CG's iterations with the Hessian in "
                         "all parameters, damped by more than 10 so that it accepts it; jit",
                         implicit_optimistix, loops=True),
}  # fmt: skip


def threads() -> int:
    """As many as JAX's CPU client starts: the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --- the run and its report


class Run(NamedTuple):
    """Of one network.

    Attributes:
      times: name -> seconds; the plain steps are called "plain jax" and "plain torch".
      layouts: name -> the memory layout that was faster.
      parameters: {"count"}, of the network.
    """

    times: timing.Run
    layouts: dict[str, str]
    parameters: dict[str, int]


def entries() -> dict[str, Entry]:
    """All, each framework's plain step first."""
    return {f"plain {framework}": entry for framework, entry in PLAIN.items()} | ENTRIES


def faster_layout(works: dict[str, timing.Job]) -> str:
    """By the fastest of several calls in turn, which a slow moment cannot decide."""
    if len(works) == 1:
        return next(iter(works))
    times = {layout: [] for layout in works}
    for _ in range(LAYOUT_CALLS):
        for layout, job in works.items():
            times[layout].append(timing.seconds_a_call(job))
    return min(works, key=lambda layout: min(times[layout]))


def fastest_job(entry: Entry, name: str, work: Work, layouts: dict[str, str]) -> timing.Job:
    """The entry's job in its faster layout, after a step that must give finite numbers."""
    works, error = {}, None
    for layout, job in entry.jobs(work).items():
        try:
            if not np.all(np.isfinite(np.asarray(job()))):
                raise ValueError("loss or weights are not finite")
            works[layout] = job
        except Exception as found:  # PyTorch's forward-mode GroupNorm takes one layout only
            error = found
    if not works:
        raise error
    layouts[name] = faster_layout(works)
    return works[layouts[name]]


def measure(runs: dict[str, Run], *, rounds: int, bar: tqdm.tqdm) -> None:
    """Fills network -> Run."""
    with jax.default_device(jax.devices("cpu")[0]):
        for name, run in runs.items():
            bar.set_description(name)
            work = make_work(NETWORKS[name])
            run.parameters["count"] = sum(p.size for p in jax.tree.leaves(work.params))
            if work.network.residual:
                left_out = [entry for entry, made in entries().items() if made.loops]
                run.times.failed.update(dict.fromkeys(left_out, LOOPS))
            setups = {
                entry: partial(fastest_job, made, entry, work, run.layouts)
                for entry, made in entries().items()
            }
            timing.interleaved(setups, run.times, rounds=rounds, seconds=SECONDS, bar=bar)


def one_line(reason: str) -> str:
    """Its first line; of a failure inside compiled code, the error at the end of the traceback."""
    _, traceback, rest = reason.partition("Traceback (most recent call last)")
    error = re.search(r"^(?:\w+\.)*(\w+: \S.*)", rest, re.MULTILINE) if traceback else None
    return error[1] if error else reason.partition("\n")[0]


def summary(run: Run, name: str, entry: Entry) -> dict[str, Any]:
    """Median seconds, and of the ratio to the plain step of the same round median and spread."""
    times = run.times.seconds.get(name, [])
    failed = name in run.times.failed or not times
    base = run.times.seconds.get(f"plain {entry.framework}", [])
    # Round by round: a slow moment of the machine is in both members of a pair.
    ratios = [] if failed else [a / b for a, b in zip(times, base)]
    return {
        "ratio": float(np.median(ratios)) if ratios else None,
        "spread": timing.spread(ratios) if ratios else None,
        "seconds": None if failed else float(np.median(times)),
        "layout": run.layouts.get(name),
        "framework": entry.framework,
        "own": entry.own,
        "does": entry.does,
    }


def claim(*networks: dict[str, dict]) -> dict[str, bool | float | None]:
    """What the numbers of some networks say together; None where one that it needs is missing.

    `full_below_every_peer`: saflex_full costs less than each peer that was measured, everywhere.
    `head_overhead_over_best_peer`: what saflex_head adds to a plain step, over what the cheapest
    peer adds, which must be more than nothing; of the network where it is largest.
    """
    below, overheads = [], []
    for found in networks:
        peers = [e["ratio"] for e in found.values() if not e["own"] and e["ratio"] is not None]
        best = min(peers, default=None)
        full, head = (found[name]["ratio"] for name in ("saflex_full", "saflex_head"))
        below.append(None if None in (best, full) else full < best)
        missing = None in (best, head) or best <= 1
        overheads.append(None if missing else (head - 1) / (best - 1))
    return {
        "full_below_every_peer": None if None in below else all(below),
        "head_overhead_over_best_peer": None if None in overheads else max(overheads),
    }


def claims(ratios: dict[str, dict[str, dict]]) -> dict[str, dict[str, bool | float | None]]:
    """Of each network, and of "all" together."""
    return {name: claim(found) for name, found in ratios.items()} | {"all": claim(*ratios.values())}


def torch_threads() -> int | None:
    """PyTorch's; None without it."""
    with contextlib.suppress(ImportError):
        import torch

        return torch.get_num_threads()


def report(runs: dict[str, Run], *, rounds: int) -> dict:
    """The JSON: ratios, plain steps, reasons, machine, claims."""
    made = {"ratios": {}, "plain": {}, "why_null": {}}
    for network, run in runs.items():
        found = {name: summary(run, name, entry) for name, entry in entries().items()}
        made["ratios"][network] = {name: found[name] for name in ENTRIES}
        made["plain"][network] = {f: found[f"plain {f}"] for f in PLAIN} | run.parameters
        made["why_null"][network] = {
            name: one_line(run.times.failed.get(name, "interrupted before it was measured"))
            for name, numbers in found.items()
            if numbers["ratio"] is None
        }
    made["machine"] = timing.machine(PACKAGES) | {
        "device": jax.devices("cpu")[0].device_kind,
        "threads": {"jax": threads(), "torch": torch_threads()},
        "rounds": rounds,
        "seed": SEED,
        "candidates": CANDIDATES,
        "val": VAL,
    }
    made["claims"] = claims(made["ratios"])
    return made


def table(made: dict) -> str:
    """The report for people."""
    show = lambda value, digits: "null" if value is None else f"{value:.{digits}f}"
    machine = made["machine"]
    lines = timing.header(machine)
    lines += [f"threads: {machine['threads']}; {CANDIDATES} candidates, {VAL} validation samples"]
    for network, found in made["ratios"].items():
        lines += ["", f"{network}: {made['plain'][network].get('count', 'null')} parameters"]
        for framework in PLAIN:
            seconds = made["plain"][network][framework]["seconds"]
            lines.append(f"  plain step of {framework}: {show(seconds and 1e3 * seconds, 1)} ms")
        lines.append(f"  {'step':24}{'ratio':>8}{'IQR':>8}{'ms':>10}  of whom, layout")
        for name, entry in found.items():
            lines.append(
                f"  {name:24}{show(entry['ratio'], 3):>8}{show(entry['spread'], 3):>8}"
                f"{show(entry['seconds'] and 1e3 * entry['seconds'], 1):>10}"
                f"  {'this project' if entry['own'] else 'peer'}, {entry['layout']}"
            )
    lines += ["", *(f"{name}: {entry.does}" for name, entry in ENTRIES.items()), ""]
    for network, said in made["claims"].items():
        lines += [f"{network}: {name}: {value}" for name, value in said.items()]
    for network, reasons in made["why_null"].items():
        lines += [f"null: {network} {name}: {why}" for name, why in reasons.items()]
    return "\n".join(lines)


def draw(made: dict, file: pathlib.Path) -> None:
    """Bars of the ratios, one panel per network, this project and peers in two colours."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = {True: "#2a6f97", False: "#c9a227"}
    figure = Figure(figsize=(5.5 * len(made["ratios"]), 5), layout="constrained")
    panels = figure.subplots(1, len(made["ratios"]), squeeze=False)[0]
    for panel, (network, found) in zip(panels, made["ratios"].items()):
        shown = {name: entry for name, entry in found.items() if entry["ratio"] is not None}
        names = sorted(shown, key=lambda name: shown[name]["ratio"], reverse=True)
        ratios = [shown[name]["ratio"] for name in names]
        own = [colours[shown[name]["own"]] for name in names]
        panel.barh(names, [ratio - 1 for ratio in ratios], left=1, color=own)
        for place, ratio in enumerate(ratios):
            at = max(ratio, 1.0), place
            beside = dict(xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
            panel.annotate(f"{ratio:.2f}", at, **beside)
        panel.set_xscale("log")
        panel.set_xlim(0.8, 1.6 * max(ratios, default=1.0))
        panel.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        panel.minorticks_off()
        panel.set_title(network)
        panel.set_xlabel("time of a step, in plain steps of its framework")
        panel.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colours[own]) for own in (True, False)]
    labels = ["this project", "peers (jax_*: what a JAX user would write)"]
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=130)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit status: 0, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help=f"only one of {', '.join(NETWORKS)}")
    parser.add_argument("--figure", type=pathlib.Path, help="draw the ratios to this file")
    runs: dict[str, Run] = {}
    found = {}

    def start(options):
        if options.model is not None:
            checks.choice(tuple(NETWORKS), model=options.model)
        for name in NETWORKS if options.model is None else [options.model]:
            runs[name] = Run(timing.Run({}, {}), {}, {})
        length = len(runs) * len(entries()) * (options.rounds + 1)
        found["keeps_memory"] = timing.keep_memory()
        return length, lambda bar: measure(runs, rounds=options.rounds, bar=bar)

    def finish(options):
        made = report(runs, rounds=options.rounds)
        made["machine"] |= found
        if options.figure is not None:
            draw(made, options.figure)
        return made

    return timing.command(parser, argv, start=start, report=finish, table=table)


if __name__ == "__main__":
    sys.exit(main())
