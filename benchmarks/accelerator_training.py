"""Trainings on an accelerator: human label noise, and what AutoMix's masks become.

The parts "noisy_labels" and "automix" of `benchmarks.accelerator`. All images lie on the device, a
dispatch is an epoch (`lax.scan` over rows of them), and one program serves seeds, labels and arms
that differ in their data alone. The recipe is that of the repository KellerJordan/cifar10-airbench
for a ResNet-18, 93.4 % there without test-time augmentation: 26 epochs, SGD with Nesterov momentum
at a rate that rises for a fifth of the run and then falls to zero, shifts, flips, cutout. There the
batch was 500 and the compute f16.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from benchmarks import timing
from saflex_jax import augment, data, models, train
from saflex_jax.batches import floats, take
from saflex_jax.core.tree import cast_floats, identity
from saflex_jax.methods import automix, elr, mixtures, saflex, supervised
from saflex_jax.methods.upstream import upstream
from saflex_jax.rules import Posterior, Refinement, Scoring
from saflex_jax.types import Batch, Method, Model, RunInfo, Streams

Make = Callable[[Any], Method]  # of the number of steps, which may be traced


class Clock:
    """Until when a part may work."""

    deadline = float("inf")  # of `time.monotonic`

    def check(self, seconds: float = 0.0) -> None:
        """Raises TimeoutError unless so much time is left."""
        if time.monotonic() + seconds > self.deadline:
            raise TimeoutError("no time was left")


class Setting(NamedTuple):
    """Of the trainings; the fields below the line are of those on noisy labels."""

    backbone: Callable[[], nn.Module]
    pipeline: str
    batch: int
    longest: int  # epochs of AutoMix, where there is time
    # ---
    cutout: int
    trusted: int
    epochs: int
    seeds: int


FULL = Setting(
    partial(models.ResNet18, norm="batch"), "shift(4, padding='reflect') | flip", 512, 200,
    cutout=12, trusted=500, epochs=26, seeds=5,
)  # fmt: skip
TINY = Setting(
    partial(models.SmallCNN, (8, 16), norm="batch"), "shift(1) | flip", 64, 2,
    cutout=2, trusted=50, epochs=20, seeds=1,
)  # fmt: skip


# --- network and optimiser


def in_compute_dtype(model: Model, dtype: str) -> Model:
    """The network computed in `dtype`; parameters, running statistics and logits stay f32."""
    if dtype == "float32":
        return model

    def train(params, model_state, inputs, key):
        params, inputs = cast_floats((params, inputs), dtype)
        return cast_floats(model.train(params, model_state, inputs, key), "float32")

    def logits(params, model_state, inputs):
        params, inputs = cast_floats((params, inputs), dtype)
        return cast_floats(model.logits(params, model_state, inputs), "float32")

    return Model(model.init, train, logits)


def in_bf16(network: nn.Module) -> Model:
    """The network as all trainings compute it."""
    return in_compute_dtype(models.from_linen(network), "bfloat16")


def tx(steps: int | jax.Array) -> optax.GradientTransformation:
    """SGD at a rate that goes from .04 to .2 in the first fifth of the steps, then to 0."""

    def rate(step):
        return jnp.interp(step / steps, jnp.array([0, 0.2, 1]), jnp.array([0.04, 0.2, 0]))

    decay = optax.add_decayed_weights(5e-4)
    return optax.chain(decay, optax.sgd(rate, momentum=0.9, nesterov=True))


# --- data


class Images(NamedTuple):
    """A data set of 10 classes."""

    inputs: np.ndarray  # of all samples
    labels: dict[str, np.ndarray]  # i[N]: "clean", and "worst" for training
    rows: np.ndarray  # that train: without copies of test images
    test: np.ndarray
    prints: np.ndarray  # equal where inputs are


def open_images(folder: pathlib.Path, tiny: bool) -> Images:
    """CIFAR-10 with the labels "worst" of CIFAR-10N; where tiny digits, 40 % wrong.

    Raises:
      ValueError: it is not prepared; says how to.
    """
    if tiny:
        source = data.digits()
        rows, test = data.hold_out(np.arange(1797), source.labels, size=297, seed=0)
        worst = data.symmetric_noise(source.labels, 10, share=0.4, seed=0)
    else:
        source = data.from_prepared(folder / "cifar10n")
        rows, test, worst = source.splits["train"], source.splits["test"], source.extra["worst"]
    inputs = np.asarray(source.inputs)
    prints = data.fingerprints(inputs, chunk=256)
    rows = rows[~np.isin(prints[rows], prints[test])]
    return Images(inputs, {"clean": source.labels, "worst": worst}, rows, test, prints)


def held(images: Images, labels: str, trusted: np.ndarray) -> Streams:
    """All samples on the device, for candidates and validation samples to be rows of.

    The trusted ones have their right labels, and the last numbers (`Batch.index`), as
    `RunInfo.num_trusted` wants it.
    """
    size, given = len(images.inputs), images.labels[labels].copy()
    given[trusted] = images.labels["clean"][trusted]
    index = np.empty(size, np.int32)
    index[np.append(np.setdiff1d(np.arange(size), trusted), trusted)] = np.arange(size)
    pool = Batch(images.inputs, np.eye(10, dtype=np.float32)[given], np.ones(size, bool), index)
    return Streams(*[jax.device_put(pool)] * 2)


def epochs(rows: np.ndarray, trusted: np.ndarray, batch: int, steps: int, seed: int) -> Iterator:
    """The rows of one dispatch after the other, Streams of i32[steps, B]."""
    options = {"batch_size": batch, "val_batch_size": batch // 4, "seed": seed}
    stream = data.IndexStream(Streams(len(rows), len(trusted)), **options)
    while True:
        places = zip(*(next(stream)[:2] for _ in range(steps)))
        yield Streams(
            *(of[np.stack(at)].astype(np.int32) for of, at in zip((rows, trusted), places))
        )


# --- training


def many_steps(make: Make) -> Callable:
    """(state, rows [n, B], pools, steps of the run) -> (state after n steps, losses [n])."""

    def run(state, rows, pools, steps):
        method = make(steps)

        def step(state, rows):
            state, metrics = method.step(state, take(pools, rows), reduce=identity)
            return state, metrics["loss"][0]

        return jax.lax.scan(step, state, rows)

    return run


def nobody(dispatches, state):
    """Does not look."""


class Program:
    """The steps of a method, compiled ahead, as many to a dispatch as there are `rows`."""

    def __init__(self, make: Make, rows: Streams, pools: Streams, clock: Clock):
        clock.check()
        start, first = time.monotonic(), floats(np.asarray(pools.candidates.inputs[:1]))
        self.method, self.clock, self.steps = make(1), clock, len(rows.candidates)
        self.init = jax.jit(lambda seed: self.method.init(jax.random.key(seed), first))
        run = jax.jit(many_steps(make), donate_argnums=0)
        arguments = jax.eval_shape(self.init, 0), rows, pools, jnp.float32(1)
        self.run = run.lower(*arguments).compile()
        self.compile_seconds = time.monotonic() - start

    def train(self, seed: int, rows: Iterator, pools: Streams, number: int, look=nobody) -> tuple:
        """(state after so many dispatches, seconds); `look(dispatches, state)` is called at each.

        Raises:
          TimeoutError: as soon as it is clear that it would not end in time.
          FloatingPointError: the loss is not finite.
        """
        state, steps = self.init(seed), jnp.float32(number * self.steps)
        state = jax.tree.map(jnp.copy, state)  # what is donated is nobody else's
        rows = jax.device_put(list(itertools.islice(rows, number)))
        look(0, state)
        start = time.monotonic()
        for done, places in enumerate(rows, 1):
            state, losses = self.run(state, places, pools, steps)
            if not np.isfinite(losses).all():
                raise FloatingPointError("the loss is not finite")
            look(done, state)
            self.clock.check((number - done) * (time.monotonic() - start) / done)
        return state, time.monotonic() - start


def evaluator(method: Method, images: Images) -> Callable:
    """state -> accuracy on the test images."""
    labels = np.eye(10, dtype=np.float32)[images.labels["clean"][images.test]]
    evaluate = train.make_evaluator(method, images.inputs[images.test], labels, batch_size=1000)
    return lambda state: evaluate(state)["accuracy"]


class Part:
    """What the parts share; `found` is reported, and `failed` says why something is missing."""

    def __init__(self, clock: Clock, folder: pathlib.Path, tiny: bool):
        self.clock, self.folder, self.tiny = clock, folder, tiny
        self.setting, self.found, self.failed = TINY if tiny else FULL, {}, {}

    def measure(self, bar: tqdm.tqdm, save: Callable[[], None]) -> None:
        """`save` is called whenever something was found."""
        bar.set_description(self.key)
        self.attempt(
            self.key, bar, lambda: self.run(open_images(self.folder, self.tiny), bar, save)
        )

    def attempt(self, name: str, bar: tqdm.tqdm, work: Callable[[], None]) -> None:
        """What fails stops nothing else."""
        bar.set_postfix_str(name)
        try:
            work()
        except Exception as error:
            self.failed[name] = timing.reason(error)
        bar.update()


class NoisyLabels(Part):
    """Arms on "worst" and "clean" labels, seed after seed; trusted samples have right ones."""

    key = "noisy_labels"
    runs = (
        ("worst", "train_val"), ("worst", "saflex"), ("worst", "elr"), ("worst", "saflex_elr"),
        ("clean", "train_val"), ("clean", "saflex"), ("worst", "trusted_only"),
        ("worst", "upstream"),
    )  # fmt: skip

    @property
    def length(self):
        return 1 + len(self.runs) * self.setting.seeds

    def run(self, images, bar, save):
        setting, clean = self.setting, images.labels["clean"]
        size, steps = len(images.inputs), len(images.rows) // setting.batch
        model = in_bf16(models.Classifier(setting.backbone(), 10))
        pipeline = augment.parse(f"{setting.pipeline} | cutout({setting.cutout}, fill=0.47)")
        run = RunInfo(
            size, 10, num_trusted=setting.trusted, num_val=setting.trusted,
            num_steps=setting.epochs * steps, steps_per_epoch=steps,
        )  # fmt: skip
        inside_elr = Refinement(Scoring(), Posterior(run, sharpness=1.0))  # docs/noisy_labels.md
        kinds = {
            "plain": partial(supervised.make, model),
            "saflex": partial(saflex.make, model, run=run),
            "elr": partial(elr.make, model, run=run),
            "saflex_elr": partial(elr.make, model, rule=inside_elr, run=run),
        }

        def kind_of(arm):
            return arm if arm in kinds else "plain"

        def make(kind, steps):
            return upstream(kinds[kind](tx(steps)), pipeline)

        def given(labels, arm, seed):
            rest, trusted = data.hold_out(images.rows, clean, size=setting.trusted, seed=seed)
            rest = rest[~np.isin(images.prints[rest], images.prints[trusted])]
            again = np.resize(trusted, max(setting.batch, len(trusted)))  # to fill a batch
            rows = {"upstream": rest, "trusted_only": again}.get(arm, np.append(rest, trusted))
            rows = epochs(rows, trusted, setting.batch, steps, seed)
            return rows, held(images, labels, trusted)

        evaluate = evaluator(make("plain", 1), images)

        def one(labels, arm, seed):
            row = self.found.get(f"{labels}: {arm}", {"seconds": 0.0})
            self.clock.check(row["seconds"])
            program = programs[kind_of(arm)].result()
            state, seconds = program.train(seed, *given(labels, arm, seed), setting.epochs)
            row |= {"seconds": seconds, "compile_seconds": program.compile_seconds}
            row[f"seed {seed}"] = evaluate(state)
            row["mean"] = float(np.mean([row[name] for name in row if name.startswith("seed ")]))
            self.found[f"{labels}: {arm}"] = row

        rows, pools = given("worst", "train_val", 0)
        first = next(rows)
        with ThreadPoolExecutor() as pool:  # all are compiled at once
            programs = {
                kind: pool.submit(Program, partial(make, kind), first, pools, self.clock)
                for kind in dict.fromkeys(kind_of(arm) for _, arm in self.runs)
            }
        for seed, (labels, arm) in itertools.product(range(setting.seeds), self.runs):
            self.attempt(f"{labels}: {arm}, seed {seed}", bar, partial(one, labels, arm, seed))
            save()


class AutoMix(Part):
    """AutoMix, its control and mixup on clean labels, for as many epochs as fit.

    The control is AutoMix with every mixture a plain mixup: its two heads and momentum network.
    """

    key = "automix"
    arms = ("automix", "mixup", "control")
    length = 1 + len(arms)
    share = 0.3  # of the own image, where masks are looked at

    def run(self, images, bar, save):
        setting, rows = self.setting, images.rows
        self.heads = in_bf16(automix.network(setting.backbone(), 10))
        classifier = in_bf16(models.Classifier(setting.backbone(), 10))

        def make(arm, steps):
            if arm == "mixup":
                pipeline = augment.parse(f"{setting.pipeline} | mixup(1.0)")
                return upstream(supervised.make(classifier, tx(steps)), pipeline)
            # A constant momentum: the program need not know the number of steps.
            options = automix.Options(momentum=0.99, momentum_end=0.99)
            if arm == "control":
                options = dataclasses.replace(options, lam_margin=0.5)
            method = automix.make(self.heads, tx(steps), options, run=RunInfo(1, 10, num_steps=1))
            return upstream(method, augment.parse(setting.pipeline))

        pools, steps = held(images, "clean", rows[:0]), len(rows) // setting.batch
        dispatches = partial(epochs, rows, rows, setting.batch, steps, 0)
        programs = {
            arm: Program(partial(make, arm), next(dispatches()), pools, self.clock)
            for arm in self.arms
        }
        seconds = [p.train(0, dispatches(), pools, 1)[1] for p in programs.values()]
        fit = (self.clock.deadline - time.monotonic()) * 0.85 / sum(seconds)
        number = int(min(fit, setting.longest))
        if number < 1:
            raise TimeoutError("no time was left")
        self.found |= {"epochs": number, "arms": {}, "masks": {}}

        def one(arm):
            look = self.looker(images, pools, number, save) if arm == "automix" else nobody
            state, seconds = programs[arm].train(0, dispatches(), pools, number, look)
            self.found["arms"][arm] = {
                "accuracy": evaluator(programs[arm].method, images)(state),
                "seconds": seconds, "compile_seconds": programs[arm].compile_seconds,
            }  # fmt: skip

        for arm in self.arms:
            self.attempt(arm, bar, partial(one, arm))
            save()

    def looker(self, images: Images, pools: Streams, number: int, save: Callable) -> Callable:
        """Keeps how far masks of 256 training images are from 1/2 and from the share."""
        shown = take(Streams(pools.candidates), Streams(images.rows[:256])).candidates
        pair = mixtures.draw(jax.random.key(0), shown, 1.0)
        pair = pair._replace(shares=jnp.array([self.share, 1 - self.share]))

        @jax.jit
        def distances(state):
            block = automix.Options().make_block()
            own = mixtures.look(self.heads, block, state, shown, pair)[0][0]
            return {
                "from_half": jnp.abs(own - 0.5).mean(),
                "from_share": jnp.abs(own - self.share).mean(),
                "sd_within": own.std((1, 2)).mean(),
            }

        def look(epoch, state):
            if epoch in (1, number) or epoch % -(-number // 20) == 0:
                found = {name: float(x) for name, x in distances(state).items()}
                self.found["masks"][f"epoch {epoch}"] = found
                save()

        return look
