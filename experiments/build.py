"""From a config to the objects of a run; every field is checked before anything is compiled."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.configs.methods import BY_DATA
from saflex_jax import augment, checks, data, models, parallel, train
from saflex_jax.core import losses
from saflex_jax.core.tree import under
from saflex_jax.methods import METHODS, implicit, saflex
from saflex_jax.types import Batch, Method, Streams

LOSSES = {
    "cross_entropy": lambda: losses.weighted_soft_cross_entropy,
    "augmix": losses.augmix_loss,
    "decoupled_mixup": losses.decoupled_mixup_loss,
}
BACKBONES = {"mlp": models.MLP, "small_cnn": models.SmallCNN, "resnet18": models.ResNet18}
SCHEMA = {
    "data": ("name", "val", "test", "noise", "train_on_val"),
    "optimizer": ("learning_rate", "weight_decay"),
    "method": ("name", "loss", *METHODS),
    "train": ("steps", "batch_size", "val_batch_size", "log_every", "checkpoint_every"),
}  # fmt: skip


class Data(NamedTuple):
    """One seed's data.

    Attributes:
      pools: candidates (labels partly wrong), val (trusted).
      test: read once, at the end.
      clean_labels: int[N] of the candidates; for diagnosis only, training never sees it.
    """

    pools: Streams
    test: Batch
    clean_labels: np.ndarray


def check(config: ConfigDict) -> None:
    """Raises ValueError on an unknown field (naming the nearest) or choice."""
    checks.fields("config", config, ("seed", "runner", "augment", "model", *SCHEMA))
    for section, accepted in SCHEMA.items():
        checks.fields(f"config.{section}", config[section], accepted)
    checks.choice("config.runner", config.runner, parallel.RUNNERS)
    checks.choice("config.data.name", config.data.name, data.SOURCES)
    checks.choice("config.model.name", config.model.name, BACKBONES)
    checks.choice("config.method.name", config.method.name, METHODS)
    checks.choice("config.method.loss", config.method.loss, LOSSES)
    augment.parse(config.augment)
    backbone = inspect.signature(BACKBONES[config.model.name]).parameters
    checks.fields("config.model", config.model, {"name", *backbone} - {"parent", "axis_name"})
    for name, refiner in {"saflex": saflex.refiner, "implicit": implicit.refiner}.items():
        given = config.method.get(name, {})
        accepted = set(inspect.signature(refiner).parameters) - BY_DATA
        checks.fields(f"config.method.{name}", given, accepted)
    for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
        checks.positive(f"config.train.{name}", config.train[name])


def make_data(config: ConfigDict) -> Data:
    """Splits, corrupts and standardises, all by `config.seed`."""
    source = data.SOURCES[config.data.name]()
    train, val, test = data.stratified_split(
        source.labels, val=config.data.val, test=config.data.test, seed=config.seed
    )
    inputs = source.inputs
    if inputs.ndim == 2:  # a table: the scale of its columns, from the training split alone
        mean, deviation = inputs[train].mean(0), inputs[train].std(0)
        inputs = (inputs - mean) / np.where(deviation > 0, deviation, 1)

    def pool(index, labels):
        onehot = np.eye(source.num_classes, dtype=np.float32)[labels]
        rows = np.arange(len(index), dtype=np.int32)
        return Batch(inputs[index], onehot, np.ones(len(index), bool), rows)

    given = data.symmetric_noise(
        source.labels[train], source.num_classes, share=config.data.noise, seed=config.seed
    )
    clean = source.labels[train]
    if config.data.train_on_val:
        train = np.concatenate([train, val])
        given, clean = (np.concatenate([a, source.labels[val]]) for a in (given, clean))
    pools = Streams(candidates=pool(train, given), val=pool(val, source.labels[val]))
    return Data(pools, pool(test, source.labels[test]), clean)


def make_stream(config: ConfigDict, pools: Streams) -> data.ArrayStream:
    """This process's share of the batches."""
    return data.ArrayStream(
        pools,
        batch_size=config.train.batch_size,
        val_batch_size=config.train.val_batch_size or None,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def make_method(config: ConfigDict, pools: Streams) -> Method:
    """The method alone; `with_upstream` puts the augmentation in front."""
    check(config)
    size, num_classes = pools.candidates.labels.shape
    kwargs = {k: v for k, v in config.model.items() if k != "name"}
    if config.runner == "pmap":
        kwargs["axis_name"] = parallel.runners.AXIS
    backbone = BACKBONES[config.model.name](**kwargs)
    model = models.from_linen(models.Classifier(backbone, num_classes))
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
    return method.init(jax.random.key(config.seed), pools.candidates.inputs[:1])


def fit(
    config: ConfigDict, data: Data, method: Method, runner: parallel.Runner, **options
) -> train.FitResult:
    """The config's run; `options` are those of `train.fit`."""
    return train.fit(
        runner,
        init_state(config, method, data.pools),
        make_stream(config, data.pools),
        num_steps=config.train.steps,
        log_every=config.train.log_every,
        **options,
    )
