"""From a config to the objects of a run; every field is checked before anything is compiled."""

from __future__ import annotations

import inspect

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import task
from experiments.configs.methods import BY_DATA, REFINERS
from experiments.task import Data
from saflex_jax import augment, checks, models, parallel, train
from saflex_jax.batches import floats
from saflex_jax.core import losses
from saflex_jax.core.tree import under
from saflex_jax.data import (
    ArrayStream,
    Column,
    IndexStream,
    Prefetched,
    category_sizes,
    sizes,
    subset,
)
from saflex_jax.methods import METHODS
from saflex_jax.types import Method, Streams

LOSSES = {
    "cross_entropy": lambda: losses.weighted_soft_cross_entropy,
    "augmix": losses.augmix_loss,
    "decoupled_mixup": losses.decoupled_mixup_loss,
}
BACKBONES = {
    "mlp": models.MLP,
    "small_cnn": models.SmallCNN,
    "resnet18": models.ResNet18,
    "vit": models.ViT,
}
SCHEMA = {
    "data": task.FIELDS,
    "optimizer": ("learning_rate", "weight_decay"),
    "method": ("name", "loss", *METHODS),
    "train": ("steps", "batch_size", "val_batch_size", "log_every", "checkpoint_every"),
}  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raises ValueError on an unknown field (naming the nearest) or choice."""
    checks.fields("config", config, ("seed", "runner", "augment", "model", *SCHEMA))
    for section, accepted in SCHEMA.items():
        checks.fields(f"config.{section}", config[section], accepted)
    checks.choice("config.runner", config.runner, parallel.RUNNERS)
    task.check(config.data)
    checks.choice("config.model.name", config.model.name, BACKBONES)
    checks.choice("config.method.name", config.method.name, METHODS)
    checks.choice("config.method.loss", config.method.loss, LOSSES)
    augment.parse(config.augment)
    backbone = inspect.signature(BACKBONES[config.model.name]).parameters
    checks.fields(
        "config.model", config.model, {"name", *backbone} - {"parent", "axis_name", "categories"}
    )
    for name, refiner in REFINERS.items():
        given = config.method.get(name, {})
        accepted = set(inspect.signature(refiner).parameters) - BY_DATA
        checks.fields(f"config.method.{name}", given, accepted)
    for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
        checks.positive(f"config.train.{name}", config.train[name])


def make_input(
    config: ConfigDict, data: Data, runner: parallel.Runner
) -> tuple[parallel.Runner, train.loop.Stream]:
    """The runner, holding the data or not, and this process's share of its batches."""
    options = {
        "batch_size": config.train.batch_size,
        "val_batch_size": config.train.val_batch_size or None,
        "seed": config.seed,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if config.data.on_device:
        return runner.hold(data.pools), IndexStream(sizes(data.pools), **options)
    stream = ArrayStream(data.pools, generated=data.generated, **options)
    return runner, Prefetched(stream, place=runner.put_batch)


def make_method(
    config: ConfigDict, pools: Streams, columns: tuple[Column, ...] | None = None
) -> Method:
    """The method alone; `with_upstream` puts the augmentation in front."""
    check(config)
    size, num_classes = pools.candidates.labels.shape
    kwargs = {k: v for k, v in config.model.items() if k != "name"}
    if isinstance(pools.candidates.inputs, dict):  # a table with categorical columns
        kwargs["categories"] = category_sizes(columns)
    backbone = BACKBONES[config.model.name]
    if config.runner == "pmap" and hasattr(backbone, "axis_name"):  # it may have BatchNorm
        kwargs["axis_name"] = parallel.runners.AXIS
    model = models.from_linen(models.Classifier(backbone(**kwargs), num_classes))
    schedule = optax.cosine_decay_schedule(config.optimizer.learning_rate, config.train.steps)
    tx = optax.adamw(schedule, weight_decay=config.optimizer.weight_decay)
    options = dict(config.method.get(config.method.name, {}))
    if "predicate" in options:
        options["predicate"] = under(options["predicate"]) if options["predicate"] else None
    if config.method.name == "saflex":
        options |= {"num_samples": size, "num_classes": num_classes}
    if config.method.name == "implicit":
        options["prior"] = pools.candidates.labels
    return METHODS[config.method.name](model, tx, loss=LOSSES[config.method.loss](), **options)


def with_upstream(config: ConfigDict, method: Method) -> Method:
    """The method, fed by the config's upstream pipeline inside the compiled step."""
    return augment.upstream(method, augment.parse(config.augment))


def init_state(config: ConfigDict, method: Method, pools: Streams):
    """The state at step 0, by `config.seed`."""
    first = subset(pools.candidates.inputs, np.arange(1))
    return method.init(jax.random.key(config.seed), floats(jax.tree.map(np.asarray, first)))


def fit(
    config: ConfigDict, data: Data, method: Method, runner: parallel.Runner, **options
) -> train.FitResult:
    """The config's run; `options` are those of `train.fit`."""
    runner, stream = make_input(config, data, runner)
    return train.fit(
        runner,
        init_state(config, method, data.pools),
        stream,
        num_steps=config.train.steps,
        log_every=config.train.log_every,
        **options,
    )
