"""What reweighting every sample costs here and elsewhere, in plain training steps.

    python -m benchmarks.peers [--json] [--out FILE] [--rounds=5] [--figure FILE.png]

One training step that weighs (or relabels) each of 32 candidates, 32x32x3, by the effect of a step
on it on the loss of 8 validation samples: by this project, by JAX and PyTorch as they come, and by
libraries for it, all in one run and in turn. Each is a ratio to the plain step of its own
framework, on the CPU, with as many threads: JAX compiled by jit, PyTorch eager (no torch.compile).
All keep the memory that they free (`timing.keep_memory`). The networks are the same, weight for
weight. What each entry does is its docstring, which the JSON has; what is missing or fails is null,
with the reason.

Needs `pip install -e ".[bench]"`, and `pip install --no-deps betty-ml==0.1.1` by a pip below 24.1,
which refuses its requirements.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import reporting, step_cost, timing
from saflex_jax import models, parallel
from saflex_jax.core import targets
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.tree import axpy, identity
from saflex_jax.methods import supervised
from saflex_jax.rules import AsGiven
from saflex_jax.types import Model, PyTree, Rule, Streams, Targets

RATE, MOMENTUM, SEED = 0.01, 0.9, 0
HIDDEN, META_RATE = 100, 1e-3  # of Meta-Weight-Net
SECONDS = 1.0  # of one job in one round
LONGEST = 5  # plain steps that the figure has room for
NETWORKS = {
    "small_cnn": step_cost.Model(partial(models.SmallCNN, (32, 64)), (32, 32, 3)),
    "resnet": step_cost.Model(partial(models.ResNet18, width=32), (32, 32, 3), slow=True),
}


class Work(NamedTuple):
    """What every entry is given."""

    network: step_cost.Model
    model: Model  # the classifier on it
    params: PyTree  # of the classifier, NumPy arrays
    streams: Streams  # NumPy arrays, 32 candidates and 8 validation samples

    @property
    def residual(self) -> bool:
        """Whether layers are joined in basic blocks."""
        return isinstance(self.network.backbone(), models.ResNet18)


def make_work(network: step_cost.Model) -> Work:
    """The same for every entry."""
    model = models.from_linen(models.Classifier(network.backbone(), network.classes))
    streams = step_cost.data(network)
    params, _ = jax.jit(model.init)(jax.random.key(SEED), streams.candidates.inputs)
    return Work(network, model, jax.tree.map(np.asarray, params), streams)


class Entry(NamedTuple):
    """One way to do the work."""

    framework: str  # whose plain step it is compared with
    own: bool  # this project's answer, not a peer
    jobs: Callable[[Work], dict[str, timing.Job]]  # by memory layout; a job gives loss or weights
    does: str


# --- JAX: a method, or a rule that asks for one hypergradient


def jax_jobs(work: Work, *, rule: Callable[[step_cost.Model], Rule | None]) -> dict:
    """One step of plain training on what a rule says; gives the loss."""
    method = supervised.make(work.model, optax.sgd(RATE, MOMENTUM), rule(work.network))
    runner = parallel.jit_runner(method.step, devices=jax.devices("cpu")[:1])
    init = jax.jit(method.init)
    state = runner.put_state(init(jax.random.key(SEED), work.streams.candidates.inputs))
    batches = itertools.repeat(runner.put_batch(work.streams))
    return {"nhwc": timing.steps_of(runner.step, state, batches)}


@dataclasses.dataclass(frozen=True)
class Unrolled(AsGiven):
    """Learning to reweight as written down: weights max(- d L_val / d weights, 0), of mean one."""

    def apply(self, arrays, state, logits_fn, streams, *, reduce=identity):
        """what a JAX user would write: learning to reweight by double backward, jax.grad through
        one gradient step from weights zero; jit
        """
        candidates, val = streams.candidates, streams.val

        def loss(params, batch, weights=None):
            logits = logits_fn(params, batch.inputs)
            return masked_mean(weighted_cross_entropy(logits, batch.labels, weights))

        def val_loss(weights):
            slopes = jax.grad(loss)(state.params, candidates, weights)
            return loss(axpy(-RATE, slopes, state.params), val)

        slopes = jax.grad(val_loss)(jnp.zeros(len(candidates.labels)))
        weights = targets.rescale(jnp.maximum(-slopes, 0.0), candidates.mask, reduce=reduce)
        return Targets(weights, candidates.labels, -slopes), arrays, {}


# --- PyTorch: factories of one step, each from a `Torch` of its own


def torch_network(work: Work):
    """The same network, with the same weights, as a torch module on f32[B, C, H, W].

    Every convolution but the first that widens also halves the image. Where Flax pads (0, 1) and
    PyTorch (1, 1), on the small CNN's even sides, they agree on mirrored images and kernels.
    """
    import torch
    from torch.nn import functional as F

    backbone, head = work.params["backbone"], work.params["head"]
    names = [name for name in backbone if not name.startswith("Norm")]
    names.sort(key=lambda name: -1 if name == "stem" else int(name.partition("_")[2]))

    def parameter(array):
        return torch.nn.Parameter(torch.from_numpy(np.array(array)))

    def layer(place, name):
        kernel, norm = backbone[name]["kernel"], backbone[f"Norm_{place}"]["GroupNorm_0"]
        size, _, narrow, wide = kernel.shape
        stride = 1 if place == 0 or narrow == wide else 2
        kernel = kernel if work.residual else kernel[::-1, ::-1]
        convolution = torch.nn.Conv2d(narrow, wide, size, stride, size // 2, bias=False)
        convolution.weight = parameter(kernel.transpose(3, 2, 0, 1))
        group_norm = torch.nn.GroupNorm(min(8, wide), wide, eps=1e-6)
        group_norm.weight, group_norm.bias = parameter(norm["scale"]), parameter(norm["bias"])
        return torch.nn.Sequential(convolution, group_norm)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(layer(*item) for item in enumerate(names))
            self.head = torch.nn.Linear(*head["kernel"].shape)
            self.head.weight, self.head.bias = parameter(head["kernel"].T), parameter(head["bias"])

        def forward(self, x):
            layers = iter(self.layers)
            x = F.relu(next(layers)(x))
            for first in layers:
                y = F.relu(first(x))
                if work.residual:
                    y = next(layers)(y)
                    y = F.relu(y + (x if x.shape == y.shape else next(layers)(x)))
                x = y
            return self.head(x.mean((2, 3)))

    return Net()


class Torch:
    """The work in PyTorch: network, samples and optimiser in one memory layout."""

    def __init__(self, work: Work, layout: str):
        import torch

        self.torch = torch
        torch.set_num_threads(timing.threads())
        order = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}[layout]
        self.net = torch_network(work).to(memory_format=order)
        self.params = dict(self.net.named_parameters())

        def samples(batch):
            images = batch.inputs if work.residual else batch.inputs[:, ::-1, ::-1]
            images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
            return images.to(memory_format=order), torch.from_numpy(batch.labels)

        self.candidates, self.val = samples(work.streams.candidates), samples(work.streams.val)
        self.size = len(work.streams.candidates.labels)
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
    """eager; SGD in place"""
    return lambda: t.step(t.losses(), t.torch.ones(t.size))


def torch_func_jvp(t: Torch) -> timing.Job:
    """this project's formula: torch.func.jvp of the losses along the validation gradient; the step
    trains on the same forward pass
    """

    def job():
        slopes = t.torch.autograd.grad(t.val_loss(), list(t.params.values()))
        direction = dict(zip(t.params, slopes))
        losses, utility = t.torch.func.jvp(t.losses, (t.params,), (direction,))
        return t.step(losses, t.weigh(utility))

    return job


def torch_autograd_l2rw(t: Torch) -> timing.Job:
    """learning to reweight by create_graph=True; the step trains on the same forward pass"""
    grad = t.torch.autograd.grad

    def job():
        weights = t.torch.zeros(t.size, requires_grad=True)
        losses = t.losses()
        slopes = grad((weights * losses).mean(), list(t.params.values()), create_graph=True)
        (slope,) = grad(t.val_loss(t.moved(slopes)), weights, retain_graph=True)
        return t.step(losses, t.weigh(-slope))

    return job


def betty_meta_weight_net(t: Torch) -> timing.Job:
    """Meta-Weight-Net as two problems, as in Betty's own example, by its default, DARTS' finite
    differences (two more forward passes); weights from before the meta step, and it leaves the
    parameters displaced by the difference
    """
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.logging.logger_base import get_logger
    from betty.problems import ImplicitProblem

    get_logger().setLevel("WARNING")
    torch, cross_entropy = t.torch, t.torch.nn.functional.cross_entropy
    torch.manual_seed(SEED)
    layers = torch.nn.Linear(1, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 1)
    weight_net = torch.nn.Sequential(*layers, torch.nn.Sigmoid())  # a loss -> a weight in (0, 1)
    meta_tx = torch.optim.Adam(weight_net.parameters(), META_RATE)

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

    def problem(kind, name, net, tx, samples, **options):
        config = Config(type="darts", **options)
        return kind(name, config, net, tx, train_data_loader=[samples], device="cpu")

    outer = problem(Outer, "outer", weight_net, meta_tx, t.val, retain_graph=True)
    inner = problem(Inner, "inner", t.net, t.tx, t.candidates, unroll_steps=1)
    links = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    engine = Engine([outer, inner], EngineConfig(), dependencies=links)
    engine.train()

    def job():
        engine.train_step()
        return inner.weights

    return job


# --- the entries


def of_project(variant: str, does: str) -> Entry:
    """A rule of `step_cost.VARIANTS`."""
    return Entry("jax", True, partial(jax_jobs, rule=step_cost.VARIANTS[variant].rule), does)


def of_jax(rule: Rule) -> Entry:
    """A rule as a JAX user would write it."""
    jobs = partial(jax_jobs, rule=lambda network: rule)
    return Entry("jax", False, jobs, " ".join(rule.apply.__doc__.split()))


def of_torch(make: Callable[[Torch], timing.Job]) -> Entry:
    """A step in PyTorch."""
    return Entry("torch", False, partial(torch_jobs, make=make), " ".join(make.__doc__.split()))


PLAIN = {"jax": of_project("plain", "methods.supervised; jit"), "torch": of_torch(torch_plain)}
ENTRIES = {
    "saflex_full": of_project("saflex_full", "weights and labels, greedy direction in all "
                              "parameters: validation gradient and one forward-mode product"),
    "saflex_head": of_project("saflex_head", "weights and labels, greedy direction in the head"),
    "saflex_head_cg": of_project("saflex", "weights and labels, 10 conjugate-gradient iterations "
                                 "in the head, with a memory (the default)"),
    "l2rw": of_project("l2rw", "learning to reweight by one forward-mode product"),
    "meta_weight_net": of_project("meta_weight_net",
                                  "Meta-Weight-Net by one forward-mode product"),
    "jax_unrolled": of_jax(Unrolled()),
    "torch_func_jvp": of_torch(torch_func_jvp),
    "torch_autograd_l2rw": of_torch(torch_autograd_l2rw),
    "betty": of_torch(betty_meta_weight_net),
}  # fmt: skip


# --- the run and its report


def fastest_job(entry: Entry, work: Work, layouts: dict[str, str], name: str) -> timing.Job:
    """The entry's job in its faster layout, after a step that must give finite numbers."""
    jobs, error = {}, None
    for layout, job in entry.jobs(work).items():
        try:
            if not np.all(np.isfinite(np.asarray(job()))):
                raise ValueError("loss or weights are not finite")
            jobs[layout] = job
        except Exception as failure:  # PyTorch's forward-mode GroupNorm takes one layout only
            error = failure
    if not jobs:
        raise error
    # By the fastest of several calls in turn, which a slow moment cannot decide.
    turns = [{key: timing.seconds_a_call(job) for key, job in jobs.items()} for _ in range(3)]
    layouts[name] = min(jobs, key=lambda layout: min(turn[layout] for turn in turns))
    return jobs[layouts[name]]


def summary(series: timing.Series, name: str, entry: Entry, layout: str | None) -> dict:
    """Median seconds, and median and spread of the ratio to the plain step."""
    ratios = series.ratios(name, f"plain {entry.framework}")
    return {
        "ratio": timing.median(ratios),
        "spread": timing.spread(ratios),
        "seconds": timing.median(series.times(name)),
        "layout": layout,
        "framework": entry.framework,
        "own": entry.own,
        "does": entry.does,
    }


class Peers(reporting.Benchmark):
    """The benchmark: a series a network, each framework's plain step first."""

    packages = ("saflex_jax", "jax", "jaxlib", "flax", "numpy", "torch", "betty-ml")

    def __init__(self, options):
        self.keeps_memory = timing.keep_memory()
        self.entries = {f"plain {framework}": entry for framework, entry in PLAIN.items()} | ENTRIES
        self.layouts, self.count = {name: {} for name in NETWORKS}, {}
        self.series = [
            timing.Series(n, tuple(self.entries), partial(self.setups, n), options.rounds, SECONDS)
            for n in NETWORKS
        ]

    def setups(self, network):
        """Of all entries."""
        work, layouts = make_work(NETWORKS[network]), self.layouts[network]
        self.count[network] = sum(p.size for p in jax.tree.leaves(work.params))
        return {n: partial(fastest_job, e, work, layouts, n) for n, e in self.entries.items()}

    def report(self):
        """Ratios, plain steps, reasons."""
        report = {"ratios": {}, "plain": {}, "why_null": {}}
        for series in self.series:
            network = series.title
            layouts, plain = self.layouts[network], {"count": self.count.get(network)}
            summaries = {n: summary(series, n, e, layouts.get(n)) for n, e in self.entries.items()}
            report["ratios"][network] = {name: summaries[name] for name in ENTRIES}
            report["plain"][network] = plain | {f: summaries[f"plain {f}"] for f in PLAIN}
            report["why_null"][network] = series.why_null()
        machine = {"device": "cpu", "threads": timing.threads(), "keeps_memory": self.keeps_memory}
        return report | {"machine": machine | {"seed": SEED, "candidates": 32, "val": 8}}

    @staticmethod
    def draw(report, file):
        """The ratios, least first, this project and peers in two colours."""
        from experiments import style

        networks = report["ratios"]
        with style.look():
            figure = style.figure(3.6, "What does a step that learns cost, in plain steps?")
            axes = figure.subplots(1, len(networks), squeeze=False)[0]
            for axis, (network, entries) in zip(axes, networks.items()):
                measured = {n: e for n, e in entries.items() if e["ratio"] is not None}
                order = sorted(measured, key=lambda n: measured[n]["ratio"])
                shades = [style.OURS if entries[n]["own"] else style.OTHER for n in order]
                axis.barh(order, [min(measured[n]["ratio"], LONGEST) for n in order], color=shades)
                for row, name in enumerate(order):
                    ratio = measured[name]["ratio"]
                    text = f"{ratio:.2f}" if ratio <= LONGEST else f"{ratio:.0f} →"
                    axis.text(min(max(ratio, 1), LONGEST) + 0.1, row, text, va="center",
                              fontsize=style.SMALL)  # fmt: skip
                for label, shade in zip(axis.get_yticklabels(), shades):
                    label.set_color(style.OURS if shade == style.OURS else style.INK)
                axis.axvline(1, color=style.INK, lw=0.8)
                axis.set(xlim=(0, 1.15 * LONGEST), ylim=(len(order) - 0.4, -0.6))
                axis.set_xticks(range(LONGEST + 1))
                axis.tick_params(axis="y", length=0)
                axis.set_xlabel("time, in plain steps of the same framework")
                axis.set_title(network)
            square = {"marker": "s", "ls": ""}
            style.key(figure, {
                "this project": square | {"color": style.OURS},
                "peers (jax_*: what a JAX user would write)": square | {"color": style.OTHER},
            })  # fmt: skip
            style.save(figure, file)


main = partial(reporting.command, Peers)

if __name__ == "__main__":
    sys.exit(main())
